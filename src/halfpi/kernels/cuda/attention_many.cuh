// Attention of many rows of the actions, see attention.cuh. They are the 64 rows of a product of the tensor
// cores, and keys or dimensions its columns. A thread has two rows, the second eight further on.
#pragma once
#include "attention_shares.cuh"

namespace {

// Sums or maxima of all groups: each gives (64,), of which a thread wants two rows.
__device__ __forceinline__ void give(const Block& b, int statistic, const float (&v)[2]) {
  float* to = b.floats(STATISTICS) + (statistic * GROUPS + b.group) * 64 + b.row;
  if (b.lane % 4 == 0) to[0] = v[0], to[8] = v[1];
}
__device__ __forceinline__ float taken(const Block& b, int statistic, int group, int row) {
  return b.floats(STATISTICS)[(statistic * GROUPS + group) * 64 + row];
}
enum Statistic { HIGHEST, TOTAL, STATISTIC_COUNT };

struct AttentionOfMany {
  static constexpr int KEYS = KEY_TILE / GROUPS;    // of a group
  float average[PARTS][32] = {};  // of this thread's rows: dimensions 64 · (PARTS · group + part) …
  float highest[2] = {-infinity(), -infinity()}, total[2] = {};

  // A tile of keys from the cache, and after the last one the keys of actions, which the last group
  // takes.
  __device__ __forceinline__ void tile(Block& b, int tile, bool last) {
    const Split split(b.rank, b.prefix);
    float logits[KEYS / 2], recent[4] = {0.0f, 0.0f, 0.0f, 0.0f}, top[2] = {highest[0], highest[1]};
    wide_product<Bf16, false>(logits, b, KEY_UNITS, QUERIES,
                              FromPeers(b, QUERIES_FULL, KEY_UNITS));
    find_top<KEYS>(logits, b.lane, split.keys - tile * KEY_TILE - KEYS * b.group, top);
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
      base[i] = base_of(top[i], LOGIT_SCALE);
      if (tile) shrink(average, total, i, exp2_fast(highest[i] * LOGIT_SCALE - base[i]));
      highest[i] = top[i];
    }
    const u32 to = b.shared + WEIGHTS + b.row * 16 + b.lane % 4 * 4;
    store_weights<KEYS>(logits, LOGIT_SCALE, base, to + KEYS / 8 * b.group * 1024, sum);
    if (has_recent) store_weights<RECENT_SLOTS>(recent, LOGIT_SCALE, base, to + KEY_TILE / 8 * 1024, sum);
    // A product takes 16 keys at a time, and no thread knows at compile time which tile is last.
    if (b.thread < (last ? 64 : 128)) {
      const int chunk = KEY_TILE / 8 + 1 - b.thread / 64;
      store_shared(b.shared + WEIGHTS + chunk * 1024 + b.thread % 64 * 16, make_uint4(0, 0, 0, 0));
    }
    sum[0] = over_quad(sum[0], false), sum[1] = over_quad(sum[1], false);
    give(b, TOTAL, sum);
    fence_async_proxy();
    all_consumers();
    const Matrix weights(b.shared + WEIGHTS, 1024, 128);
    add_values(
        b, average, last,
        [&](float (&sum)[32], int k, u64 values) {
          Bf16::mma_transposed(sum, weights.at(k * 1024), values);
        },
        [&] { add_totals(b); }, [&](int part) { send(b, part); });
  }

  __device__ __forceinline__ void add_totals(const Block& b) {
    for (int g = 0; g < GROUPS; ++g) {
      for (int i = 0; i < 2; ++i) total[i] += taken(b, TOTAL, g, b.row + 8 * i);
    }
  }

  // The sums of a part, of which four peers merge sixteen dimensions each, and once RowPart. Blocks begin
  // with different peers: what all send to the same one comes one after the other.
  __device__ __forceinline__ void send(const Block& b, int part) const {
    const int rows = STATISTICS + STATISTIC_COUNT * GROUPS * STATISTIC + b.group * ROW_PART_BYTES;
    store_sums<ROWS>(average[part], b.row, [&](int i) {
      return sums_for(b, 4 * b.group + i) + part * PART_BYTES + b.lane % 4 * 4;
    });
    RowPart* of_row = reinterpret_cast<RowPart*>(b.memory + rows) + b.row;
    if (part == 0) store_row_parts(of_row, b.lane, highest, LOGIT_SCALE, total);
    fence_async_proxy();
    b.together();
    if (!elected()) return;
    const int peer = 4 * b.group + ((b.warp + b.rank) & 3);
    push_sums(b, peer, part, b.shared + rows);
  }
};

}  // namespace
