// All denoise steps of the action expert in one launch; see expert_steps.py for the mathematics.
//
// 128 blocks, one an SM. Warps 0…7 compute, as two warpgroups that share the K of a product between
// them; warp 8 streams the block's weights into a ring.
#include "attention.cuh"
#include "product.cuh"
#include "row.cuh"

namespace {

__device__ __forceinline__ void stream_weights(const Arguments& a, u32 shared, int block) {
  const int skipped = block < QKV_BLOCKS ? 0 : QKV_UNITS;
  const char* from = a.stream + long(block) * DEPTH * LAYER_UNITS * UNIT;
  const u64 policy = policy_evict_first();
  int slot = 0;
  u32 parity = 1;  // of the slot before this turn: the first turn does not wait
  for (int step = 0; step < STEPS; ++step) {
    for (int layer = 0; layer < DEPTH; ++layer) {
      for (int unit = skipped; unit < LAYER_UNITS; ++unit) {
        wait(shared + EMPTY + 8 * slot, parity);
        mbarrier_expect(shared + FULL + 8 * slot, UNIT);
        bulk_copy(shared + RING + slot * UNIT, from + long(layer * LAYER_UNITS + unit) * UNIT, UNIT,
                  shared + FULL + 8 * slot, policy);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
    }
  }
}

__device__ __forceinline__ void compute(const Arguments& a, Block& b, float* sums, float* actions) {
  constexpr int NORMS = 2 * DEPTH + 1;
  const int row = BLOCKS - 1 - b.index;
  const bool has_row = row < ROWS, decided = row < *a.decided;
  const Split split(b);
  QkvRope qkv;
  qkv.load(b, a);
  Row x;
  Scales scales;
  float y[4], result[16];
  if (has_row && b.thread < ACTION_DIM) actions[b.thread] = a.actions[row * ACTION_DIM + b.thread];
  all_consumers();

  for (int step = 0; step < STEPS; ++step) {
    const float* modulations = a.modulations + long(decided ? STEPS : step) * NORMS * 3 * WIDTH;
    if (has_row) x.embed(b, a, actions);
    for (int layer = 0; layer < DEPTH; ++layer, ++b.layer) {
      char* set = a.sets + b.layer % 2 * SET;
      char* last_set = a.sets + (b.layer + 1) % 2 * SET;
      const float* modulation = modulations + 2 * layer * 3 * WIDTH;
      const char* keys = a.keys + layer * a.capacity * HEAD * 2;
      const char* values = a.values + layer * a.capacity * HEAD * 2;
      scales.load(a, step, layer);
      if (FP8) fetch_prefix(b, split, keys, values, 0);  // E4M3 operands leave the space for them
      if (has_row) {
        x.load(b, layer ? modulation - 3 * WIDTH : modulation, modulation);
        if (layer && b.thread == 0) exchange::await(b.counters, SUMS_2, b.layer * BLOCKS);
        if (layer) x.add(b, last_set + DOWN, row);
        x.norm(b, sums, y);
        publish(set + X, row, 4 * b.thread, y, INVERSE(x));
        b.publish(ROWS_1);
      }
      if (b.index < QKV_BLOCKS) qkv.run(b, set, ALPHA(x));
      else all_consumers();
      if (!FP8) fetch_prefix(b, split, keys, values, 0);
      attend(b, split, set, keys, values);
      merge(b, set, INVERSE(y));
      const int k = b.index % K_SPLITS;
      product<64, 8, OUT_UNITS>(result, b, set + MERGED + k * OUT_UNITS * 128 * ROWS, MERGE + k,
                                KEY_SPLITS);
      publish_partial(result, b, set + OUT, ALPHA(y));
      b.publish(SUMS_1);
      if (has_row) {
        x.load(b, modulation, modulation + 3 * WIDTH);
        if (b.thread == 0) b.await(SUMS_1, BLOCKS);
        x.add(b, set + OUT, row);
        x.norm(b, sums, y);
        publish(set + X2, row, 4 * b.thread, y, INVERSE(z));
        b.publish(ROWS_2);
      }
      geglu(b, set, ALPHA(z), INVERSE(w));
      product<64, 8, DOWN_UNITS>(result, b, set + HIDDEN + k * DOWN_UNITS * 128 * ROWS, GATED + k,
                                 BLOCKS / K_SPLITS);
      publish_partial(result, b, set + DOWN, ALPHA(w));
      b.publish(SUMS_2);
    }
    if (has_row) {
      const float* last = modulations + (NORMS - 1) * 3 * WIDTH;
      x.load(b, last - 3 * WIDTH, last);
      if (b.thread == 0) exchange::await(b.counters, SUMS_2, b.layer * BLOCKS);
      x.add(b, a.sets + (b.layer + 1) % 2 * SET + DOWN, row);
      x.norm(b, sums, y);
      x.move(b, a, y, actions, step, row, decided);
    }
  }
  if (has_row && b.thread < ACTION_DIM) a.actions[row * ACTION_DIM + b.thread] = actions[b.thread];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_steps(
    const char* stream, char* sets, u32* counters, float* actions, const char* keys,
    const char* values, long long capacity, const int* prefix_count, const int* decided,
    const float* cos, const float* sin, const float* modulations, const float* target,
    const float* weights, const float* gains, const float* weight_in, const float* bias_in,
    const float* weight_out, const float* bias_out, const float* input_scales,
    const float* weight_scales) {
  extern __shared__ __align__(1024) char memory[];
  const Arguments a{stream, sets, counters, actions, keys, values, capacity, prefix_count, decided,
                    cos, sin, modulations, target, weights, gains, weight_in, bias_in, weight_out,
                    bias_out, input_scales, weight_scales};
  const u32 shared = shared_address(memory);
  const int thread = threadIdx.x, block = blockIdx.x;
  if (thread == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared + FULL + 8 * i, 1);
      mbarrier_init(shared + EMPTY + 8 * i, 4);
    }
    for (int i = 0; i < PIECES; ++i) mbarrier_init(shared + STAGED + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (thread < CONSUMERS) {
    more_registers<232>();
    if (block == 0 && thread < COUNTERS) *place(counters, thread) = 0;
    all_consumers();
    if (thread == 0) meet(place(counters, COUNTERS));
    all_consumers();
    Block b;
    b.shared = shared;
    b.scratch = memory + SCRATCH;
    b.index = block;
    b.counters = counters;
    b.thread = thread;
    b.group = thread / 128;
    b.warp = thread / 32 % 4;
    b.lane = thread % 32;
    b.row = 16 * b.warp + b.lane / 4;
    b.prefix = *prefix_count;
    float* sums = reinterpret_cast<float*>(memory + SUMS);
    compute(a, b, sums, reinterpret_cast<float*>(memory + ACTIONS));
  } else {
    fewer_registers<40>();
    if (thread == CONSUMERS) stream_weights(a, shared, block);
  }
}
