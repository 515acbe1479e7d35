// All denoise steps of the action expert in one launch; see expert_steps.py for the mathematics.
//
// Eight clusters of eight blocks, one block an SM. A cluster has one head, and a share of the hidden
// activations, which its blocks exchange from shared memory to shared memory; only sums over
// clusters, and the rows that they update, go through L2.
#include "attention.cuh"
#include "fetch.cuh"
#include "product.cuh"
#include "row.cuh"

namespace {

// A layer has two halves, attention and MLP, which begin with a norm and end with an update of the
// rows. One more norm follows the last. The code is this short because instructions are fetched anew
// in every layer.
__device__ __forceinline__ void compute(const Arguments& a, Block& b) {
  constexpr int HALVES = 2 * DEPTH;
  float* actions = b.floats(ACTIONS);
  Row x;
  float y[4];
  if (b.has_row() && b.thread < ACTION_DIM) {
    actions[b.thread] = a.actions[b.index * ACTION_DIM + b.thread];
  }
  all_consumers();
  for (int step = 0; step < STEPS; ++step) {
    if (b.has_row()) x.embed(b, a, actions);
#pragma unroll 1
    for (int half = 0;; ++half) {
      const bool mlp = half % 2, last = half == HALVES;
      b.locate();
      const Scale first(a, step, last ? 0 : half, 0);
      if (b.has_row()) {
        x.load(b, a, step, half);
        if (half) x.add(b, !mlp);
        x.norm(b, y);
        if (!last) x.publish(b, y, first.inverse());
      }
      if (last) break;
      b.locate();
      if (mlp) {
        geglu(b, first.alpha(), Scale(a, step, half, 1).inverse());
      } else {
        qkv(b, a, first.alpha());
        b.locate();
        attend(b);
        b.locate();
        merge(b, Scale(a, step, half, 1).inverse());
      }
      b.locate();
      project(b, mlp, Scale(a, step, half, 1).alpha());
      b.layer += mlp;
    }
    if (b.has_row()) x.move(b, a, y, actions, step);
  }
  if (b.has_row() && b.thread < ACTION_DIM) {
    a.actions[b.index * ACTION_DIM + b.thread] = actions[b.thread];
  }
}

__device__ __forceinline__ void init_barriers(u32 shared) {
  for (int i = 0; i < SLOTS; ++i) {
    mbarrier_init(shared + FULL + 8 * i, 1);
    mbarrier_init(shared + EMPTY + 8 * i, 4 * GROUPS);
  }
  for (int i = X_FULL; i <= RECENT_FULL; i += 8) mbarrier_init(shared + i, 1);
  mbarrier_init(shared + RECENT_STORED, STORING);
  mbarrier_init(shared + X_FREE, PEERS);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace

extern "C" __global__ void __cluster_dims__(PEERS, 1, 1) __launch_bounds__(THREADS, 1) expert_steps(
    const char* stream, char* buffers, char* cache, u32* counters, float* actions,
    const char* keys, const char* values, long long capacity, const int* prefix_count,
    const int* decided, const float* cos, const float* sin, const float* modulations,
    const float* target, const float* weights, const float* gains, const float* weight_in,
    const float* bias_in, const float* weight_out, const float* bias_out,
    const float* input_scales, const float* weight_scales) {
  extern __shared__ __align__(1024) char memory[];
  const Arguments a{stream, buffers, cache, counters, actions, keys, values, capacity,
                    prefix_count, decided, cos, sin, modulations, target, weights, gains,
                    weight_in, bias_in, weight_out, bias_out, input_scales, weight_scales};
  Block b;
  b.shared = shared_address(memory);
  b.memory = memory;
  b.buffers = buffers;
  b.counters = counters;
  b.index = blockIdx.x;
  b.head = blockIdx.x / PEERS;
  b.locate();
  b.prefix = uniform(*prefix_count);
  b.decided = uniform(*decided);

  if (b.thread == 0) init_barriers(b.shared);
  if (b.index == 0 && b.thread < COUNTERS) *place(counters, b.thread) = 0;
  if (b.thread < CONSUMERS) lay_out_cache(a, b);
  __syncthreads();
  if (b.thread == 0) meet(place(counters, COUNTERS));
  cluster_barrier();
  fence_copies();

  if (b.group < GROUPS) {
    more_registers<112>();
    compute(a, b);
  } else {
    fewer_registers<32>();
    if (b.warp == 0) stream_units(a, b);
    if (b.warp == 1) fetch_activations(b);
  }
  cluster_barrier();  // peers may still store here, or read from here
}
