// What the warps of a block do that do not multiply: bring weights and rows, and tell other blocks.
#pragma once
#include "siglip_block.cuh"

namespace {

// By one thread: weights and constants, as far ahead as there is room. They depend on nothing.
struct WeightFiller {
  const Block& b;
  RingCursor<UNITS> at{0, 1};

  // Rows of weights from `row` on, of which a line has so many numbers.
  __device__ __forceinline__ void bring(const TensorMap& map, int line, int numbers, int row) {
    wait(b.unit_empty(at.slot), at.parity);
    mbarrier_expect(b.unit_full(at.slot), UNIT);
    tensor_copy(b.shared + WEIGHTS + at.slot * UNIT, map, line * numbers, row, b.unit_full(at.slot));
    at.advance();
  }
  __device__ __forceinline__ void leave_out() {
    wait(b.unit_empty(at.slot), at.parity);
    mbarrier_arrive(b.unit_full(at.slot), 1);
    at.advance();
  }
  // The line of normed rows that is the i-th when they are multiplied again.
  __device__ static __forceinline__ int again(int i) { return (i + AGAIN) % NORMED_LINES; }
  __device__ __forceinline__ void bring_constants(int layer) const {
    wait(b.constants_empty(layer), layer / 2 % 2 ^ 1);
    mbarrier_expect(b.constants_full(layer), CONSTANT_BYTES);
    bulk_copy(b.shared + CONSTANTS_AT + layer % 2 * CONSTANT_BYTES,
              b.a.constants + (layer * HEADS + b.share) * CONSTANTS, CONSTANT_BYTES, b.constants_full(layer));
  }
  __device__ __forceinline__ void fill() {
    const Arguments& a = b.a;
#pragma unroll 1
    for (int layer = 0; layer < DEPTH; ++layer) {
      bring_constants(layer);
      const int row = layer * WIDTH + b.share * HEAD, query = 3 * layer * WIDTH + b.share * HEAD;
#pragma unroll 1
      for (int line = 0; line < NORMED_LINES; ++line) bring(a.qkv, line, LINE, query + WIDTH);
      leave_out();
#pragma unroll 1
      for (int i = 0; i < NORMED_LINES; ++i) {
        bring(a.qkv, again(i), LINE, query + 2 * WIDTH);
        bring(a.qkv, again(i), LINE, query);
      }
#pragma unroll 1
      for (int line = 0; line < MIXED_LINES; ++line) bring(a.out, line, LINE / 2, row);
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const int first = layer * HIDDEN + (part ? LAST_BEGIN + b.share * LAST : b.share * FIRST);
#pragma unroll 1
        for (int i = 0; i < NORMED_LINES; ++i) {
          const int line = part ? again(i) : i;
          bring(a.fc1, line, LINE, first);
          bring(a.fc1, line, LINE, first + HEAD);  // of the last part, more than it has
        }
      }
#pragma unroll 1
      for (int line = 0; line < HIDDEN_LINES; ++line) bring(a.fc2, line, LINE, row);
    }
  }
};

// By a warp: rows, as soon as all of the team have stored theirs. This block is one of them: its group has
// done with keys and values when what it mixed from them is told, and so they may be overwritten.
struct RowFiller {
  const Block& b;
  RingCursor<X_LINES> at{0, 1};

  __device__ __forceinline__ void fill(Kind kind, u32 number, const TensorMap& map, int numbers, int first,
                                       int last) {
    const u32* const flag = b.flags(kind) + b.lane % HEADS;
    Watchdog watchdog;
    while (!__all_sync(~0u, load_acquire(flag) == number)) {
      nap<NAP>();
      watchdog.check();
    }
    fence_copies();
    if (elected()) {
      RingCursor<X_LINES> to = at;
#pragma unroll 1
      for (int line = first; line < last; ++line) {
        wait(b.line_empty(to.slot), to.parity);
        mbarrier_expect(b.line_full(to.slot), X_LINE);
        tensor_copy(b.shared + X + to.slot * X_LINE, map, line * numbers, b.row, b.line_full(to.slot));
        to.advance();
      }
    }
    at.skip(last - first);
    __syncwarp();
  }
  __device__ __forceinline__ void fill_normed(u32 number) {
    fill(NORMED, number, b.a.normed, LINE, 0, NORMED_LINES);
    if (AGAIN) fill(NORMED, number, b.a.normed, LINE, 0, AGAIN);
  }
  // Keys or values of the image, in place of rows that have been read: those of each team as soon as it has
  // told of them.
  __device__ __forceinline__ void fill_operand(int layer, int values) const {
    if (elected()) mbarrier_expect(b.operand_full(values), OPERAND_BYTES);
    const int begin = OPERANDS + values * OPERAND_BYTES, end = begin + OPERAND_BYTES;
#pragma unroll 1
    for (int slot = begin / X_LINE; slot * X_LINE < end; ++slot) wait(b.line_empty(slot), at.parity_of(slot));
    const u32* const flag = b.operand_flags(layer, values) + b.lane % TEAMS;
    Watchdog watchdog;
    for (u32 brought = 0;; nap<NAP>()) {
      u32 told = __ballot_sync(~0u, load_acquire(flag) == layer + 1) % (1 << TEAMS) & ~brought;
      brought |= told;
      if (told) {
        fence_copies();
        if (elected()) {
          for (; told; told &= told - 1) bring_operand(layer, values, __ffs(told) - 1);
        }
        __syncwarp();
        if (brought == (1 << TEAMS) - 1) return;
      }
      watchdog.check();
    }
  }
  __device__ __forceinline__ void bring_operand(int layer, int values, int team) const {
    const int first = team * ROWS, row = b.operand(layer, values) * TOKENS + first;
    const u32 to = b.operand_at(values), full = b.operand_full(values);
    tensor_copy(to + first * 2 * MOST, b.a.most, 0, row, full);
    tensor_copy(to + MOST_BYTES + first * 2 * REST, b.a.rest, MOST, row, full);
  }
  __device__ __forceinline__ void fill() {
    const Arguments& a = b.a;
#pragma unroll 1
    for (int layer = 0; layer < DEPTH; ++layer) {
      fill_normed(2 * layer + 1);
      fill_operand(layer, 0);
      fill_operand(layer, 1);
      fill(MIXED, layer + 1, a.mixed, LINE / 2, 0, MIXED_LINES);
      fill_normed(2 * layer + 2);
      fill(HIDDEN_FIRST, layer + 1, a.hidden, LINE, 0, FIRST_LINES);
      fill(HIDDEN_LAST, layer + 1, a.hidden, LINE, FIRST_LINES, HIDDEN_LINES);
    }
  }
};

// By a warp: tells others what the group has stored, which so does not wait until that has arrived. There are
// two meetings in turn: before one comes again, the group has waited for what was told after it.
constexpr int MEETING = 1, MEETING_THREADS = 32 * WARPS + 32;

struct Teller {
  const Block& b;
  int meetings = 0;

  __device__ __forceinline__ void tell(u32* flag, u32 number) {
    named_barrier(MEETING + meetings++ % 2, MEETING_THREADS);
    if (b.lane == 0) store_release(flag, number);
  }
  __device__ __forceinline__ void tell(Kind kind, u32 number) { tell(b.flags(kind) + b.share, number); }
  __device__ __forceinline__ void tell_all() {
#pragma unroll 1
    for (int layer = 0; layer < DEPTH; ++layer) {
      tell(NORMED, 2 * layer + 1);
      tell(b.operand_flags(layer, 0) + b.team(), layer + 1);
      tell(b.operand_flags(layer, 1) + b.team(), layer + 1);
      tell(MIXED, layer + 1);
      tell(NORMED, 2 * layer + 2);
      tell(HIDDEN_FIRST, layer + 1);
      tell(HIDDEN_LAST, layer + 1);
    }
  }
};

}  // namespace
