// A norm of rows of D numbers, to which partial products are added first. A warp has a row.
#include "hopper.cuh"

namespace {

using namespace hopper;

constexpr int CHUNKS = D / 8, MINE = (CHUNKS + 31) / 32;  // of eight numbers, of a row and of a lane
static_assert((1 + LAYER) * D * 4 <= SHARED_BYTES, "the launcher allocates what the kernel uses");

// The i-th chunk of a lane, if the row has one.
__device__ __forceinline__ int chunk(int i) { return threadIdx.x % 32 + 32 * i; }
__device__ __forceinline__ bool there(int i) {
  return 32 * (i + 1) <= CHUNKS || chunk(i) < CHUNKS;
}

// A number for each column in shared memory: first halves of chunks, then the others, so that lanes
// read all banks.
struct Columns {
  float4* quads;

  __device__ __forceinline__ void copy(const float* from) const {
    for (int i = threadIdx.x; i < D / 4; i += THREADS) {
      quads[i % 2 * CHUNKS + i / 2] = reinterpret_cast<const float4*>(from)[i];
    }
  }
  __device__ __forceinline__ void load(int chunk, float (&v)[8]) const {
    *reinterpret_cast<float4*>(v) = quads[chunk];
    *reinterpret_cast<float4*>(v + 4) = quads[CHUNKS + chunk];
  }
};

// A lane's chunks of a row; zeros where the row has ended.
struct Row {
  float v[MINE][8] = {};

  __device__ __forceinline__ void add(const uint4 (&row)[MINE], float factor) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      const u32 words[4] = {row[i].x, row[i].y, row[i].z, row[i].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[i][j] = fmaf(j % 2 ? high_bf16(words[j / 2]) : low_bf16(words[j / 2]), factor, v[i][j]);
      }
    }
  }
  __device__ __forceinline__ void set(const float* columns) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      if (!there(i)) continue;
      const float4* from = reinterpret_cast<const float4*>(columns) + 2 * chunk(i);
      *reinterpret_cast<float4*>(v[i]) = from[0];
      *reinterpret_cast<float4*>(v[i] + 4) = from[1];
    }
  }

  __device__ __forceinline__ float mean() const {
    return over_row([&](float v) { return v; });
  }
  __device__ __forceinline__ float mean_square(float centre) const {
    return over_row([&](float v) { return (v - centre) * (v - centre); });
  }
  template <typename Term>
  __device__ __forceinline__ float over_row(Term term) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      if (!there(i)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) sum += term(v[i][j]);
    }
    return sum_over_warp(sum) * (1.0f / D);
  }
};

__device__ __forceinline__ void load(uint4 (&to)[MINE], const char* row) {
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    to[i] = make_uint4(0, 0, 0, 0);
    if (there(i)) to[i] = reinterpret_cast<const uint4*>(row)[chunk(i)];
  }
}

}  // namespace

// x, out: (m, D), x with partials (SPLITS, m, D) added: alpha times their sum, and partials_bias. kept: gets
// what is normed, maybe x itself, if it is not null. LAYER: LayerNorm with `bias`, else RMSNorm. valid: the
// rows that are.
// One block a multiprocessor: for more, the compiler saves registers, and each load is waited for.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    row_norm(const char* x, char* kept, const float* weight, const float* bias, const char* partials,
             const float* alpha, const float* partials_bias, char* out, const float* scale,
             const int* valid, long long m) {
  extern __shared__ __align__(16) char memory[];
  const Columns gains{reinterpret_cast<float4*>(memory)};
  const Columns biases{gains.quads + D / 4};
  const int rows = valid_count(valid, 0, m), row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;

  launch_dependents();
  gains.copy(weight);
  if (LAYER) biases.copy(bias);
  Row sum;
  if (partials_bias) sum.set(partials_bias);
  const float times = alpha ? *alpha : 1.0f, factor = scale ? reciprocal(*scale) : 1.0f;
  __syncthreads();
  wait_for_kernel_before();
  if (row >= rows) return;

  const long begin = long(row) * D * 2;
  uint4 before[MINE], parts[SPLITS + 1][MINE];
  load(before, x + begin);
#pragma unroll
  for (int split = 0; split < SPLITS; ++split) {
    load(parts[split], partials + (split * m + row) * D * 2);
  }
  sum.add(before, 1.0f);
#pragma unroll
  for (int split = 0; split < SPLITS; ++split) sum.add(parts[split], times);
  if (kept) {
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
      if (there(i)) reinterpret_cast<uint4*>(kept + begin)[chunk(i)] = eight_bf16(sum.v[i]);
    }
  }

  const float mean = LAYER ? sum.mean() : 0.0f;
  const float inverse = rsqrtf(sum.mean_square(mean) + float(EPSILON));
#pragma unroll
  for (int i = 0; i < MINE; ++i) {
    if (!there(i)) continue;
    float v[8], gain[8], more[8] = {};
    gains.load(chunk(i), gain);
    if (LAYER) biases.load(chunk(i), more);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = fmaf((sum.v[i][j] - mean) * inverse, gain[j], more[j]);
    store_eight<OUT_FP8>(out + long(row) * D * (OUT_FP8 ? 1 : 2), chunk(i), v, factor);
  }
}
