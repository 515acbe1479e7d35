// Attention of the actions: block 16 q + s has head q and split s of the keys, then all splits merge.
#pragma once
#include "block.cuh"

namespace {

struct Split {  // prefix keys first, then keys of actions; both shared out evenly
  int head, prefix_first, prefix_keys, action_first, keys;

  __device__ Split(const Block& b) {
    int s = b.index % KEY_SPLITS;
    head = b.index / KEY_SPLITS;
    prefix_first = s * b.prefix / KEY_SPLITS;
    prefix_keys = (s + 1) * b.prefix / KEY_SPLITS - prefix_first;
    action_first = (s * ROWS + KEY_SPLITS - 1) / KEY_SPLITS;
    keys = prefix_keys + ((s + 1) * ROWS + KEY_SPLITS - 1) / KEY_SPLITS - action_first;
  }
};

// Starts copying what the cache has of keys first … first + 63; keys beyond the split become zeros.
__device__ __forceinline__ void fetch_prefix(const Block& b, const Split& split, const char* keys,
                                             const char* values, int first) {
  int chunk = b.thread / 32 * 4 + b.lane / 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int slot = 8 * i + b.lane % 8, key = first + slot;
    bool cached = key < split.prefix_keys;
    if (cached || key >= split.keys) {
      long from = (cached ? split.prefix_first + key : 0) * (HEAD * 2L) + chunk * 16;
      u32 to = b.shared + chunk * 1024 + slot * 16;
      copy_async(to + KEYS, keys + from, cached);
      copy_async(to + VALUES, values + from, cached);
    }
  }
}

// Keys and values of actions among keys first … first + 63: at most four rows, 16 bytes a thread.
__device__ __forceinline__ void fetch_actions(const Block& b, const Split& split, const char* set,
                                              int first) {
  int chunk = b.thread % 32, key = split.prefix_keys + b.thread / 32 % 4;
  int head = HEADS + b.thread / 128;
  const uint4* from = reinterpret_cast<const uint4*>(set + QKV) + (head * 32 + chunk) * ROWS +
                      split.action_first + key - split.prefix_keys;
  u32 to = b.shared + (b.thread / 128 ? VALUES : KEYS) + chunk * 1024 + (key - first) * 16;
  if (key < split.keys && key >= first && key < first + 64) store_shared(to, load_relaxed(from));
}

struct Softmax {  // of this thread's two rows
  float highest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};

  // Logits become weights; what was summed before must shrink.
  __device__ __forceinline__ void update(float (&logits)[32], float (&acc)[64], int lane,
                                         int keys_left) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = highest[i];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& logit = logits[j / 2 * 4 + 2 * i + j % 2];
        bool valid = j / 2 * 8 + 2 * (lane % 4) + j % 2 < keys_left;
        logit = valid ? logit * LOGIT_SCALE : -infinity();
        top = fmaxf(top, logit);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float base = top == -infinity() ? 0.0f : top;
      float shrink = exp2_fast(highest[i] - base);
      highest[i] = top;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& logit = logits[j / 2 * 4 + 2 * i + j % 2];
        logit = exp2_fast(logit - base);
        total[i] += logit;
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) acc[j / 2 * 4 + 2 * i + j % 2] *= shrink;
    }
  }
};

// Both groups compute all weights; each averages half of the dimensions.
__device__ __forceinline__ void attend_block(const Block& b, Softmax& softmax, float (&acc)[64],
                                             int keys_left) {
  float logits[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) logits[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    Bf16::mma(logits, descriptor(b.shared + OPERANDS + k * 2 * ROWS * 16, ROWS * 16, 128),
              descriptor(b.shared + KEYS + k * 2048, 1024, 128));
  }
  wgmma_commit();
  wgmma_wait<0>();
  softmax.update(logits, acc, b.lane, keys_left);
  u32 weights[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = pack_bf16(logits[2 * i], logits[2 * i + 1]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    mma_weights(acc, weights[k],
                descriptor(b.shared + VALUES + b.group * 16384 + k * 256, 128, 1024));
  }
  wgmma_commit();
  wgmma_wait<0>();
}

__device__ __forceinline__ void attend(Block& b, const Split& split, char* set,
                                       const char* keys, const char* values) {
  constexpr int QUERIES = HEAD * 2 * ROWS;
  if (b.thread == 0) {
    b.await(QUERY + split.head, HEAD / QKV_ROWS);
    fence_copies();
    b.fetch(PIECES - 1, OPERANDS, set + QKV + split.head * QUERIES, QUERIES);
    b.await(KEYS_VALUES, 2 * HEAD / QKV_ROWS);
  }
  all_consumers();
  Softmax softmax;
  float acc[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
  for (int first = 0; first == 0 || first < split.keys; first += 64) {
    if (first) {
      all_consumers();
      fetch_prefix(b, split, keys, values, first);
    }
    fetch_actions(b, split, set, first);
    copy_async_wait();
    fence_async_proxy();
    all_consumers();
    if (first == 0) b.wait_for(PIECES - 1);
    __syncwarp();
    attend_block(b, softmax, acc, split.keys - first);
  }

  // Through this group's half of the values, which only it has read, to whole lines of the set.
  const u32 tile = b.shared + VALUES + b.group * 16384;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = softmax.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    int row = b.row + 8 * i;
    int place = (split.head * ROWS + row) * KEY_SPLITS + b.index % KEY_SPLITS;
    if (row < ROWS && b.group == 0 && b.lane % 4 == 0) {
      store_relaxed(set + LOG_SUMS + place * 4, __float_as_uint(softmax.highest[i] + log2f(total)));
    }
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      store_shared(tile + row * 256 + (g ^ row % 8) * 16 + b.lane % 4 * 4,
                   pack_bf16(acc[4 * g + 2 * i] * inverse, acc[4 * g + 2 * i + 1] * inverse));
    }
  }
  named_barrier(2 + b.group, 128);
  for (int item = b.thread % 128; item < ROWS * 16; item += 128) {
    int row = item / 16, chunk = item % 16;
    long place = (split.head * ROWS + row) * KEY_SPLITS + b.index % KEY_SPLITS;
    *reinterpret_cast<uint4*>(set + AVERAGES + place * (HEAD * 2) + b.group * 256 + chunk * 16) =
        load_shared(tile + row * 256 + (chunk ^ row % 8) * 16);
  }
  b.publish(AVERAGE + split.head);
}

// The splits' averages of one row of a head, weighted by their sums; four columns a thread.
__device__ __forceinline__ void merge_row(const Block& b, char* set, float inverse_scale, int head,
                                          int row) {
  int place = (head * ROWS + row) * KEY_SPLITS, column = b.thread % 64;
  const uint4* log_sums = reinterpret_cast<const uint4*>(set + LOG_SUMS) + place / 4;
  const uint2* averages = reinterpret_cast<const uint2*>(set + AVERAGES) + long(place) * 64;
  uint4 l[4];
  uint2 v[KEY_SPLITS];
  load(l, log_sums, 0, 1);
  load(v, averages, column, 64);

  float weight[KEY_SPLITS], highest = -infinity(), total = 0.0f;
#pragma unroll
  for (int s = 0; s < KEY_SPLITS; ++s) {
    const uint4 four = l[s / 4];
    const u32 words[4] = {four.x, four.y, four.z, four.w};
    weight[s] = __uint_as_float(words[s % 4]);
    highest = fmaxf(highest, weight[s]);
  }
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < KEY_SPLITS; ++s) {
    float w = exp2_fast(weight[s] - highest);
    total += w;
    sum[0] += w * __uint_as_float(v[s].x << 16);
    sum[1] += w * __uint_as_float(v[s].x & 0xFFFF0000u);
    sum[2] += w * __uint_as_float(v[s].y << 16);
    sum[3] += w * __uint_as_float(v[s].y & 0xFFFF0000u);
  }
  float inverse = 1.0f / total;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] *= inverse;
  publish(set + MERGED, row, head * HEAD + 4 * column, sum, inverse_scale);
}

// Every 16th row of a head, 64 threads a row.
__device__ __forceinline__ void merge(const Block& b, char* set, float inverse_scale) {
  int head = b.index / KEY_SPLITS, row = b.index % KEY_SPLITS + b.thread / 64 * KEY_SPLITS;
  if (b.thread == 0) b.await(AVERAGE + head, KEY_SPLITS);
  all_consumers();
  if (row < ROWS) merge_row(b, set, inverse_scale, head, row);
  b.publish(MERGE + head);
}

}  // namespace
