// How blocks hand activations to each other: a word is its own flag.
//
// Every exchanged buffer is all ones before it is written. No number that the kernel writes looks
// like that (a NaN of the conversions is 0x7F…), so a reader polls the data itself, and neither
// fences nor flags lie between a store and the load that sees it. There are two sets of buffers,
// for even and odd layers; `Janitor` makes a set all ones again while the other is in use.
#pragma once
#include "hopper.cuh"

namespace exchange {
using namespace hopper;

constexpr int ROWS = HORIZON;
constexpr int BLOCKS = 128;
constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, HEAD = 256;
constexpr int BYTES = FP8 ? 1 : 2;     // of an operand
constexpr int CHUNK = 16 / BYTES;      // operands in 16 bytes
constexpr int KEY_SPLITS = BLOCKS / HEADS;
constexpr int K_SPLITS = 8;            // of the out and down projections

// Operands of products are stored as (chunk of K, row, 16 bytes), like in shared memory.
constexpr long X = 0, X2 = X + ROWS * WIDTH * BYTES;
constexpr long QKV = X2 + ROWS * WIDTH * BYTES;                          // bf16, head by head
constexpr long AVERAGES = QKV + ROWS * (HEADS + 2) * HEAD * 2;           // bf16 (head, row, split, k)
constexpr long LOG_SUMS = AVERAGES + long(ROWS) * HEADS * KEY_SPLITS * HEAD * 2;  // (head, row, split)
constexpr long MERGED = LOG_SUMS + ROWS * HEADS * KEY_SPLITS * 4;
constexpr long OUT = MERGED + ROWS * HEADS * HEAD * BYTES;               // fp32 (split, row, d)
constexpr long HIDDEN = OUT + long(K_SPLITS) * ROWS * WIDTH * 4;
constexpr long DOWN = HIDDEN + ROWS * MLP * BYTES;                       // fp32 (split, row, d)
constexpr long SET = DOWN + long(K_SPLITS) * ROWS * WIDTH * 4;
static_assert(SET == SET_BYTES, "the launcher allocates what the kernel uses");

struct Watchdog {
#ifdef WATCHDOG
  long long start = clock64();
  __device__ void check() {
    if (clock64() - start > 2000000000ll) __trap();
  }
#else
  __device__ void check() {}
#endif
};

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  Watchdog watchdog;
  while (!mbarrier_passed(barrier, parity)) watchdog.check();
}

__device__ __forceinline__ bool written(uint4 v) {
  return v.x != ~0u && v.y != ~0u && v.z != ~0u && v.w != ~0u;
}
__device__ __forceinline__ bool written(uint2 v) { return v.x != ~0u && v.y != ~0u; }

// Loads items first, first + stride, … below count; absent ones become zeros.
template <int LOADS, typename T>
__device__ __forceinline__ void load(T (&v)[LOADS], const T* from, int first, int stride,
                                     int count) {
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    int item = first + i * stride;
    v[i] = item < count ? load_relaxed(from + item) : T();
  }
}

template <int LOADS, typename T>
__device__ __forceinline__ bool all_written(const T (&v)[LOADS]) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < LOADS; ++i) all = all && written(v[i]);
  return __all_sync(~0u, all);
}

// Loads again until everything is there. Waiting polls one item only, to leave L2 to others.
template <int LOADS, typename T>
__device__ __forceinline__ void settle(T (&v)[LOADS], const T* from, int first, int stride,
                                       int count) {
  Watchdog watchdog;
  while (!all_written(v)) {
    while (!__all_sync(~0u, first >= count || written(load_relaxed(from + first)))) watchdog.check();
    load(v, from, first, stride, count);
    watchdog.check();
  }
}

// Items of an operand to shared memory, where 64 rows of a chunk are 1024 bytes.
template <int LOADS>
__device__ __forceinline__ void stage(const uint4 (&v)[LOADS], u32 to, int first, int stride,
                                      int count) {
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    int item = first + i * stride;
    if (item < count) store_shared(to + item / ROWS * 1024 + item % ROWS * 16, v[i]);
  }
}

__device__ __forceinline__ void clear(char* set, int first, int stride) {
  const uint4 ones = make_uint4(~0u, ~0u, ~0u, ~0u);
  for (long i = first; i < SET / 16; i += stride) reinterpret_cast<uint4*>(set)[i] = ones;
}

// All blocks of the launch meet; the counter is never reset. Called by one thread of each block.
__device__ __forceinline__ void meet(u32* counter) {
  Watchdog watchdog;
  __threadfence();
  u32 target = (atomicAdd(counter, 1) / BLOCKS + 1) * BLOCKS, now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    watchdog.check();
  } while (static_cast<int>(now - target) < 0);
}

// Words of an operand: four neighbours of one row.
__device__ __forceinline__ void publish(char* operand, int row, int column, const float (&v)[4],
                                        float inverse_scale) {
  char* to = operand + (column / CHUNK * ROWS + row) * 16 + column % CHUNK * BYTES;
  if (FP8) {
    store_relaxed(to, pack_e4m3(v[0] * inverse_scale, v[1] * inverse_scale, v[2] * inverse_scale,
                                v[3] * inverse_scale));
  } else {
    store_relaxed(to, pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
  }
}

}  // namespace exchange
