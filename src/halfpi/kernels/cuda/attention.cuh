// Attention of the actions: a cluster has one head and its blocks share out the keys. A block
// averages the values of its keys for all rows, then merges all averages of some dimensions.
#pragma once
#include "product.cuh"

namespace {

// Scales logits (64 rows, N keys), of which the first `valid` count, and raises `top` to them.
template <int N>
__device__ __forceinline__ void scale_logits(float (&logits)[N / 2], int lane, int valid,
                                             float (&top)[2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    bool counts = i / 4 * 8 + 2 * (lane % 4) + i % 2 < valid;
    logits[i] = counts ? logits[i] * LOGIT_SCALE : -infinity();
    top[i / 2 % 2] = fmaxf(top[i / 2 % 2], logits[i]);
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
    const int r = i / 2 % 2;
    float even = exp2_fast(logits[i] - base[r]), odd = exp2_fast(logits[i + 1] - base[r]);
    total[r] += even + odd;
    store_shared(to + i / 4 * 1024 + r * 128, pack_bf16(even, odd));
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
  float average[2][16];  // of this thread's rows: dimensions 64 · group + 32 i …
  float highest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};

  // A tile of keys from the cache, and after the last one the keys of actions, which group 3 takes.
  __device__ __forceinline__ void tile(Block& b, const Split& split, int tile, bool last) {
    float logits[16], recent[4] = {0.0f, 0.0f, 0.0f, 0.0f}, top[2] = {highest[0], highest[1]};
    multiply<Bf16, TILE / GROUPS, TILE, TILE_CHUNKS, KEY_UNITS, 1>(
        logits, b, QUERIES, 0, TILE / GROUPS * b.group, AllReady());
    const int first = tile * TILE + TILE / GROUPS * b.group;
    scale_logits<TILE / GROUPS>(logits, b.lane, split.keys - first, top);
    // All have their keys and values now, so nobody reads the products that statistics overwrite.
    wait(b.shared + RECENT_FULL, b.layer & 1);
    const bool has_recent = last && b.group == GROUPS - 1;
    if (has_recent) {
      recent_logits(recent, b);
      scale_logits<RECENT_SLOTS>(recent, b.lane, split.recent, top);
    }
    top[0] = over_quad(top[0], true), top[1] = over_quad(top[1], true);
    give(b, HIGHEST, top);
    all_consumers();
    float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int g = 0; g < GROUPS; ++g) top[i] = fmaxf(top[i], taken(b, HIGHEST, g, b.row + 8 * i));
      base[i] = top[i] == -infinity() ? 0.0f : top[i];
      float shrink = exp2_fast(highest[i] - base[i]);
      highest[i] = top[i], total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 16; ++j) average[j / 8][j % 8 / 2 * 4 + 2 * i + j % 2] *= shrink;
    }
    store_weights<TILE / GROUPS>(logits, b, TILE / GROUPS / 8 * b.group, base, sum);
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
    for (int g = 0; g < GROUPS; ++g) {
      for (int i = 0; i < 2; ++i) total[i] += taken(b, TOTAL, g, b.row + 8 * i);
    }
    add_values(b);
  }

  __device__ __forceinline__ void recent_logits(float (&logits)[4], const Block& b) const {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD / 8; k += 2) {
      Bf16::mma(logits, descriptor(b.shared + QUERIES + k * ROWS * 16, ROWS * 16, 128),
                descriptor(b.shared + RECENT_KEYS + k * RECENT_SLOTS * 16, RECENT_SLOTS * 16, 0));
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  // Each group has the two units with its dimensions.
  __device__ __forceinline__ void add_values(Block& b) {
    const u32 weights = b.shared + WEIGHTS;
    const int unit = b.unit + 2 * b.group;
    b.wait_full(unit), b.wait_full(unit + 1);
    __syncwarp();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < TILE / 8; k += 2) {
        Bf16::mma_transposed(average[i], descriptor(weights + k * 1024, 1024, 128),
                             descriptor(b.slot(unit + i) + k * 128, 128, TILE * 16));
      }
      // Both halves of these 16 keys are the same eight, the second with weights of 0.
      const u32 recent = b.shared + RECENT_VALUES + (8 * b.group + 4 * i) * RECENT_SLOTS * 16;
      Bf16::mma_transposed(average[i], descriptor(weights + TILE / 8 * 1024, 1024, 128),
                           descriptor(recent, 0, RECENT_SLOTS * 16));
    }
    wgmma_commit();
    wgmma_wait<0>();
    b.release(unit, GROUPS), b.release(unit + 1, GROUPS);
    b.unit += KEY_UNITS;
  }

  // Averages and log-sums to the peers that merge their dimensions: two of them a group.
  __device__ __forceinline__ void send(const Block& b) const {
    float log_sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = b.row + 8 * i;
      float inverse = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
      log_sum[i] = highest[i] + log2f(total[i]);
      if (row >= ROWS) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int at = j % 4 * 4 + 2 * i;
        store_shared(b.shared + STAGED + (8 * b.group + j) * ROWS * 16 + row * 16 + b.lane % 4 * 4,
                     pack_bf16(average[j / 4][at] * inverse, average[j / 4][at + 1] * inverse));
      }
    }
    give(b, LOG_SUM, log_sum);
    fence_async_proxy();
    named_barrier(4 + b.group, 128);
    if (b.thread % 128 < 2) {
      const int peer = 2 * b.group + b.thread % 128;
      const u32 barrier = in_block(b.shared + AVERAGES_FULL, peer);
      bulk_push(in_block(b.shared + AVERAGES + b.rank * AVERAGE_PIECE, peer),
                b.shared + STAGED + peer * AVERAGE_PIECE, AVERAGE_PIECE, barrier);
      bulk_push(in_block(b.shared + LOG_SUMS + b.rank * 256, peer),
                b.shared + STATISTICS + (LOG_SUM * GROUPS + b.group) * 256, 256, barrier);
    }
  }
};

__device__ __forceinline__ void attend(Block& b, const Split& split) {
  Attention attention;
#pragma unroll
  for (int i = 0; i < 32; ++i) attention.average[i / 16][i % 16] = 0.0f;
  b.wait_operand(QUERIES_FULL);
  const int tiles = key_tiles(b.prefix);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile) all_consumers();  // the weights of the tile before are read
    attention.tile(b, split, tile, tile == tiles - 1);
  }
  attention.send(b);
}

// All splits' averages of eight of this block's dimensions, weighted by their sums, to all peers.
__device__ __forceinline__ void merge(const Block& b, float inverse_scale) {
  const int row = b.thread % 64, chunk = b.thread / 64;
  if (chunk >= HEAD / PEERS / 8 || row >= ROWS) return;
  wait(b.shared + AVERAGES_FULL, b.layer & 1);
  float weight[PEERS], highest = -infinity(), total = 0.0f, sum[8] = {};
#pragma unroll
  for (int s = 0; s < PEERS; ++s) {
    weight[s] = b.floats(LOG_SUMS)[s * 64 + row];
    highest = fmaxf(highest, weight[s]);
  }
#pragma unroll
  for (int s = 0; s < PEERS; ++s) {
    float w = exp2_fast(weight[s] - highest);
    total += w;
    uint4 v = load_shared(b.shared + AVERAGES + s * AVERAGE_PIECE + (chunk * ROWS + row) * 16);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] += w * __uint_as_float(words[i] << 16);
      sum[2 * i + 1] += w * __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  const float inverse = 1.0f / total;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] *= inverse;
  push_operand(b, MERGED, HEAD / PEERS / 8 * b.rank + chunk, row, sum, inverse_scale, MERGED_FULL);
}

}  // namespace
