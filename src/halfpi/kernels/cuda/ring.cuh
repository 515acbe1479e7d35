// A ring in shared memory of steps along K, each of rows of x and of weights, which a warp fills ahead of the
// groups that multiply.
#pragma once
#include "wgmma.cuh"

namespace {

using namespace hopper;

using Format = conditional<FP8, E4m3, Bf16>::type;
constexpr int LINE = 128, STEP = FP8 ? LINE : LINE / 2;  // bytes and numbers along K
constexpr int W_BYTES = WIDTH * LINE;

// BARRIERS: where they begin, those that a slot is full before those that it is empty.
template <int X_BYTES, int BARRIERS>
struct OperandRing {
  u32 shared;

  __device__ __forceinline__ u32 x(int slot) const { return shared + slot * (X_BYTES + W_BYTES); }
  __device__ __forceinline__ u32 weights(int slot) const { return x(slot) + X_BYTES; }
  __device__ __forceinline__ u32 full(int slot) const { return shared + BARRIERS + 8 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return full(STAGES + slot); }

  // The products of a step, once it is there, by a group whose 64 rows of x are the group-th.
  template <int N>
  __device__ __forceinline__ void begin_products(float (&sums)[N], const RingCursor<STAGES>& at,
                                                 int group = 0) const {
    const Swizzled rows(x(at.slot) + group * 64 * LINE), columns(weights(at.slot));
    wait(full(at.slot), at.parity);
    begin_line<Format>(sums, rows, columns);
  }
};

}  // namespace
