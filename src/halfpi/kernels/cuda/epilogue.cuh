// What follows a product of 64 rows and WIDTH columns, EPILOGUE of them: PLAIN (bias and GELU, if there
// are), GATED (a column of GELU(gate) · up for two of the product), ROTATED (queries, keys and values).
#pragma once
#include "hopper.cuh"

namespace {

using namespace hopper;

constexpr int PLAIN = 0, GATED = 1, ROTATED = 2;
constexpr int OUT_WIDTH = EPILOGUE == GATED ? WIDTH / 2 : WIDTH, OUT_BYTES = OUT_FP8 ? 1 : 2;
constexpr int PITCH = OUT_WIDTH * OUT_BYTES + 16;  // of rows that are staged, in other banks
constexpr int CHUNK = 16 / OUT_BYTES;              // of outputs
// Whether a thread has registers for the rotations of all its sums, so that it can load them early.
constexpr bool EARLY_TURNS = EPILOGUE == ROTATED && WIDTH <= (GROUPS > 2 ? 112 : 160);
constexpr int TURNED = EARLY_TURNS ? WIDTH / 2 : 8;  // sums

// Where outputs go. Of ROTATED, query, keys and values have q_width, kv_width and kv_width of n
// columns, in heads of HEAD; a row is at its place in the cache, and in cos and sin (places, HEAD / 2).
struct Outputs {
  char* out;  // or query
  int n;      // columns of a row
  char *keys, *values;
  const float *cos, *sin;
  int q_width, kv_width, offset, places;

  __device__ __forceinline__ char* at(long row, int column) const {
    if constexpr (EPILOGUE == ROTATED) {
      if (column < q_width) return out + (row * q_width + column) * OUT_BYTES;
      column -= q_width;
      char* to = column < kv_width ? keys : values;
      return to + ((row + offset) * kv_width + column % kv_width) * OUT_BYTES;
    } else {
      return out + (row * n + column) * OUT_BYTES;
    }
  }
};

// The rotations of a thread's pairs of sums, TURNED sums from the i-th on.
struct Turns {
  float cos[TURNED / 2], sin[TURNED / 2];

  __device__ __forceinline__ void load(int i, int row, int column, const Outputs& from) {
    if constexpr (EPILOGUE == ROTATED) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int j = 0; j < TURNED; j += 2) {
        const int place = row + lane / 4 + j / 2 % 2 * 8 + from.offset;
        const int pair = (column + (i + j) / 4 * 8 + lane % 4 * 2) / 2;
        const int angle = place * (HEAD / 2) + pair % (HEAD / 2);
        const bool turns = pair < (from.q_width + from.kv_width) / 2 && place < from.places;
        cos[j / 2] = turns ? from.cos[angle] : 1.0f, sin[j / 2] = turns ? from.sin[angle] : 0.0f;
      }
    }
  }
};

// What a warp has of the sums: two of each eight columns and two of 16 rows a thread.
struct Warp {
  u32 staged;
  int lane;
  const float* bias;

  // Of the eight sums from the i-th on, which are two chunks of eight columns in two rows.
  __device__ __forceinline__ void finish(const float* eight, int i, const Turns& turns, float alpha,
                                         float factor, float (&out)[8]) const {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {  // chunk, row, column
      float even = eight[j] * alpha, odd = eight[j + 1] * alpha;
      const int in_tile = 2 * i + j / 4 * 8 + lane % 4 * 2;
      if constexpr (EPILOGUE == GATED) {
        out[j / 2] = gelu_product(even, even * (eight[j + 1] * (0.5f * alpha * factor)));
        continue;
      }
      if constexpr (EPILOGUE == ROTATED) {
        const int pair = (i % TURNED + j) / 2;
        const float c = turns.cos[pair], s = turns.sin[pair], first = even;
        even = even * c - odd * s, odd = odd * c + first * s;
      }
      if constexpr (BIAS != 0) even += bias[in_tile], odd += bias[in_tile + 1];
      if constexpr (GELU) even = gelu_product(even, 0.5f * even), odd = gelu_product(odd, 0.5f * odd);
      out[j] = even * factor, out[j + 1] = odd * factor;
    }
  }
  __device__ __forceinline__ void store(const float (&out)[8], int i) const {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const u32 to = staged + (lane / 4 + second * 8) * PITCH;
      if constexpr (EPILOGUE == GATED) {
        // Of two chunks of columns a thread has one output each; it gets its neighbour's of one.
        const bool right = lane % 2;
        const float first = out[second], last = out[2 + second];
        const float other = __shfl_xor_sync(~0u, right ? first : last, 1);
        const int column = i + (right ? 4 : 0) + lane % 4 / 2 * 2;
        store_pair<OUT_FP8>(to + column * OUT_BYTES, right ? other : first, right ? last : other);
      } else {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          const float* pair = out + 4 * chunk + 2 * second;
          const int column = 2 * i + chunk * 8 + lane % 4 * 2;
          store_pair<OUT_FP8>(to + column * OUT_BYTES, pair[0], pair[1]);
        }
      }
    }
  }

  // As rows of OUT_WIDTH numbers. The next are on their way while some are stored. turns: all that are
  // loaded early.
  __device__ __forceinline__ void stage(const float (&sums)[WIDTH / 2], Turns& turns, int row, int column,
                                        const Outputs& to, float alpha, float factor) const {
    float now[8], next[8];
    if (!EARLY_TURNS) turns.load(0, row, column, to);
    finish(sums, 0, turns, alpha, factor, now);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 8) {
      if (i + 8 < WIDTH / 2) {
        if (!EARLY_TURNS) turns.load(i + 8, row, column, to);
        finish(sums + i + 8, i + 8, turns, alpha, factor, next);
      }
      store(now, i);
#pragma unroll
      for (int j = 0; j < 8; ++j) now[j] = next[j];
    }
    __syncwarp();
  }

  // The first `rows` of what is staged, of the product's columns from `first` on, to where they belong.
  __device__ __forceinline__ void copy_out(const Outputs& to, long row, int rows, int first) const {
    constexpr int CHUNKS = OUT_WIDTH / CHUNK;
    const int column = EPILOGUE == GATED ? first / 2 : first;
#pragma unroll 4
    for (int i = lane; i < 16 * CHUNKS; i += 32) {
      const int at = i / CHUNKS, chunk = i % CHUNKS;
      if (at < rows && column + chunk * CHUNK < to.n) {
        *reinterpret_cast<uint4*>(to.at(row + at, column + chunk * CHUNK)) =
            load_shared(staged + at * PITCH + chunk * 16);
      }
    }
    __syncwarp();
  }
};

}  // namespace
