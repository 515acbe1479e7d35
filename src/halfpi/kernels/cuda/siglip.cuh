// Attention of SigLIP: the 256 keys of a head of an image fit into shared memory, and a row's logits into the
// registers of a quad.
#pragma once
#include "softmax.cuh"
#include "wgmma.cuh"

namespace siglip {
using namespace hopper;

constexpr int TOKENS = 256, HEAD = 72;
constexpr float LOGIT_SCALE = 0.117851130f * 1.44269504f;  // 1/√k · log2 e
// Keys and values come as lines of 64 dimensions and lines of 16, of which the second half is not
// this head's: it meets zeros of the queries, or is not stored.
constexpr int MOST = 64, REST = 16, MOST_BYTES = TOKENS * MOST * 2;
constexpr int OPERAND_BYTES = MOST_BYTES + TOKENS * REST * 2;

// Of 64 queries. A thread has two rows, the second eight further on.
struct Softmax {
  float most[MOST / 2] = {}, rest[REST / 2] = {}, total[2] = {};

  // Weights of STEP keys are made while those before are multiplied with values. await_values: waits until
  // those are there.
  template <int STEP, class Await>
  __device__ __forceinline__ void add(const float (&logits)[TOKENS / 2], u32 values,
                                      const Await& await_values) {
    float highest[2] = {-infinity(), -infinity()};
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) highest[i / 2 % 2] = fmaxf(highest[i / 2 % 2], logits[i]);
    const float base[2] = {over_quad(highest[0], true) * LOGIT_SCALE,
                           over_quad(highest[1], true) * LOGIT_SCALE};
    const SwizzledLines<2 * MOST> most_values(values);
    const SwizzledLines<2 * REST> rest_values(values + MOST_BYTES);
    u32 weights[TOKENS / 4];
    settle(most);
    settle(rest);
#pragma unroll
    for (int key = 0; key < TOKENS; key += STEP) {
      make_weights<STEP / 2>(logits + key / 2, LOGIT_SCALE, base, weights + key / 4, total);
      if (key == 0) await_values();
      wgmma_fence();
#pragma unroll
      for (int k = key; k < key + STEP; k += 16) {
        Bf16::mma_transposed(most, weights + k / 4, most_values.at(k * 2 * MOST));
        Bf16::mma_transposed(rest, weights + k / 4, rest_values.at(k * 2 * REST));
      }
      wgmma_commit();
    }
    wgmma_wait<0>();
    settle(most);
    settle(rest);
    keep(weights);
  }

  // As rows of HEAD numbers.
  template <bool E4M3>
  __device__ __forceinline__ void store(u32 to, float scale) const {
    const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
    const float factors[2] = {scale * reciprocal(over_quad(total[0], false)),
                              scale * reciprocal(over_quad(total[1], false))};
#pragma unroll
    for (int i = 0; i < HEAD / 2; i += 2) {
      const int second = i / 2 % 2;
      const float* v = i < MOST / 2 ? most + i : rest + i - MOST / 2;
      const u32 at = to + ((row + 8 * second) * HEAD + i / 4 * 8 + lane % 4 * 2) * (E4M3 ? 1 : 2);
      store_pair<E4M3>(at, v[0] * factors[second], v[1] * factors[second]);
    }
  }
};

}  // namespace siglip
