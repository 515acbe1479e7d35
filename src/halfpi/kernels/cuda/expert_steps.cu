// All denoise steps of the action expert in one launch; see expert_steps.py for the mathematics.
//
// Eight clusters of eight blocks multiply, one block an SM. A cluster has one head, and a share of
// the hidden activations, which its blocks exchange from shared memory to shared memory; only sums
// over clusters, and the rows that they update, go through L2. More clusters have the rows.
#include "attention.cuh"
#include "fetch.cuh"
#include "product.cuh"
#include "row.cuh"

namespace {

// A layer has two halves, attention and MLP. Each begins with a norm and ends with an update of the
// rows, and one more norm follows the last: that is what blocks with rows do. More than some 120 KB of
// code would have to be fetched anew in every layer.
__device__ __forceinline__ void compute(Block& b, const Arguments& a) {
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll 1
    for (int half = 0; half < 2 * DEPTH; ++half) {
      const bool mlp = half % 2;
      const Scale first(a, step, half, 0), second(a, step, half, 1);
      if (mlp) {
        geglu(b, first, second);
      } else {
        qkv(b, a, first);
        attend(b);
        merge(b, second);
      }
      project(b, mlp, second);
      b.layer += mlp;
    }
  }
}

__device__ __forceinline__ void init_barriers(u32 shared) {
  for (int i = 0; i < SLOTS; ++i) {
    mbarrier_init(shared + FULL + 8 * i, 1);
    mbarrier_init(shared + EMPTY + 8 * i, 4 * GROUPS);
  }
  for (int i = X_FULL; i <= RECENT_FULL; i += 8) mbarrier_init(shared + i, 1);
  mbarrier_init(shared + RECENT_STORED, 128);
  mbarrier_init(shared + X_FREE, PEERS);
  mbarrier_init(shared + SUMS_STORED, PEERS * WARPS);
  mbarriers_ready();
}

}  // namespace

extern "C" __global__ void __cluster_dims__(PEERS, 1, 1) __launch_bounds__(THREADS, 1) expert_steps(
    const char* stream, char* buffers, char* cache, u32* counters, const float* actions,
    float* result, const char* keys, const char* values, long long capacity,
    const int* prefix_count, const int* decided, const float* cos, const float* sin, const float* modulations,
    const float* target, const float* weights, const float* gains, const float* weight_in,
    const float* bias_in, const float* weight_out, const float* bias_out,
    const float* input_scales, const float* weight_scales) {
  extern __shared__ __align__(1024) char memory[];
  const Arguments a{stream, buffers, cache, counters, actions, result, keys, values,
                    capacity, prefix_count, decided, cos, sin, modulations, target, weights,
                    gains, weight_in, bias_in, weight_out, bias_out, input_scales, weight_scales};
  Block b;
  b.shared = shared_address(memory);
  b.memory = memory;
  b.buffers = buffers;
  b.counters = counters;
  b.index = blockIdx.x;
  b.head = blockIdx.x / PEERS;
  b.rank = cluster_rank();
  b.thread = threadIdx.x, b.lane = b.thread % 32;
  b.group = uniform(b.thread / 128), b.warp = uniform(b.thread / 32 % 4);
  b.row = 16 * b.warp + b.lane / 4;
  b.prefix = uniform(*prefix_count);
  b.decided = uniform(*decided);

  if (b.thread == 0) {
    init_barriers(b.shared);
    if (b.index >= BLOCKS) fetch_tables(b, a);
  }
  if (b.index == 0) reset(counters);
  lay_out_first(a, b);
  if (b.thread < 32 && b.index < BLOCKS) blank_recent(b, 0);
  __syncthreads();
  if (b.thread == 0) meet(place(counters, MET));
  cluster_barrier();
  fence_copies();

  if (b.index >= BLOCKS) {
    if (b.thread < CONSUMERS) {
      update_row(b, a);
    } else {
      lay_out_others(a, b);
    }
  } else if (b.group < GROUPS) {
    compute(b, a);
  } else if (b.warp == 0) {
    stream_units(a, b);
  } else if (b.warp == 1) {
    fetch_rows(b);
  } else if (b.warp == 2) {
    fetch_recent(b);
  } else {
    share_pieces(b);
  }
  cluster_barrier();  // peers may still store here, or read from here
}
