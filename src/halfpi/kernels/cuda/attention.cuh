// Attention of the actions: a cluster has one head and its blocks share out the keys. A block
// averages the values of its keys for all rows, then merges all averages of some dimensions.
#pragma once
#include "product.cuh"

namespace {

// Raises `top` to logits (64 rows, N keys), of which the first `valid` count. A thread has two rows.
template <int N>
__device__ __forceinline__ void find_top(float (&logits)[N / 2], int lane, int valid,
                                         float (&top)[2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int row = i / (N / 4), of_row = i % (N / 4);
    bool counts = of_row / 2 * 8 + 2 * (lane % 4) + of_row % 2 < valid;
    logits[i] = counts ? logits[i] : -infinity();
    top[row] = fmaxf(top[row], logits[i]);
  }
}

// Logits become weights, in shared memory from the chunk of their first key on, and in `total`.
template <int N>
__device__ __forceinline__ void store_weights(const float (&logits)[N / 2], const Block& b,
                                              int chunk, const float (&base)[2],
                                              float (&total)[2]) {
  const u32 to = b.shared + WEIGHTS + chunk * 1024 + b.row * 16 + b.lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int row = i / (N / 4), of_row = i % (N / 4);
    float even = exp2_fast(fmaf(logits[i], LOGIT_SCALE, -base[row]));
    float odd = exp2_fast(fmaf(logits[i + 1], LOGIT_SCALE, -base[row]));
    total[row] += even + odd;
    store_shared(to + of_row / 2 * 1024 + row * 128, pack_bf16(even, odd));
  }
}

// Sums or maxima of all groups: each gives (64,), of which a thread wants two rows.
__device__ __forceinline__ void give(const Block& b, int statistic, const float (&v)[2]) {
  float* to = b.floats(STATISTICS) + (statistic * GROUPS + b.group) * 64 + b.row;
  if (b.lane % 4 == 0) to[0] = v[0], to[8] = v[1];
}
__device__ __forceinline__ float taken(const Block& b, int statistic, int group, int row) {
  return b.floats(STATISTICS)[(statistic * GROUPS + group) * 64 + row];
}
enum Statistic { HIGHEST, TOTAL, LOG_SUM };

__device__ __forceinline__ float over_quad(float v, bool maximum) {
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    float other = __shfl_xor_sync(~0u, v, i);
    v = maximum ? fmaxf(v, other) : v + other;
  }
  return v;
}

struct Attention {
  float average[32] = {};  // of this thread's rows: dimensions 64 · group …
  float highest[2] = {-infinity(), -infinity()}, total[2] = {};

  // A tile of keys from the cache, and after the last one the keys of actions, which group 3 takes.
  __device__ __forceinline__ void tile(Block& b, int tile, bool last) {
    const Split split(b.rank, b.prefix);
    float logits[16], recent[4] = {0.0f, 0.0f, 0.0f, 0.0f}, top[2] = {highest[0], highest[1]};
    wide_product<Bf16>(logits, b, KEY_UNITS, QUERIES, FromPeers(b, QUERIES_FULL, KEY_UNITS));
    find_top<TILE / GROUPS>(logits, b.lane, split.keys - tile * TILE - quarter(b), top);
    b.wait_for(RECENT_FULL);
    const bool has_recent = last && b.group == GROUPS - 1;
    if (has_recent) {
      recent_logits(recent, b);
      find_top<RECENT_SLOTS>(recent, b.lane, split.recent, top);
    }
    top[0] = over_quad(top[0], true), top[1] = over_quad(top[1], true);
    give(b, HIGHEST, top);
    all_consumers();
    float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int g = 0; g < GROUPS; ++g) top[i] = fmaxf(top[i], taken(b, HIGHEST, g, b.row + 8 * i));
      base[i] = top[i] == -infinity() ? 0.0f : top[i] * LOGIT_SCALE;
      if (tile) shrink(i, exp2_fast(highest[i] * LOGIT_SCALE - base[i]));
      highest[i] = top[i];
    }
    store_weights<TILE / GROUPS>(logits, b, quarter(b) / 8, base, sum);
    if (has_recent) store_weights<RECENT_SLOTS>(recent, b, TILE / 8, base, sum);
    // A product takes 16 keys at a time, and no thread knows at compile time which tile is last.
    if (b.thread < (last ? 64 : 128)) {
      const int chunk = TILE / 8 + 1 - b.thread / 64;
      store_shared(b.shared + WEIGHTS + chunk * 1024 + b.thread % 64 * 16, make_uint4(0, 0, 0, 0));
    }
    sum[0] = over_quad(sum[0], false), sum[1] = over_quad(sum[1], false);
    give(b, TOTAL, sum);
    fence_async_proxy();
    all_consumers();
    add_values(b);
  }

  // For a higher base of the weights of a row.
  __device__ __forceinline__ void shrink(int row, float by) {
    total[row] *= by;
#pragma unroll
    for (int j = 0; j < 16; ++j) average[j / 2 * 4 + 2 * row + j % 2] *= by;
  }

  __device__ __forceinline__ void recent_logits(float (&logits)[4], const Block& b) const {
    const Matrix queries(b.shared + QUERIES, ROWS * 16, 128);
    const Matrix keys(b.shared + RECENT_KEYS, RECENT_SLOTS * 16, 0);
    settle(logits);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD / 8; k += 2) {
      Bf16::mma(logits, queries.at(k * ROWS * 16), keys.at(k * RECENT_SLOTS * 16));
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(logits);
  }

  // Each group has the unit with its dimensions.
  __device__ __forceinline__ void add_values(Block& b) {
    static_assert(KEY_UNITS == GROUPS, "a unit each");
    const Matrix weights(b.shared + WEIGHTS, 1024, 128), values(b.shared + RING, 128, TILE * 16);
    Cursor unit = b.ring;
    unit.advance(b.group);
    b.wait_full(unit);
    __syncwarp();
    settle(average);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE / 8; k += 2) {
      Bf16::mma_transposed(average, weights.at(k * 1024), values.at(unit.slot * UNIT + k * 128));
    }
    // Both halves of these 16 keys are the same eight, the second with weights of 0.
    const Matrix recent(b.shared + RECENT_VALUES + 8 * b.group * RECENT_SLOTS * 16, 0,
                        RECENT_SLOTS * 16);
    Bf16::mma_transposed(average, weights.at(TILE / 8 * 1024), recent.at(0));
    wgmma_commit();  // and while that is under way:
    for (int g = 0; g < GROUPS; ++g) {
      for (int i = 0; i < 2; ++i) total[i] += taken(b, TOTAL, g, b.row + 8 * i);
    }
    wgmma_wait<0>();
    settle(average);
    b.release(unit.slot, GROUPS);
    b.ring.advance(KEY_UNITS);
  }

  // Averages and log-sums to the peers that merge their dimensions: two of them a group.
  __device__ __forceinline__ void send(const Block& b) const {
    float log_sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = b.row + 8 * i;
      float inverse = total[i] > 0.0f ? reciprocal(total[i]) : 0.0f;
      log_sum[i] = highest[i] * LOGIT_SCALE + log2_fast(total[i]);
      if (row >= ROWS) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = 4 * j + 2 * i;
        store_shared(b.shared + STAGED + (8 * b.group + j) * ROWS * 16 + row * 16 + b.lane % 4 * 4,
                     pack_bf16(average[at] * inverse, average[at + 1] * inverse));
      }
    }
    give(b, LOG_SUM, log_sum);
    fence_async_proxy();
    named_barrier(4 + b.group, 128);
    if (b.thread == 0) mbarrier_expect(b.shared + AVERAGES_FULL, PEERS * (AVERAGE_PIECE + 256));
    if (b.warp < 2 && elected()) {
      const int peer = 2 * b.group + b.warp;
      const u32 barrier = in_block(b.shared + AVERAGES_FULL, peer);
      bulk_push(in_block(b.shared + AVERAGES + b.rank * AVERAGE_PIECE, peer),
                b.shared + STAGED + peer * AVERAGE_PIECE, AVERAGE_PIECE, barrier);
      bulk_push(in_block(b.shared + LOG_SUMS + b.rank * 256, peer),
                b.shared + STATISTICS + (LOG_SUM * GROUPS + b.group) * 256, 256, barrier);
    }
  }
};

__device__ __forceinline__ void attend(Block& b) {
  Attention attention;
  const int tiles = key_tiles(b.prefix);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile) all_consumers();  // the weights of the tile before are read
    attention.tile(b, tile, tile == tiles - 1);
  }
  attention.send(b);
}

// All splits' averages of four dimensions of a row, weighted by their sums.
__device__ __forceinline__ void merge_row(const Block& b, float (&sum)[4], int column, int row) {
  float weight[PEERS], highest = -infinity(), total = 0.0f;
#pragma unroll
  for (int s = 0; s < PEERS; ++s) {
    weight[s] = b.floats(LOG_SUMS)[s * 64 + row];
    highest = fmaxf(highest, weight[s]);
  }
  const u32 from = b.shared + AVERAGES + (column / 8 * ROWS + row) * 16 + column % 8 * 2;
#pragma unroll
  for (int s = 0; s < PEERS; ++s) {
    float w = exp2_fast(weight[s] - highest);
    total += w;
    const uint2 v = load_shared(from + s * AVERAGE_PIECE);
    sum[0] += w * low_bf16(v.x), sum[1] += w * high_bf16(v.x);
    sum[2] += w * low_bf16(v.y), sum[3] += w * high_bf16(v.y);
  }
  const float inverse = reciprocal(total);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] *= inverse;
}

// This block's share of the dimensions, to all peers.
__device__ __forceinline__ void merge(const Block& b, float inverse_scale) {
  constexpr int COLUMNS = HEAD / PEERS;
  static_assert(COLUMNS == 8 * GROUPS, "neighbours in a warp have eight columns");
  const int row = b.thread % 128 / 2, column = 8 * b.group + b.thread % 2 * 4;
  b.wait_for(AVERAGES_FULL);
  if (row < ROWS) {
    float sum[4] = {};
    merge_row(b, sum, column, row);
    store_operand(b, MERGED, row, COLUMNS * b.rank + column, sum, inverse_scale);
  }
  b.share(MERGED + b.rank * MERGED_PIECE, MERGED_PIECE, MERGED_FULL, OUT_UNITS);
}

}  // namespace
