// What the parts of the kernel share: constants, arguments, and a thread's view of its block.
#pragma once
#include "exchange.cuh"

using namespace exchange;

namespace {

constexpr int CONSUMERS = 256, THREADS = 384;
constexpr int SLOTS = 10, UNIT = 8192;
constexpr int QKV_ROWS = 32, QKV_BLOCKS = (HEADS + 2) * HEAD / QKV_ROWS;
constexpr int QKV_UNITS = WIDTH / CHUNK / 16, OUT_UNITS = HEADS * HEAD / K_SPLITS / CHUNK / 8;
constexpr int WIDE_UNITS = WIDTH / CHUNK / 8, DOWN_UNITS = MLP / K_SPLITS / CHUNK / 8;
constexpr int LAYER_UNITS = QKV_UNITS + OUT_UNITS + WIDE_UNITS + DOWN_UNITS;
constexpr float EPS = 1e-6f;
constexpr float LOGIT_SCALE = 0.0625f * 1.44269504f;  // 1/√k · log2 e
using Format = hopper::conditional<FP8, hopper::E4m3, hopper::Bf16>::type;

// Shared memory: operands (keys and values in the second half), ring, scratch, barriers.
constexpr int OPERANDS = 0, KEYS = 65536, VALUES = 98304, RING = 131072;
constexpr int SCRATCH = RING + SLOTS * UNIT, BARRIERS = SCRATCH + 16384;
constexpr int PIECES = 9;  // of operands: at most 8 of a product, and queries
constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * SLOTS, STAGED = EMPTY + 8 * SLOTS;
constexpr int SUMS = (STAGED + 8 * PIECES + 15) / 16 * 16, ACTIONS = SUMS + 64;
constexpr int SHARED = ACTIONS + 128;
static_assert(SHARED <= SHARED_BYTES, "the launcher asks for what the kernel uses");

struct Arguments {
  const char* stream;  // (block, layer, unit, 8192 bytes)
  char* sets;
  u32* counters;
  float* actions;
  const char *keys, *values;
  long long capacity;
  const int *prefix_count, *decided;
  const float *cos, *sin, *modulations, *target, *weights, *gains;
  const float *weight_in, *bias_in, *weight_out, *bias_out;  // weight_in is (a, d)
  const float *input_scales, *weight_scales;
};

struct Scales {  // of the four products of a layer at a step
  float4 input, weight;
  __device__ void load(const Arguments& a, int step, int layer) {
    if (!FP8) return;
    input = reinterpret_cast<const float4*>(a.input_scales)[step * DEPTH + layer];
    weight = reinterpret_cast<const float4*>(a.weight_scales)[layer];
  }
};
#define ALPHA(site) (FP8 ? scales.input.site * scales.weight.site : 1.0f)
#define INVERSE(site) (FP8 ? 1.0f / scales.input.site : 1.0f)

struct Block {
  u32 shared;
  char* scratch;
  int index, thread, group, warp, lane, row;  // warp of the group; first of the two rows of a thread
  int unit = 0;                               // of the ring, the next one
  int layer = 0;                              // over all steps
  int prefix;
  u32 phases = 0;                             // parities of `STAGED`
  u32* counters;

  // All threads of the block have written what `counter` counts.
  __device__ __forceinline__ void publish(int counter) const {
    named_barrier(1, CONSUMERS);
    if (thread == 0) arrive(counters, counter);
  }
  // By one thread: `blocks` have written it in this layer.
  __device__ __forceinline__ void await(int counter, int blocks) const {
    exchange::await(counters, counter, (layer + 1) * blocks);
  }
  // By thread 0: starts copying a piece of operands.
  __device__ __forceinline__ void fetch(int piece, u32 to, const char* from, u32 bytes) const {
    mbarrier_expect(shared + STAGED + 8 * piece, bytes);
    bulk_copy(shared + to, from, bytes, shared + STAGED + 8 * piece);
  }
  __device__ __forceinline__ void wait_for(int piece) {
    wait(shared + STAGED + 8 * piece, phases >> piece & 1);
    phases ^= 1u << piece;
  }

  __device__ float4* exchanged(int of) const {
    return reinterpret_cast<float4*>(scratch) + of * 512 + thread % 128;
  }
};

__device__ __forceinline__ void all_consumers() { named_barrier(1, CONSUMERS); }

}  // namespace
