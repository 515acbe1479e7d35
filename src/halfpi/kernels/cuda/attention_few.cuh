// Attention of few rows of the actions, see attention.cuh. Keys, and dimensions of values, are the 64 rows of
// a product of the tensor cores, and rows of the actions its columns, so that it is as small as they are few,
// and all threads have a share of its results: logits of two keys, the second eight further on, and of two
// neighbours of each eight rows of the actions. With many rows, what warps must tell each other takes longer
// than that gains.
#pragma once
#include "attention_shares.cuh"

namespace {

// Statistics, fp32 (warp, row): the highest logits and the sums of weights of each warp's keys, and behind
// the last warp's those of the keys of actions; and what a warp's weights are relative to, then RowPart.
constexpr int TOPS = STATISTICS, TOTALS = TOPS + (WARPS + 1) * STATISTIC;
constexpr int BASES = TOTALS + (WARPS + 1) * STATISTIC;
static_assert(!FEW || BASES + WARPS * STATISTIC == QUERIES, "they have as much room as they need");
static_assert(!FEW || ROW_PART_BYTES == STATISTIC, "one takes the place of the other");

// Of COUNT numbers, the combination over the eight threads of a warp that have the same rows of the actions:
// each is left with some of them, from the `first`th on, and stores those.
template <int COUNT, int APART = 16, typename Combine, typename Store>
__device__ __forceinline__ void over_keys(const float (&v)[COUNT], int lane, Combine combine, Store store,
                                          int first = 0) {
  static_assert(COUNT == 1 || COUNT % 2 == 0, "they are shared out in halves");
  constexpr int LEFT = COUNT > 1 ? COUNT / 2 : 1;
  const bool upper = lane & APART;
  float left[LEFT];
#pragma unroll
  for (int i = 0; i < LEFT; ++i) {
    const float low = v[i], high = v[i + COUNT - LEFT];
    left[i] = combine(upper ? high : low, __shfl_xor_sync(~0u, upper ? low : high, APART));
  }
  if (upper) first += COUNT - LEFT;
  if constexpr (APART > 4) {
    over_keys<LEFT, APART / 2>(left, lane, combine, store, first);
  } else {
#pragma unroll
    for (int i = 0; i < LEFT; ++i) store(first + i, left[i]);
  }
}

// SUMS: of a thread, of a product.
template <int SUMS>
struct AttentionOfFew {
  static constexpr int PAIRS = SUMS / 2;
  float average[PARTS][SUMS] = {};  // of dimensions 64 · (PARTS · group + part) …
  float highest = -infinity(), total = 0.0f;  // of row `lane`, the same in all warps

  __device__ static __forceinline__ float* of_warp(const Block& b, int statistic, int warp) {
    return b.floats(statistic + warp * STATISTIC);
  }
  __device__ static __forceinline__ int own(const Block& b) { return 4 * b.group + b.warp; }
  // Of a thread's pair `i` of logits, or of averages.
  __device__ static __forceinline__ int row_of(const Block& b, int i) {
    return i / 2 * 8 + b.lane % 4 * 2 + i % 2;
  }

  // A tile of keys from the cache, and after the last one the keys of actions, which the last group
  // takes.
  __device__ __forceinline__ void tile(Block& b, int tile, bool last) {
    const Split split(b.rank, b.prefix);
    const int valid = split.keys - tile * KEY_TILE, key = 64 * b.group + 16 * b.warp + b.lane / 4;
    float logits[SUMS], tops[PAIRS], recent[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    // A tile that is shorter than what groups multiply has all keys of its block: rows behind are not valid.
    wide_product<Bf16, true, KEY_TILE>(logits, b, KEY_UNITS, QUERIES, FromPeers(b, QUERIES_FULL, KEY_UNITS));
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      float &first = logits[i / 2 * 4 + i % 2], &second = logits[i / 2 * 4 + i % 2 + 2];
      if (key >= valid) first = -infinity();
      if (key + 8 >= valid) second = -infinity();
      tops[i] = fmaxf(first, second);
    }
    over_keys(tops, b.lane, [](float x, float y) { return fmaxf(x, y); },
              [&](int i, float top) { of_warp(b, TOPS, own(b))[row_of(b, i)] = top; });
    b.wait_for(RECENT_FULL);
    const bool has_recent = last && b.group == GROUPS - 1;
    if (has_recent) find_recent_top(recent, b, split.recent);
    all_consumers();
    raise(b, tile > 0, last);
    weigh(logits, b, key);
    if (has_recent) weigh_recent(recent, b);
    // A product takes 16 keys at a time, and no thread knows at compile time which tile is last.
    const int zeros = last ? 8 : 16;
    if (b.thread < LINE_ROWS / 8 * zeros) {
      const int at = b.thread / zeros * WEIGHED + WEIGHED - zeros + b.thread % zeros;
      store_shared(b.shared + WEIGHTS + at * 16, make_uint4(0, 0, 0, 0));
    }
    fence_async_proxy();
    all_consumers();
    const Matrix weights(b.shared + WEIGHTS, 128, WEIGHED * 16);
    add_values(
        b, average, last,
        [&](float (&sum)[SUMS], int k, u64 values) {
          Bf16::mma_both_transposed(sum, values, weights.at(k * 128));
        },
        [&] { add_totals(b, last); }, [&](int part) { send(b, part); });
  }

  // Their logits have rows of the actions as rows, see recent_logits; the first warp has all.
  __device__ __forceinline__ void find_recent_top(float (&logits)[4], const Block& b, int valid) const {
    recent_logits(logits, b);
    float top[2] = {-infinity(), -infinity()};
    find_top<RECENT_SLOTS>(logits, b.lane, valid, top);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = over_quad(top[i], true);
      if (b.warp == 0 && b.lane % 4 == 0) of_warp(b, TOPS, WARPS)[b.row + 8 * i] = top[i];
    }
  }

  // The highest logits of all keys so far, and what that makes of the sums of tiles before.
  __device__ __forceinline__ void raise(const Block& b, bool has_sums, bool has_recent) {
    float top = highest;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) top = fmaxf(top, of_warp(b, TOPS, warp)[b.lane]);
    if (has_recent) top = fmaxf(top, of_warp(b, TOPS, WARPS)[b.lane]);
    const float base = base_of(top, LOGIT_SCALE), by = exp2_fast(highest * LOGIT_SCALE - base);
    of_warp(b, BASES, own(b))[b.lane] = base;
    highest = top, total *= by;
    __syncwarp();
    if (!has_sums) return;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const float by_of_row = __shfl_sync(~0u, by, row_of(b, i));
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        average[part][i / 2 * 4 + i % 2] *= by_of_row, average[part][i / 2 * 4 + i % 2 + 2] *= by_of_row;
      }
    }
  }

  __device__ __forceinline__ void weigh(const float (&logits)[SUMS], const Block& b, int key) const {
    float sums[PAIRS];
    const u32 to = b.shared + WEIGHTS + key * 16 + b.lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      const float2 base = *reinterpret_cast<const float2*>(of_warp(b, BASES, own(b)) + row_of(b, i / 2));
      float weights[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        weights[j] = exp2_fast(fmaf(logits[i + j], LOGIT_SCALE, -(j % 2 ? base.y : base.x)));
      }
      sums[i / 2] = weights[0] + weights[2], sums[i / 2 + 1] = weights[1] + weights[3];
      const u32 at = to + i / 4 * WEIGHED * 16;
      if (key < KEY_TILE) store_shared(at, pack_bf16(weights[0], weights[1]));
      if (key + 8 < KEY_TILE) store_shared(at + 128, pack_bf16(weights[2], weights[3]));
    }
    over_keys(sums, b.lane, [](float x, float y) { return x + y; },
              [&](int i, float sum) { of_warp(b, TOTALS, own(b))[row_of(b, i)] = sum; });
  }

  __device__ __forceinline__ void weigh_recent(const float (&logits)[4], const Block& b) const {
    if (b.warp) return;
    const u32 to = b.shared + WEIGHTS + (KEY_TILE + b.lane % 4 * 2) * 16;
#pragma unroll
    for (int i = 0; i < LINE_ROWS / 8; ++i) {
      const int row = b.row + 8 * i;
      const float base = of_warp(b, BASES, own(b))[row];
      float weights[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        weights[j] = exp2_fast(fmaf(logits[2 * i + j], LOGIT_SCALE, -base));
        const u32 at = to + (i * WEIGHED + j) * 16 + b.lane / 4 * 2;
        store_shared(at, static_cast<unsigned short>(pack_bf16(weights[j], 0.0f)));
      }
      const float sum = over_quad(weights[0] + weights[1], false);
      if (b.lane % 4 == 0) of_warp(b, TOTALS, WARPS)[row] = sum;
    }
  }

  __device__ __forceinline__ void add_totals(const Block& b, bool has_recent) {
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += of_warp(b, TOTALS, warp)[b.lane];
    if (has_recent) total += of_warp(b, TOTALS, WARPS)[b.lane];
  }

  // The sums of a part, of which each warp has the sixteen dimensions that a peer merges, and once RowPart.
  __device__ __forceinline__ void send(const Block& b, int part) const {
    const int peer = own(b);
    const u32 to = sums_for(b, peer) + part * PART_BYTES + b.lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < SUMS; i += 4) {
      const float* v = average[part] + i;
      const u32 first = transposed(pack_bf16(v[0], v[1])), second = transposed(pack_bf16(v[2], v[3]));
      const int row = 2 * i + b.lane / 4;
      if (row >= ROWS) continue;
      store_shared(to + row * 16, first);
      store_shared(to + (ROWS + row) * 16, second);
    }
    if (part == 0) {
      reinterpret_cast<RowPart*>(of_warp(b, BASES, own(b)))[b.lane] = {highest * LOGIT_SCALE, total};
    }
    fence_async_proxy();
    __syncwarp();
    if (elected()) push_sums(b, peer, part, b.shared + BASES + peer * STATISTIC);
  }
};

}  // namespace
