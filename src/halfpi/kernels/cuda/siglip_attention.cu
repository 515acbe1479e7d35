// Attention of SigLIP: a block has ROWS, 64 or 128, of an image's 256 queries of a head, and all of its keys.
#include "siglip.cuh"

namespace {

using namespace siglip;

constexpr int CHUNKS = HEAD / 8;  // of 16 bytes
constexpr int THREADS = 2 * ROWS;  // a group of 128 has 64 rows
constexpr int BYTES = FP8 ? 1 : 2;                         // of an output
constexpr int KEYS = 0, VALUES = KEYS + OPERAND_BYTES, QUERIES = VALUES + OPERAND_BYTES;
constexpr int QUERY_CHUNK = ROWS * 16;  // queries are (chunk, row, 16 bytes)
constexpr int STAGED = QUERIES + (CHUNKS + 1) * QUERY_CHUNK, BIAS = STAGED + ROWS * HEAD * BYTES;
constexpr int BARRIERS = BIAS + HEAD * 4;
static_assert(BARRIERS + 16 <= SHARED_BYTES, "the launcher allocates what the kernel uses");

struct Operand {
  u32 at, barrier;

  __device__ __forceinline__ void copy(const TensorMap& most, const TensorMap& rest, int column,
                                       int row) const {
    mbarrier_expect(barrier, OPERAND_BYTES);
    tensor_copy(at, most, column, row, barrier);
    tensor_copy(at + MOST_BYTES, rest, column + MOST, row, barrier);
  }
};

__device__ __forceinline__ u32 biased(u32 word, float low, float high) {
  return pack_bf16(low_bf16(word) + low, high_bf16(word) + high);
}

// Chunks of queries that a thread has. Eight rows of a chunk lie side by side in all banks.
struct Queries {
  static constexpr int COUNT = (ROWS * CHUNKS + THREADS - 1) / THREADS;
  uint4 words[COUNT];

  __device__ static __forceinline__ int row(int i) {
    return (threadIdx.x + i * THREADS) / (8 * CHUNKS) * 8 + threadIdx.x % 8;
  }
  __device__ static __forceinline__ int chunk(int i) {
    return (threadIdx.x + i * THREADS) / 8 % CHUNKS;
  }
  __device__ __forceinline__ void load(const char* from, long stride) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (row(i) >= ROWS) continue;
      words[i] = *reinterpret_cast<const uint4*>(from + row(i) * stride + chunk(i) * 16);
    }
  }
  __device__ __forceinline__ void store(u32 to, const float* bias) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (row(i) >= ROWS) continue;
      const float4* b = reinterpret_cast<const float4*>(bias) + chunk(i) * 2;
      const float4 first = b[0], last = b[1];
      store_shared(to + chunk(i) * QUERY_CHUNK + row(i) * 16,
                   make_uint4(biased(words[i].x, first.x, first.y),
                              biased(words[i].y, first.z, first.w),
                              biased(words[i].z, last.x, last.y),
                              biased(words[i].w, last.z, last.w)));
    }
  }
};

__device__ __forceinline__ void multiply(float (&logits)[TOKENS / 2], u32 queries, u32 keys) {
  const Matrix rows(queries, QUERY_CHUNK, 128);
  const SwizzledLines<2 * MOST> most(keys);
  const SwizzledLines<2 * REST> rest(keys + MOST_BYTES);
  settle(logits);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < MOST / 8; k += 2) {
    Bf16::mma(logits, rows.at(k * QUERY_CHUNK), most.at(k * 16));
  }
  Bf16::mma(logits, rows.at(MOST / 8 * QUERY_CHUNK), rest.at(0));
  wgmma_commit();
}

// Rows of a group, which lie side by side in shared memory, to where heads are.
__device__ __forceinline__ void copy_out(char* to, const char* from, int heads) {
  using Piece = conditional<FP8, uint2, uint4>::type;  // of a row, eight numbers
#pragma unroll
  for (int i = threadIdx.x % 128; i < 64 * CHUNKS; i += 128) {
    char* at = to + long(i / CHUNKS) * heads * HEAD * BYTES + i % CHUNKS * 8 * BYTES;
    *reinterpret_cast<Piece*>(at) = reinterpret_cast<const Piece*>(from)[i];
  }
}

}  // namespace

// The stride of a token's queries is in bytes; images and heads lie side by side.
extern "C" __global__ void __launch_bounds__(THREADS, 1) siglip_attention(
    const char* query, long long stride, const __grid_constant__ TensorMap keys_most,
    const __grid_constant__ TensorMap keys_rest, const __grid_constant__ TensorMap values_most,
    const __grid_constant__ TensorMap values_rest, const float* bias, char* out,
    const float* scale) {
  extern __shared__ __align__(1024) char memory[];
  const u32 shared = shared_address(memory);
  const int thread = threadIdx.x, group = uniform(thread / 128);
  const int head = blockIdx.y, heads = gridDim.y;
  const int image = blockIdx.z * TOKENS, first = image + blockIdx.x * ROWS;  // rows of tokens
  const Operand keys{shared + KEYS, shared + BARRIERS};
  const Operand values{shared + VALUES, shared + BARRIERS + 8};

  launch_dependents();
  float* query_bias = reinterpret_cast<float*>(memory + BIAS);
  if (thread < HEAD) query_bias[thread] = bias ? bias[head * HEAD + thread] : 0.0f;
  if (thread < ROWS) {
    const u32 last = shared + QUERIES + CHUNKS * QUERY_CHUNK;
    store_shared(last + thread * 16, make_uint4(0, 0, 0, 0));
  }
  if (thread == 0) {
    prefetch_map(keys_most), prefetch_map(keys_rest);
    prefetch_map(values_most), prefetch_map(values_rest);
    mbarrier_init(keys.barrier, 1);
    mbarrier_init(values.barrier, 1);
    mbarriers_ready();
  }
  const float inverse_scale = FP8 ? reciprocal(*scale) : 1.0f;
  __syncthreads();
  wait_for_kernel_before();

  Queries queries;  // before the copies, behind which they would wait
  queries.load(query + first * stride + head * HEAD * 2, stride);
  if (thread < 32 && elected()) {
    keys.copy(keys_most, keys_rest, head * HEAD, image);
    values.copy(values_most, values_rest, head * HEAD, image);
  }
  queries.store(shared + QUERIES, query_bias);
  fence_async_proxy();
  __syncthreads();
  wait(keys.barrier, 0);
  float logits[TOKENS / 2] = {};
  multiply(logits, shared + QUERIES + group * 64 * 16, keys.at);
  wgmma_wait<0>();
  settle(logits);

  Softmax softmax;
  softmax.add<64>(logits, values.at, [&] { wait_together(values.barrier, 0); });
  const int staged = STAGED + group * 64 * HEAD * BYTES;
  softmax.store<FP8>(shared + staged, inverse_scale);
  named_barrier(1 + group, 128);
  copy_out(out + (long(first + group * 64) * heads + head) * HEAD * BYTES, memory + staged, heads);
}
