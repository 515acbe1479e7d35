// Matrix products of h rows with the weights of the ring, and what becomes of their results.
#pragma once
#include "block.cuh"

namespace {

// (64 rows, N) of `from` · the next UNITS units of the ring. Each group sums half of the units, and
// ends with half of the columns: result[4 g + i] is column 8 (group · N / 16 + g) + 2 (lane % 4) +
// i % 2 of row `row` + 8 (i / 2).
template <int N, int UNIT_CHUNKS, int UNITS>
__device__ __forceinline__ void product(float (&result)[N / 4], Block& b, const char* from,
                                        int counter, int writers) {
  constexpr int BATCH = UNITS / 2 < 16 / UNIT_CHUNKS ? UNITS / 2 : 16 / UNIT_CHUNKS;
  constexpr int BATCHES = UNITS / 2 / BATCH;
  constexpr int CHUNKS = BATCH * UNIT_CHUNKS, PIECE = CHUNKS * ROWS * 16;
  all_consumers();  // the operands of the last product are read
  if (b.thread == 0) {
    b.await(counter, writers);
    fence_copies();
    for (int p = 0; p < 2 * BATCHES; ++p) b.fetch(p, OPERANDS + p * PIECE, from + p * PIECE, PIECE);
  }
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < BATCHES; ++t) {
    const u32 a = b.shared + OPERANDS + (2 * t + b.group) * PIECE;
    b.wait_for(2 * t + b.group);
    const int first = b.unit + (2 * t + b.group) * BATCH;
    for (int unit = first; unit < first + BATCH; ++unit) {
      wait(b.shared + FULL + 8 * (unit % SLOTS), unit / SLOTS & 1);
    }
    __syncwarp();
    wgmma_fence();
#pragma unroll
    for (int u = 0; u < BATCH; ++u) {
      u32 w = b.shared + RING + (first + u) % SLOTS * UNIT;
#pragma unroll
      for (int k = 0; k < UNIT_CHUNKS / 2; ++k) {
        Format::mma(acc, descriptor(a + (u * UNIT_CHUNKS + 2 * k) * ROWS * 16, ROWS * 16, 128),
                    descriptor(w + 2 * k * N * 16, N * 16, 128));
      }
    }
    wgmma_commit();
    if (t > 0) {
      wgmma_wait<1>();
      for (int u = 0; u < BATCH && b.lane == 0; ++u) {
        int unit = b.unit + (2 * t - 2 + b.group) * BATCH + u;
        mbarrier_arrive(b.shared + EMPTY + 8 * (unit % SLOTS));
      }
    }
  }
  wgmma_wait<0>();
  for (int u = 0; u < BATCH && b.lane == 0; ++u) {
    int unit = b.unit + (2 * BATCHES - 2 + b.group) * BATCH + u;
    mbarrier_arrive(b.shared + EMPTY + 8 * (unit % SLOTS));
  }
  b.unit += UNITS;

  constexpr int HALF = N / 4;
  float4* mine = b.exchanged(b.group);
#pragma unroll
  for (int g = 0; g < HALF / 4; ++g) {
    const int i = 4 * g;
    mine[g * 128] = b.group ? make_float4(acc[i], acc[i + 1], acc[i + 2], acc[i + 3])
                            : make_float4(acc[HALF + i], acc[HALF + i + 1], acc[HALF + i + 2],
                                          acc[HALF + i + 3]);
  }
  all_consumers();
  const float4* other = b.exchanged(1 - b.group);
#pragma unroll
  for (int g = 0; g < HALF / 4; ++g) {
    float4 o = other[g * 128];
    const int i = 4 * g;
    result[i] = o.x + (b.group ? acc[HALF + i] : acc[i]);
    result[i + 1] = o.y + (b.group ? acc[HALF + i + 1] : acc[i + 1]);
    result[i + 2] = o.z + (b.group ? acc[HALF + i + 2] : acc[i + 2]);
    result[i + 3] = o.w + (b.group ? acc[HALF + i + 3] : acc[i + 3]);
  }
}

// Partial sums fp32 (split, row, d): block 8 i + s has columns 64 i … of split s.
__device__ __forceinline__ void publish_partial(const float (&result)[16], const Block& b,
                                                char* partials, float alpha) {
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    int column = b.index / K_SPLITS * 64 + 8 * (4 * b.group + g) + 2 * (b.lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int row = b.row + 8 * i;
      float* to = reinterpret_cast<float*>(partials) +
                  (b.index % K_SPLITS * ROWS + row) * WIDTH + column;
      if (row < ROWS) {
        store_relaxed(to, __float_as_uint(alpha * result[4 * g + 2 * i]),
                      __float_as_uint(alpha * result[4 * g + 2 * i + 1]));
      }
    }
  }
}

// Queries, keys and values of the actions, bf16, as operands of one head after another.
struct QkvRope {
  float2 turn[2][2];  // cosine and sine of this thread's pairs and rows, the same in every layer

  __device__ int column(const Block& b, int g) const {
    return b.index * QKV_ROWS + 8 * (2 * b.group + g) + 2 * (b.lane % 4);
  }
  __device__ void load(const Block& b, const Arguments& a) {
    for (int g = 0; g < 2; ++g) {
      for (int i = 0; i < 2; ++i) {
        int n = column(b, g), row = b.row + 8 * i;
        long at = long(b.prefix + row) * (HEAD / 2) + n % HEAD / 2;
        bool turns = row < ROWS && n < (HEADS + 1) * HEAD;
        turn[g][i] = turns ? make_float2(a.cos[at], a.sin[at]) : make_float2(1.0f, 0.0f);
      }
    }
  }
  __device__ __forceinline__ void run(Block& b, char* set, float alpha) const {
    float result[8];
    product<QKV_ROWS, 16, QKV_UNITS>(result, b, set + X, ROWS_1, ROWS);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      int n = column(b, g);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float even = alpha * result[4 * g + 2 * i], odd = alpha * result[4 * g + 2 * i + 1];
        float c = turn[g][i].x, s = turn[g][i].y;
        int row = b.row + 8 * i;
        char* to = set + QKV + (n / 8 * ROWS + row) * 16 + n % 8 * 2;
        if (row < ROWS) store_relaxed(to, pack_bf16(even * c - odd * s, odd * c + even * s));
      }
    }
    int head = b.index * QKV_ROWS / HEAD;
    b.publish(head < HEADS ? QUERY + head : KEYS_VALUES);
  }
};

__device__ __forceinline__ float gated(float gate, float up) {
  float u = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 √(2/π) …
  return __fdividef(gate, 1.0f + exp2_fast(-1.44269504f * u)) * up;
}

// The packing gives each thread four neighbouring columns, gate and up side by side.
__device__ __forceinline__ void geglu(Block& b, char* set, float alpha, float inverse_scale) {
  float result[16];
  product<64, 8, WIDE_UNITS>(result, b, set + X2, ROWS_2, ROWS);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float v[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      v[g] = gated(alpha * result[4 * g + 2 * i], alpha * result[4 * g + 2 * i + 1]);
    }
    int row = b.row + 8 * i;
    if (row < ROWS) {
      publish(set + HIDDEN, row, b.index * 32 + b.group * 16 + b.lane % 4 * 4, v, inverse_scale);
    }
  }
  b.publish(GATED + b.index / (BLOCKS / K_SPLITS));
}

}  // namespace
