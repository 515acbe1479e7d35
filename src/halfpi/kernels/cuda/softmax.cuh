// Of logits as a product of 64 rows leaves them in registers: a thread has two rows, the second eight
// further on, and its quad has the rest of them.
#pragma once
#include "hopper.cuh"

namespace hopper {

// Raises `top` to logits (64 rows, N keys), of which the first `valid` count.
template <int N>
__device__ __forceinline__ void find_top(float (&logits)[N / 2], int lane, int valid,
                                         float (&top)[2]) {
#pragma unroll
  for (int chunk = 0; chunk < N / 8; ++chunk) {
    if (valid >= 8 * (chunk + 1)) continue;  // as most do
#pragma unroll
    for (int i = 4 * chunk; i < 4 * (chunk + 1); ++i) {
      if (8 * chunk + lane % 4 * 2 + i % 2 >= valid) logits[i] = -infinity();
    }
  }
#pragma unroll
  for (int i = 0; i < N / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], logits[i]);
}

__device__ __forceinline__ float over_quad(float v, bool maximum) {
#pragma unroll
  for (int i = 1; i < 4; i *= 2) {
    float other = __shfl_xor_sync(~0u, v, i);
    v = maximum ? fmaxf(v, other) : v + other;
  }
  return v;
}

// Weights of logits times `scale` less the `base` of their row, as bf16 in chunks of (64 rows, 16
// bytes) from `to` on, which is this thread's place in the first, and into `total`.
template <int N>
__device__ __forceinline__ void store_weights(const float (&logits)[N / 2], float scale,
                                              const float (&base)[2], u32 to, float (&total)[2]) {
#pragma unroll
  for (int i = 0; i < N / 2; i += 2) {
    const int row = i / 2 % 2;
    float even = exp2_fast(fmaf(logits[i], scale, -base[row]));
    float odd = exp2_fast(fmaf(logits[i + 1], scale, -base[row]));
    total[row] += even + odd;
    store_shared(to + i / 4 * 1024 + row * 128, pack_bf16(even, odd));
  }
}

// Averages of eight dimensions of a row over parts of the keys become one. log_sums: of this row, of
// a part 64 from those of the next.
template <int PARTS>
__device__ __forceinline__ void merge_parts(const float* log_sums, u32 averages, u32 stride,
                                            float (&sum)[8]) {
  float log_sum[PARTS], highest = -infinity(), total = 0.0f;
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    log_sum[s] = log_sums[s * 64];
    highest = fmaxf(highest, log_sum[s]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    float w = exp2_fast(log_sum[s] - highest);
    total += w;
    const uint4 v = load_shared(averages + s * stride);
    sum[0] += w * low_bf16(v.x), sum[1] += w * high_bf16(v.x);
    sum[2] += w * low_bf16(v.y), sum[3] += w * high_bf16(v.y);
    sum[4] += w * low_bf16(v.z), sum[5] += w * high_bf16(v.z);
    sum[6] += w * low_bf16(v.w), sum[7] += w * high_bf16(v.w);
  }
  const float inverse = reciprocal(total);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] *= inverse;
}

}  // namespace hopper
