// How blocks hand activations to each other: within a cluster from shared memory to shared memory,
// between clusters through L2.
//
// Through L2 go sums and rows, and keys and values of the actions.
//
// Sums are words of eight bytes with a mark that tells whether they are new; a reader loads them
// again until all are.
//
// Rows, and keys and values, are copied in bulk. To wait for a release would take too long. So a reader
// looks whether something in the copy is BLANK, and then copies again: at a word of whatever one store of a
// warp fills, which is a line of X or 16 bytes of a sector of keys and values. There are two buffers in turn.
// Who has written to one, and knows that the other is read, makes that BLANK again, and all of it is there
// before he adds to a counter.
//
// Keys and values, and few rows in E4M3, are copied again and again until they have come, from when a reader
// has stored its own, or its cluster its sums; the counter has told before that all which is not new is
// BLANK. Other rows are too large for that: there it tells when a copy is worth its while, which is when a
// row is about to be stored. To see the counter and to start a copy takes about as long as to store.
//
// These counters count on, and nobody counts for an exchange before he has seen that all have counted
// for the one before: else who is early would stand in for who is late. LAID_OUT, of warps that have
// laid out their share of a layer of the cache, has a counter for each layer.
//
// No buffer needs another copy: whoever writes one again, or makes it BLANK, has waited, directly
// or through others, for all that read it before.
#pragma once
#include "hopper.cuh"

namespace exchange {
using namespace hopper;

constexpr int ROWS = HORIZON;  // maybe FEW: what is faster for those is not for more
constexpr int WIDTH = 1024, MLP = 4096, HEADS = 8, HEAD = 256;
constexpr int PEERS = 8, BLOCKS = HEADS * PEERS;  // a cluster has one head
constexpr int BYTES = FP8 ? 1 : 2;                // of an operand
constexpr int CHUNK = 16 / BYTES;                 // operands in 16 bytes

// Operands of products are stored as wgmma reads shared memory: as (chunk of K, row, 16 bytes), and
// X as (line of K, row, 128 bytes), where chunks of a line change places (Swizzled).
constexpr int LINE = 128, LINE_ROWS = (ROWS + 7) / 8 * 8, LINE_BYTES = LINE_ROWS * LINE;
constexpr int X_BYTES = WIDTH * BYTES / LINE * LINE_BYTES;
constexpr long X = 0;                     // of qkv, and then of gate/up
constexpr long RECENT = X + 2 * X_BYTES;  // (split, chunk, slot, 16 bytes)
constexpr int RECENT_SLOTS = 8, RECENT_BYTES = 2 * HEAD * 2 * RECENT_SLOTS;
constexpr long RECENT_BUFFER = PEERS * RECENT_BYTES;
constexpr long SUMS = RECENT + 2 * RECENT_BUFFER;  // (row, cluster, d / 4, Word)
constexpr int SUMS_BYTES = HEADS * WIDTH * 2;      // of a row
constexpr long BUFFERS = SUMS + long(ROWS) * SUMS_BYTES;
static_assert(BUFFERS == BUFFER_BYTES, "the launcher allocates what the kernel uses");

// The mark of sums is the lowest bit of four bf16: 1 after attention, 0 after the MLP, which follow
// each other. Buffers begin as zeros, and a launch ends with an MLP.
__device__ __forceinline__ u32 mark_of(bool mlp) { return !mlp; }
__device__ __forceinline__ Word marked(u32 low, u32 high, u32 mark) {
  return {(low & ~1u) | mark, high};
}
__device__ __forceinline__ bool has_mark(Word v, u32 mark) { return (v.low & 1) == mark; }

// What is not there yet: two or four numbers that no conversion gives, all of them NaN.
constexpr u32 BLANK = ~0u;

// Counters, 128 bytes apart but for those of layers, which are words.
enum Counter { MET, ROWS_DONE, RECENT_DONE, LAID_OUT };

__device__ __forceinline__ u32* place(u32* counters, Counter counter) { return counters + 32 * counter; }

// By one block: all but MET begin anew.
__device__ __forceinline__ void reset(u32* counters) {
  const int end = 32 * LAID_OUT + DEPTH;
  for (int i = 32 * ROWS_DONE + threadIdx.x; i < end; i += blockDim.x) counters[i] = 0;
}

// By one thread.
__device__ __forceinline__ void arrive(u32* counter) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// By one thread, which may start copies of what was counted afterwards.
__device__ __forceinline__ void await(u32* counter, u32 arrivals) {
  Watchdog watchdog;
  u32 now;
  do {
    now = load_acquire(counter);
    watchdog.check();
  } while (now < arrivals);
  fence_copies();
}

// All blocks of the launch meet; the counter is never reset. Called by one thread of each block.
__device__ __forceinline__ void meet(u32* counter) {
  Watchdog watchdog;
  __threadfence();
  u32 target = (atomicAdd(counter, 1) / gridDim.x + 1) * gridDim.x, now;
  do {
    now = load_acquire(counter);
    watchdog.check();
  } while (static_cast<int>(now - target) < 0);
}

}  // namespace exchange
