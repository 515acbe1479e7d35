// What the threads of a block of siglip_layers.cu that multiply do again and again: products of what the
// rings have, and rows on their way to other blocks.
#pragma once
#include "siglip_service.cuh"

namespace {

// The threads that multiply, 128 for each 64 rows. Of products, a thread has two of each eight columns, of
// two rows, the second eight further on.
struct Group {
  const Block& b;
  RingCursor<X_LINES> x_at;
  RingCursor<UNITS> at;
  u32 constants = 0;
  int layer = 0, meetings = 0;

  __device__ __forceinline__ explicit Group(const Block& block) : b(block) {}
  __device__ __forceinline__ int warp_row() const { return b.row + b.warp * 16; }
  __device__ __forceinline__ int row() const { return warp_row() + b.lane / 4; }
  // Where the thread stages its first row's first column, of `bytes` for a pair.
  __device__ __forceinline__ u32 staged(int bytes) const {
    return b.shared + STAGED + (b.warp * 16 + b.lane / 4) * PITCH + b.lane % 4 * bytes;
  }

  // What is loaded of the layer's constants is ordered by this address alone, so that it may be loaded early.
  __device__ __forceinline__ void await_constants() {
    wait(b.constants_full(layer), layer / 2 % 2);
    constants = b.shared + CONSTANTS_AT + layer % 2 * CONSTANT_BYTES;
    not_earlier();
  }
  __device__ __forceinline__ void not_earlier() { asm volatile("" : "+r"(constants)); }
  __device__ __forceinline__ float number(Number which) const {
    float v;
    asm("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(constants + (NUMBERS_AT + which) * 4));
    return v;
  }
  // Of the thread's two columns of `chunk`.
  __device__ __forceinline__ float2 vector(int which, int chunk) const {
    float2 v;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];"
        : "=f"(v.x), "=f"(v.y)
        : "r"(constants + (which * HEAD + chunk * 8 + b.lane % 4 * 2) * 4));
    return v;
  }

  // something(chunk, second, i): of the columns of HEAD / 8 chunks, the i-th sum and the next.
  template <class Do>
  __device__ static __forceinline__ void each(const Do& something) {
#pragma unroll
    for (int i = 0; i < HEAD / 2; i += 2) something(i / 4, i / 2 % 2, i);
  }
  template <int N>
  __device__ static __forceinline__ void clear(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = 0.0f;
  }

  // sums += a line of rows times a line of STEP units of weights, once they are there.
  template <class Format, int STEP, int N>
  __device__ __forceinline__ void begin_products(float (&sums)[N]) const {
    const Swizzled rows(b.shared + X + x_at.slot * X_LINE + b.group * (GROUP_ROWS * LINE));
    const Swizzled columns(b.shared + WEIGHTS + at.slot * UNIT);
    wait(b.line_full(x_at.slot), x_at.parity);
#pragma unroll
    for (int i = 0; i < STEP; ++i) wait(b.unit_full(at.slot + i), at.parity);
    begin_line<Format>(sums, rows, columns);
  }
  // Of a line whose products are done.
  template <int STEP>
  __device__ __forceinline__ void release(int x_slot, int slot, bool stays) const {
    if (!stays && b.lane == 0) mbarrier_arrive(b.line_empty(x_slot), 1);
    if (b.lane < STEP) mbarrier_arrive(b.unit_empty(slot + b.lane), 1);
  }
  // sums = all of LINES lines. STAY: rows are multiplied again, from the first line on that stays.
  template <class Format, int LINES, int STEP = 1, bool STAY = false, int N>
  __device__ __forceinline__ void multiply(float (&sums)[N]) {
    const RingCursor<X_LINES> begin = x_at;
    int x_before = 0, before = 0;
    clear(sums);
#pragma unroll 1
    for (int line = 0; line < LINES; ++line) {
      begin_products<Format, STEP>(sums);
      wgmma_wait<1>();
      if (line > 0) release<STEP>(x_before, before, STAY && line > AGAIN);
      x_before = x_at.slot, before = at.slot;
      x_at.advance();
      at.advance(STEP);
    }
    wgmma_wait<0>();
    settle(sums);
    release<STEP>(x_before, before, STAY);
    if (STAY) x_at = begin, x_at.advance(AGAIN);
  }
  __device__ __forceinline__ void leave_out() {
    wait(b.unit_full(at.slot), at.parity);
    if (b.lane == 0) mbarrier_arrive(b.unit_empty(at.slot), 1);
    at.advance();
  }

  // So many pieces of each of the warp's rows, from where they are staged to `to`, rows `stride` bytes apart.
  template <class Piece, int PIECES>
  __device__ __forceinline__ void copy_out(char* to, long stride) const {
    constexpr int COUNT = (16 * PIECES + 31) / 32, SIZE = sizeof(Piece);
    int lane = b.lane;
    asm volatile("" : "+r"(lane));  // else all that follows from it would be kept, for which registers lack
    const auto index = [&](int i) { return lane + 32 * i; };
    Piece pieces[COUNT];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (index(i) >= 16 * PIECES) continue;
      const int at = index(i) / PIECES * PITCH + index(i) % PIECES * SIZE;
      pieces[i] = *reinterpret_cast<const Piece*>(b.memory + STAGED + b.warp * 16 * PITCH + at);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (index(i) >= 16 * PIECES) continue;
      *reinterpret_cast<Piece*>(to + index(i) / PIECES * stride + index(i) % PIECES * SIZE) = pieces[i];
    }
    __syncwarp();
  }
  // What has been copied out may be told.
  __device__ __forceinline__ void meet() {
    named_barrier_arrive(MEETING + meetings++ % 2, MEETING_THREADS);
  }
};

}  // namespace
