// The residual, of which a block of siglip_layers.cu keeps its columns in registers, and its norms.
#pragma once
#include "siglip_group.cuh"

namespace {

struct Residual : Group {
  float residual[HEAD / 2];

  using Group::Group;

  __device__ __forceinline__ char* residual_at() const {
    return b.a.residual + (long(row()) * WIDTH + b.share * HEAD + b.lane % 4 * 2) * 2;
  }
  __device__ __forceinline__ void load() {
    const char* from = residual_at();
    each([&](int chunk, int second, int i) {
      const u32 word = *reinterpret_cast<const u32*>(from + (second * 8 * WIDTH + chunk * 8) * 2);
      residual[i] = low_bf16(word), residual[i + 1] = high_bf16(word);
    });
  }
  __device__ __forceinline__ void store() const {
    char* const to = residual_at();
    each([&](int chunk, int second, int i) {
      u32* const word = reinterpret_cast<u32*>(to + (second * 8 * WIDTH + chunk * 8) * 2);
      *word = pack_bf16(residual[i], residual[i + 1]);
    });
  }

  // Mean of this block's columns, and sum of squares around it, in whose last bits is a mark, to the team.
  __device__ __forceinline__ void tell_statistics(bool mlp) const {
    float mean[2] = {}, squares[2] = {};
    each([&](int, int second, int i) { mean[second] += residual[i] + residual[i + 1]; });
#pragma unroll
    for (int second = 0; second < 2; ++second) mean[second] = over_quad(mean[second], false) * (1.0f / HEAD);
    each([&](int, int second, int i) {
      const float even = residual[i] - mean[second], odd = residual[i + 1] - mean[second];
      squares[second] = fmaf(even, even, fmaf(odd, odd, squares[second]));
    });
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      squares[second] = over_quad(squares[second], false);
      if (b.lane % 4 == second) {
        const u32 marked = (__float_as_uint(squares[second]) & ~31u) | (layer + 1);
        Word* const to = statistics(mlp) + b.share * 16 + b.lane / 4 + 8 * second;
        store_relaxed(to, Word{__float_as_uint(mean[second]), marked});
      }
    }
  }
  // Of the warp's sixteen rows: (HEADS, 16).
  __device__ __forceinline__ Word* statistics(bool mlp) const {
    return b.a.statistics + (int(mlp) * b.a.images * TOKENS + warp_row()) * HEADS;
  }
  // What norms a row: a factor and what is added. A lane has a quarter of the team's words of two
  // neighbouring rows.
  __device__ __forceinline__ void hear_statistics(bool mlp, float (&inverse)[2], float (&offset)[2]) const {
    constexpr int COUNT = HEADS / 4;
    const Word* const from = statistics(mlp) + b.lane * 2;
    Word words[COUNT][2];
    Watchdog watchdog;
    while (true) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_words(words[i], from + i * 64);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) all &= is_new(words[i][0]) && is_new(words[i][1]);
      if (__all_sync(~0u, all)) break;
      nap<NAP>();
      watchdog.check();
    }
    float means[2] = {}, factors[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float squares = 0.0f, between = 0.0f;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        means[row] += __uint_as_float(words[i][row].low);
        squares += __uint_as_float(words[i][row].high);
      }
      means[row] = over_quarters(means[row]) * (1.0f / HEADS);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float off = __uint_as_float(words[i][row].low) - means[row];
        between = fmaf(off, off, between);
      }
      squares = over_quarters(fmaf(float(HEAD), between, squares));
      factors[row] = rsqrtf(squares * (1.0f / WIDTH) + float(EPSILON));
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int from_lane = b.lane / 8 + 4 * second;
      inverse[second] = of_row(factors, from_lane);
      offset[second] = -of_row(means, from_lane) * inverse[second];
    }
  }
  // Of the neighbouring rows that a lane has, what the thread's row has.
  __device__ __forceinline__ float of_row(const float (&pair)[2], int from_lane) const {
    const float even = __shfl_sync(~0u, pair[0], from_lane), odd = __shfl_sync(~0u, pair[1], from_lane);
    return b.lane / 4 % 2 ? odd : even;
  }
  __device__ __forceinline__ bool is_new(Word word) const { return (word.high & 31) == layer + 1; }
  __device__ static __forceinline__ float over_quarters(float v) {
    v += __shfl_xor_sync(~0u, v, 8);
    return v + __shfl_xor_sync(~0u, v, 16);
  }

  // The residual, normed, to the team.
  __device__ __forceinline__ void norm(bool mlp) {
    constexpr int CHUNKS = HEAD / 8;
    float inverse[2], offset[2];
    float2 gains[CHUNKS], shifts[CHUNKS];
    tell_statistics(mlp);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      gains[i] = vector(mlp ? MLP_GAIN : ATTN_GAIN, i);
      shifts[i] = vector(mlp ? MLP_SHIFT : ATTN_SHIFT, i);
    }
    hear_statistics(mlp, inverse, offset);
    unsigned short out[HEAD / 4];
    each([&](int chunk, int second, int i) {
      const float2 gain = gains[chunk], shift = shifts[chunk];
      const float even = fmaf(residual[i], inverse[second], offset[second]);
      const float odd = fmaf(residual[i + 1], inverse[second], offset[second]);
      out[i / 2] = pack_e4m3(fmaf(even, gain.x, shift.x), fmaf(odd, gain.y, shift.y));
    });
    const u32 to = staged(2);
    each([&](int chunk, int second, int i) {
      store_shared(to + second * 8 * PITCH + chunk * 8, out[i / 2]);
    });
    copy_out<uint2, HEAD / 8>(b.a.normed_rows + long(warp_row()) * WIDTH + b.share * HEAD, WIDTH);
    meet();
  }

  // residual += alpha · sums + bias.
  __device__ __forceinline__ void update(const float (&sums)[HEAD / 2], float alpha, int bias_of) {
    each([&](int chunk, int, int i) {
      const float2 bias = vector(bias_of, chunk);
      residual[i] += fmaf(sums[i], alpha, bias.x), residual[i + 1] += fmaf(sums[i + 1], alpha, bias.y);
    });
  }
};

}  // namespace
