// How blocks hand activations to each other: through L2, with a counter for every kind of buffer.
//
// A writer's threads meet and one of them adds 1 with release; a reader waits until all writers of
// the layer did, then the copy engine or ordinary loads fetch the data. There are two sets of
// buffers, for even and odd layers: once a block writes a set again, everybody has read it, because
// whole exchanges of the layer in between depend on that.
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

// Operands of products are stored as (chunk of K, row, 16 bytes), as wgmma reads shared memory.
constexpr long X = 0, X2 = X + ROWS * WIDTH * BYTES;
constexpr long QKV = X2 + ROWS * WIDTH * BYTES;                          // bf16, head by head
constexpr long AVERAGES = QKV + ROWS * (HEADS + 2) * HEAD * 2;  // bf16 (head, row, split, k)
constexpr long LOG_SUMS = AVERAGES + long(ROWS) * HEADS * KEY_SPLITS * HEAD * 2;  // as above
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

// Counters, 128 bytes apart, and how many blocks arrive at each in a layer.
enum Counter { ROWS_1, ROWS_2, SUMS_1, SUMS_2, KEYS_VALUES, QUERY, AVERAGE = QUERY + HEADS,
               MERGE = AVERAGE + HEADS, GATED = MERGE + HEADS, COUNTERS = GATED + K_SPLITS };

__device__ __forceinline__ u32* place(u32* counters, int counter) { return counters + 32 * counter; }

// By one thread, after a barrier of all that wrote.
__device__ __forceinline__ void arrive(u32* counters, int counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(place(counters, counter)) : "memory");
}

__device__ __forceinline__ void await(u32* counters, int counter, u32 arrivals) {
  Watchdog watchdog;
  u32 now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(now)
                 : "l"(place(counters, counter))
                 : "memory");
    watchdog.check();
  } while (now < arrivals);
}

// Loads items first, first + stride, … : LOADS of them.
template <int LOADS, typename T>
__device__ __forceinline__ void load(T (&v)[LOADS], const T* from, int first, int stride) {
#pragma unroll
  for (int i = 0; i < LOADS; ++i) v[i] = load_relaxed(from + first + i * stride);
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
