// Matrix products of h rows with the weights of the ring, and what becomes of their results.
#pragma once
#include "block.cuh"

namespace {

// result (64 rows, N) = operand · the ring's next UNITS. A unit has ROWS_W rows of weights, of which N
// from `column` on count, and CHUNKS of K, of which this group multiplies one of PARTS.
template <typename F, int N, int ROWS_W, int CHUNKS, int PARTS, int UNITS, typename Ready>
__device__ __forceinline__ void multiply(float (&result)[N / 2], Block& b, int operand, int part,
                                         int column, Ready ready) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) result[i] = 0.0f;
  const Matrix activations(b.shared + operand + 2 * part * ROWS * 16, ROWS * 16, 128);
  const Matrix weights(b.shared + RING + (column + 2 * part * ROWS_W) * 16, ROWS_W * 16, 128);
  b.ring.slot = uniform(b.ring.slot), b.ring.parity = uniform(b.ring.parity);
  int held = 0;  // the slot whose product may still be under way
#pragma unroll 2
  for (int u = 0; u < UNITS; ++u) {
    ready(u);
    b.wait_full(b.ring);
    __syncwarp();
    settle(result);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < CHUNKS; k += 2 * PARTS) {
      F::mma(result, activations.at((u * CHUNKS + k) * ROWS * 16),
             weights.at(b.ring.slot * UNIT + k * ROWS_W * 16));
    }
    wgmma_commit();
    if (u) {
      wgmma_wait<1>();
      b.release(held, 1);
    }
    held = b.ring.slot;
    b.ring.advance(1);
  }
  wgmma_wait<0>();
  settle(result);
  b.release(held, 1);
}

// Waits for the piece of X that begins with a unit, exchanged twice a layer.
template <int CHUNKS>
struct PieceReady {
  const Block& b;
  int parity;
  __device__ __forceinline__ void operator()(int unit) const {
    constexpr int UNITS = PIECE_CHUNKS / CHUNKS;
    if (unit % UNITS == 0) wait(b.shared + X_FULL + 8 * (unit / UNITS), parity);
  }
};
struct AllReady {
  __device__ __forceinline__ void operator()(int) const {}
};

// Where the quad `index` of a group's threads lies, each thread's beside its neighbour's.
__device__ __forceinline__ float4* quad(const Block& b, int index, int group) {
  return reinterpret_cast<float4*>(b.memory + GIVEN) + (index * GROUPS + group) * 128 +
         b.thread % 128;
}

// Two neighbours of a row turn by the angle of its position, bf16.
struct Turn {
  float cos = 1.0f, sin = 0.0f;

  __device__ void load(const Arguments& a, long position, int column) {
    long at = position * (HEAD / 2) + column / 2;
    cos = a.cos[at], sin = a.sin[at];
  }
  __device__ __forceinline__ u32 apply(float even, float odd) const {
    return pack_bf16(even * cos - odd * sin, odd * cos + even * sin);
  }
};

// result += what the other groups have of this quad of columns.
__device__ __forceinline__ void sum_groups(float (&sum)[4], const Block& b, int index) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    if (g == b.group) continue;
    const float4 v = *quad(b, index, g);
    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
  }
}

// Queries of this block's share of its head, eight columns a group, to all peers; eight columns of
// keys or values, by the first group, to all blocks.
__device__ __forceinline__ void qkv(Block& b, const Arguments& a, float alpha) {
  constexpr int QUERY_CHUNKS = HEAD / PEERS / 8;
  static_assert(QUERY_CHUNKS == GROUPS, "eight columns a group");
  const bool recent = b.group == 0, key = 8 * b.index < HEAD;
  const int chunk = QUERY_CHUNKS * b.rank + b.group, column = b.lane % 4 * 2;
  Turn turn[2], recent_turn[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    turn[i].load(a, b.prefix + row, 8 * chunk + column);
    if (recent && key) recent_turn[i].load(a, b.prefix + row, 8 * b.index + column);
  }

  float result[QKV_TILE / 2];
  multiply<Format, QKV_TILE, QKV_TILE, QKV_CHUNKS, GROUPS, QKV_UNITS>(
      result, b, AREA, b.group, 0, PieceReady<QKV_CHUNKS>{b, 0});
  all_consumers();  // X is read
  b.free_x();
  float sum[4] = {}, recent_sum[4] = {};
#pragma unroll
  for (int j = 0; j <= QUERY_CHUNKS; ++j) {
    if (j % QUERY_CHUNKS != b.group) {
      *quad(b, j, b.group) = make_float4(result[4 * j], result[4 * j + 1], result[4 * j + 2],
                                         result[4 * j + 3]);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) (j < QUERY_CHUNKS ? sum : recent_sum)[i] = result[4 * j + i];
  }
  all_consumers();
  sum_groups(sum, b, b.group);
  if (recent) sum_groups(recent_sum, b, QUERY_CHUNKS);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    store_shared(b.shared + QUERIES + (chunk * ROWS + row) * 16 + column * 2,
                 turn[i].apply(alpha * sum[2 * i], alpha * sum[2 * i + 1]));
    if (!recent) continue;
    const int split = row * PEERS / ROWS, slot = row - Split::begin(split);
    store_relaxed(b.buffers + RECENT + ((split * BLOCKS + b.index) * RECENT_SLOTS + slot) * 16 +
                      column * 2,
                  recent_turn[i].apply(alpha * recent_sum[2 * i], alpha * recent_sum[2 * i + 1]));
  }
  if (recent) mbarrier_arrive(b.shared + RECENT_STORED, 1);
  wait(b.shared + X_FREE, 0);
  b.share(QUERIES + b.rank * QUERY_PIECE, QUERY_PIECE, QUERIES_FULL);
}

// The next UNITS of tiles of 128 rows: each group multiplies half of the rows and half of K, and
// ends with the sums of a quarter of the rows, which begins at `quarter`: two rows of the operand,
// and of every eight rows of the tile two.
__device__ __forceinline__ int quarter(const Block& b) {
  return TILE / 2 * (b.group % 2) + TILE / 4 * (b.group / 2);
}
template <typename F, int UNITS, bool IN_AREA = false, typename Ready>
__device__ __forceinline__ void wide_product(float (&sum)[16], Block& b, int operand, Ready ready) {
  const int half = b.group / 2;
  float result[TILE / 4];
  multiply<F, TILE / 2, TILE, TILE_CHUNKS, 2, UNITS>(result, b, operand, half,
                                                     TILE / 2 * (b.group % 2), ready);
  if (IN_AREA) {  // where parts come
    all_consumers();
    b.free_x();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float given[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int low = 4 * i + j, high = low + 16;
      given[j] = half ? result[low] : result[high];
      sum[low] = half ? result[high] : result[low];
    }
    *quad(b, i, b.group) = make_float4(given[0], given[1], given[2], given[3]);
  }
  named_barrier(8 + b.group % 2, CONSUMERS / 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 v = *quad(b, i, b.group ^ 2);
    sum[4 * i] += v.x, sum[4 * i + 1] += v.y, sum[4 * i + 2] += v.z, sum[4 * i + 3] += v.w;
  }
}

// Of `sum` (four times two rows of two), the eight numbers of the first or second row. Tiles are
// packed so that they are neighbours (expert_stream.py).
__device__ __forceinline__ void take_row(float (&row)[8], const float (&sum)[16], int second,
                                         float alpha) {
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] = alpha * sum[i / 2 * 4 + 2 * second + i % 2];
}

// Columns 128 · rank … of a cluster's share of the out or down projection.
template <bool MLP_HALF>
__device__ __forceinline__ void project(Block& b, float alpha) {
  const u32 mark = mark_of(MLP_HALF);
  b.wait_for(MLP_HALF ? HIDDEN_FULL : MERGED_FULL);
  float sum[16];
  wide_product<Format, MLP_HALF ? DOWN_UNITS : OUT_UNITS>(sum, b, MLP_HALF ? HIDDEN : MERGED,
                                                          AllReady());
  const int column = b.rank * TILE + quarter(b) + b.lane % 4 * 8;
  char* to = b.buffers + SUMS + b.head * (WIDTH * 2) + column * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    float v[8];
    take_row(v, sum, i, alpha);
    store_relaxed(to + row * SUMS_BYTES,
                  Words{marked(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), mark),
                        marked(pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]), mark)});
  }
}

__device__ __forceinline__ float gated(float gate, float up) {
  float u = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 √(2/π) …
  return __fdividef(gate, 1.0f + exp2_fast(-1.44269504f * u)) * up;
}

// Gate and up lie side by side; four hidden columns of two rows a thread.
__device__ __forceinline__ void geglu(Block& b, float alpha, float inverse_scale) {
  float sum[16];
  wide_product<Format, WIDE_UNITS, true>(sum, b, AREA, PieceReady<TILE_CHUNKS>{b, 1});
  const int column = b.rank * (TILE / 2) + quarter(b) / 2 + b.lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    float wide[8], hidden[4];
    take_row(wide, sum, i, alpha);
#pragma unroll
    for (int j = 0; j < 4; ++j) hidden[j] = gated(wide[2 * j], wide[2 * j + 1]);
    store_operand(b, HIDDEN, row, column, hidden, inverse_scale);
  }
  wait(b.shared + X_FREE, 1);
  b.share(HIDDEN + b.rank * HIDDEN_PIECE, HIDDEN_PIECE, HIDDEN_FULL);
}

}  // namespace
