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

// Two neighbours as outputs, of which eight sums make so many.
using Pair = conditional<OUT_FP8, unsigned short, u32>::type;
constexpr int PAIRS = EPILOGUE == GATED ? 2 : 4;
__device__ __forceinline__ Pair as_outputs(Pair v) { return v; }
__device__ __forceinline__ Pair as_outputs(float2 v) { return pack_pair<OUT_FP8>(v.x, v.y); }
// What they are until they are stored. Rotations leave no registers in which to pack them earlier.
using Finished = conditional<EPILOGUE == GATED || GELU, Pair, float2>::type;

// What a warp has of the sums: two of each eight columns and two of 16 rows a thread. Eight sums are of two
// chunks of columns, of each those of two rows.
struct Warp {
  u32 staged;
  int lane;
  const float* bias;

  // Of the eight sums from the i-th on. Out is Finished: so the compiler reads no more than the branch of
  // this EPILOGUE.
  template <class Out>
  __device__ __forceinline__ void finish(const float* eight, int i, const Turns& turns, float alpha,
                                         float factor, Out (&out)[PAIRS]) const {
    if constexpr (EPILOGUE == GATED) {
      if constexpr (OUT_FP8) {
        u32 packed[4];
        pack(eight, alpha, factor, packed);
        finish_packed(packed, alpha, factor, out);
      } else {
        float gated[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float gate = eight[2 * j] * alpha, up = eight[2 * j + 1] * (0.5f * alpha * factor);
          gated[j] = gelu_product(gate, gate * up);
        }
        exchange(gated, out);
      }
    } else {
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        float even = eight[j] * alpha, odd = eight[j + 1] * alpha;
        const int in_tile = 2 * i + j / 4 * 8 + lane % 4 * 2;
        if constexpr (EPILOGUE == ROTATED) {
          const int pair = (i % TURNED + j) / 2;
          const float c = turns.cos[pair], s = turns.sin[pair], first = even;
          even = even * c - odd * s, odd = odd * c + first * s;
        }
        if constexpr (BIAS != 0) even += bias[in_tile], odd += bias[in_tile + 1];
        out[j / 2] = activated<Out>(even, odd, factor);
      }
    }
  }
  template <class Out>
  __device__ static __forceinline__ Out activated(float even, float odd, float factor) {
    if constexpr (!GELU) {
      return make_float2(even * factor, odd * factor);
    } else if constexpr (OUT_FP8) {
      return gelu_e4m3(pack_f16(even, odd), pack_f16(factor, factor));
    } else {
      even = gelu_product(even, 0.5f * even), odd = gelu_product(odd, 0.5f * odd);
      return pack_pair<OUT_FP8>(even * factor, odd * factor);
    }
  }

  // Gates and ups in half of the registers: for E4M3 as f16 what they are, those of a row's chunks together.
  __device__ static __forceinline__ void pack(const float* eight, float alpha, float factor, u32* packed) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float *first = eight + 2 * row, *second = first + 4;
      if constexpr (OUT_FP8) {
        packed[row] = pack_f16(first[0] * alpha, second[0] * alpha);
        packed[2 + row] = pack_f16(first[1] * (alpha * factor), second[1] * (alpha * factor));
      } else {
        packed[row] = pack_bf16(first[0], first[1]), packed[2 + row] = pack_bf16(second[0], second[1]);
      }
    }
  }
  template <class Out>
  __device__ __forceinline__ void finish_packed(const u32* packed, float alpha, float factor,
                                                Out (&out)[PAIRS]) const {
    if constexpr (EPILOGUE == GATED && OUT_FP8) {
      exchange(gelu_e4m3(packed[0], packed[2]), gelu_e4m3(packed[1], packed[3]), out);
    } else {
      float eight[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) eight[2 * j] = low_bf16(packed[j]), eight[2 * j + 1] = high_bf16(packed[j]);
      finish(eight, 0, Turns{}, alpha, factor, out);
    }
  }

  // Of two chunks of columns a thread has one output each in a row; it gets its neighbour's of one.
  __device__ __forceinline__ void exchange(unsigned short first, unsigned short second,
                                           Pair (&out)[2]) const {
    const u32 own = first | second << 16, other = __shfl_xor_sync(~0u, own, 1);
    const u32 both = lane % 2 ? __byte_perm(other, own, 0x7351) : __byte_perm(own, other, 0x6240);
    out[0] = static_cast<unsigned short>(both), out[1] = both >> 16;
  }
  __device__ __forceinline__ void exchange(const float (&v)[4], Pair (&out)[2]) const {
    const bool right = lane % 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float other = __shfl_xor_sync(~0u, right ? v[row] : v[2 + row], 1);
      out[row] = pack_pair<OUT_FP8>(right ? other : v[row], right ? v[2 + row] : other);
    }
  }

  __device__ __forceinline__ void store(const Finished (&out)[PAIRS], int i) const {
    const u32 to = staged + lane / 4 * PITCH;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if constexpr (EPILOGUE == GATED) {
        const int column = i + lane % 2 * 4 + lane % 4 / 2 * 2;
        store_shared(to + 8 * row * PITCH + column * OUT_BYTES, as_outputs(out[row]));
      } else {
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
          const int column = 2 * i + chunk * 8 + lane % 4 * 2;
          store_shared(to + 8 * row * PITCH + column * OUT_BYTES, as_outputs(out[2 * chunk + row]));
        }
      }
    }
  }

  // As rows of OUT_WIDTH numbers. The next are on their way while some are stored. turns: all that are
  // loaded early.
  __device__ __forceinline__ void stage(const float (&sums)[WIDTH / 2], Turns& turns, int row, int column,
                                        const Outputs& to, float alpha, float factor) const {
    Finished now[PAIRS], next[PAIRS];
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
      for (int j = 0; j < PAIRS; ++j) now[j] = next[j];
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
