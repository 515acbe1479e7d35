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

// What logits times `scale` are less, before they become weights; a row without keys has no highest.
__device__ __forceinline__ float base_of(float highest, float scale) {
  return highest == -infinity() ? 0.0f : highest * scale;
}

// Weights of N logits of a thread, times `scale` less the `base` of their row, as bf16, and into
// `total`.
template <int N>
__device__ __forceinline__ void make_weights(const float* logits, float scale,
                                             const float (&base)[2], u32* weights,
                                             float (&total)[2]) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const int row = i / 2 % 2;
    const float even = exp2_fast(fmaf(logits[i], scale, -base[row]));
    const float odd = exp2_fast(fmaf(logits[i + 1], scale, -base[row]));
    total[row] += even + odd;
    weights[i / 2] = pack_bf16(even, odd);
  }
}

// Weights of logits times `scale` less the `base` of their row, as bf16 in chunks of (64 rows, 16
// bytes) from `to` on, which is this thread's place in the first, and into `total`.
template <int N>
__device__ __forceinline__ void store_weights(const float (&logits)[N / 2], float scale,
                                              const float (&base)[2], u32 to, float (&total)[2]) {
  u32 weights[N / 4];
  make_weights<N / 2>(logits, scale, base, weights, total);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) store_shared(to + i / 2 * 1024 + i % 2 * 128, weights[i]);
}

// For a higher base of the weights of a thread's first or second row.
template <int PARTS>
__device__ __forceinline__ void shrink(float (&average)[PARTS][32], float (&total)[2], int row,
                                       float by) {
  total[row] *= by;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
#pragma unroll
    for (int j = 0; j < 16; ++j) average[part][j / 2 * 4 + 2 * row + j % 2] *= by;
  }
}

// Sums of values in 64 dimensions of both rows, of which COUNT rows are stored, as (chunk, row, 16
// bytes). to(i): this thread's place in the first row of the i-th two chunks. first: the first of its rows.
template <int COUNT, typename To>
__device__ __forceinline__ void store_sums(const float (&sums)[32], int first, To to) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first + 8 * i;
    if (COUNT < 64 && row >= COUNT) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* v = sums + 4 * j + 2 * i;
      store_shared(to(j / 2) + (j % 2 * COUNT + row) * 16, pack_bf16(v[0], v[1]));
    }
  }
}

// Of a row and a part of the keys: the highest logit, scaled, and the sum of the weights, which are
// relative to it.
struct RowPart {
  float highest, total;
};

// Of both rows, by one thread of their quad. to: where the first row's is.
__device__ __forceinline__ void store_row_parts(RowPart* to, int lane, const float (&highest)[2],
                                                float scale, const float (&total)[2]) {
  if (lane % 4) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) to[8 * i] = {highest[i] * scale, total[i]};
}

// A row's sums of values in eight dimensions over PARTS of the keys become an average. rows: from the
// row in a part to the row in the next, of which the sums are `stride` bytes apart.
template <int PARTS>
__device__ __forceinline__ void merge_parts(const RowPart* parts, int rows, u32 sums, u32 stride,
                                            float (&sum)[8]) {
  RowPart part[PARTS];
  float highest = -infinity(), total = 0.0f;
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    part[s] = parts[s * rows];
    highest = fmaxf(highest, part[s].highest);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
#pragma unroll
  for (int s = 0; s < PARTS; ++s) {
    float w = exp2_fast(part[s].highest - highest);
    total += w * part[s].total;
    const uint4 v = load_shared(sums + s * stride);
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
