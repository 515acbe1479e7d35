// Matrix products of h rows with the weights of the ring, and what becomes of their results.
#pragma once
#include "block.cuh"

namespace {

// Where in an operand the K of a unit lies, and waiting for it. X comes in pieces, twice a layer.
template <int CHUNKS>
struct PieceOfX {
  int parity;
  __device__ __forceinline__ int place(int unit) const { return unit; }
  __device__ __forceinline__ void wait(const Block& b, int place) const {
    constexpr int UNITS = PIECE_CHUNKS / CHUNKS;
    if (place % UNITS == 0) exchange::wait(b.shared + X_FULL + 8 * (place / UNITS), parity);
  }
};
// Other operands come from peers, and a block begins with its own piece (expert_stream.py).
struct FromPeers {
  int barrier, last, first;
  __device__ __forceinline__ FromPeers(const Block& b, int barrier, int units)
      : barrier(barrier), last(units - 1), first(own_unit(b.rank, units)) {}
  __device__ __forceinline__ int place(int unit) const { return (unit + first) & last; }
  __device__ __forceinline__ void wait(const Block& b, int place) const {
    b.wait_for(barrier + 8 * place);
  }
};

// result (64 rows, N) = operand · the ring's next units, an even number. A unit has ROWS_W rows of
// weights, of which N from `column` on count, and CHUNKS of K, of which this group multiplies one of
// PARTS. Two units a turn of the loop: the code of more takes longer to fetch than it saves.
template <typename F, int N, int ROWS_W, int CHUNKS, int PARTS, typename Source>
__device__ __forceinline__ void multiply(float (&result)[N / 2], Block& b, int units, int operand,
                                         int part, int column, Source source) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) result[i] = 0.0f;
  const Matrix activations(b.shared + operand + 2 * part * ROWS * 16, ROWS * 16, 128);
  const Matrix weights(b.shared + RING + (column + 2 * part * ROWS_W) * 16, ROWS_W * 16, 128);
  b.ring.slot = uniform(b.ring.slot), b.ring.parity = uniform(b.ring.parity);
  int held = 0;  // the slot whose product may still be under way
#pragma unroll 1
  for (int pair = 0; pair < units; pair += 2) {
#pragma unroll
    for (int u = pair; u < pair + 2; ++u) {
      const int place = source.place(u);
      source.wait(b, place);
      b.wait_full(b.ring);
      __syncwarp();
      settle(result);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < CHUNKS; k += 2 * PARTS) {
        F::mma(result, activations.at((place * CHUNKS + k) * ROWS * 16),
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
  }
  wgmma_wait<0>();
  settle(result);
  b.release(held, 1);
}

// Four numbers of each thread of a group, for other groups.
__device__ __forceinline__ float4* quad(const Block& b, int index, int group) {
  return reinterpret_cast<float4*>(b.memory + GIVEN) + (index * GROUPS + group) * 128 +
         b.thread % 128;
}

// The four numbers from `sum` on += what `group` gave.
__device__ __forceinline__ void add_quad(float* sum, const Block& b, int index, int group) {
  const float4 v = *quad(b, index, group);
  sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
}
__device__ __forceinline__ void add_other_groups(float (&sum)[4], const Block& b, int index) {
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) {
    if (g != b.group) add_quad(sum, b, index, g);
  }
}

// Two neighbours of each of a thread's two rows turn by the angle of their position, bf16.
struct Turn {
  float cos[2] = {1.0f, 1.0f}, sin[2] = {0.0f, 0.0f};

  __device__ __forceinline__ void load(const Block& b, const Arguments& a, int column) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (b.row + 8 * i >= ROWS) continue;
      const long at = long(b.prefix + b.row + 8 * i) * (HEAD / 2) + column / 2;
      cos[i] = a.cos[at], sin[i] = a.sin[at];
    }
  }
  template <typename Store>
  __device__ __forceinline__ void apply(const Block& b, const float (&v)[4], float alpha,
                                        Store store) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (b.row + 8 * i >= ROWS) continue;
      const float even = alpha * v[2 * i], odd = alpha * v[2 * i + 1];
      store(b.row + 8 * i, pack_bf16(even * cos[i] - odd * sin[i], odd * cos[i] + even * sin[i]));
    }
  }
};

// Queries of this block's share of its head, eight columns a group, to all peers; then eight columns
// of keys or values, by the first group, to all blocks.
__device__ __forceinline__ void qkv(Block& b, const Arguments& a, float alpha) {
  constexpr int QUERY_CHUNKS = HEAD / PEERS / 8;
  static_assert(QUERY_CHUNKS == GROUPS, "eight columns a group");
  const bool recent = b.group == 0;
  const int chunk = QUERY_CHUNKS * b.rank + b.group, column = b.lane % 4 * 2;
  Turn turn, recent_turn;
  turn.load(b, a, 8 * chunk + column);
  if (recent && 8 * b.index < HEAD) recent_turn.load(b, a, 8 * b.index + column);  // keys

  float result[QKV_TILE / 2];
  multiply<Format, QKV_TILE, QKV_TILE, QKV_CHUNKS, GROUPS>(
      result, b, QKV_UNITS, AREA, b.group, 0, PieceOfX<QKV_CHUNKS>{0});
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
  add_other_groups(sum, b, b.group);
  turn.apply(b, sum, alpha, [&](int row, u32 word) {
    store_shared(b.shared + QUERIES + (chunk * ROWS + row) * 16 + column * 2, word);
  });
  wait(b.shared + X_FREE, 0);
  b.share(QUERIES + b.rank * QUERY_PIECE, QUERY_PIECE, QUERIES_FULL, KEY_UNITS);
  if (!recent) return;
  add_other_groups(recent_sum, b, QUERY_CHUNKS);
  recent_turn.apply(b, recent_sum, alpha, [&](int row, u32 word) {
    const int split = row * PEERS / ROWS, slot = row - Split::begin(split);
    char* to = b.buffers + RECENT + ((split * BLOCKS + b.index) * RECENT_SLOTS + slot) * 16;
    store_relaxed(to + column * 2, word);
  });
  mbarrier_arrive(b.shared + RECENT_STORED, 1);
}

// Of a tile of 128 rows, the first whose sums a group ends with.
__device__ __forceinline__ int quarter(const Block& b) {
  return TILE / 2 * (b.group % 2) + TILE / 4 * (b.group / 2);
}

// The next units of tiles of 128 rows. A group multiplies half of the rows and half of K, and gives
// half of the result to the group that has the other half of K. In the end a thread has eight sums
// of each of its two rows of the operand: of every eight rows of the tile the same two. IN_AREA: the
// operand lies where groups give.
template <typename F, bool IN_AREA = false, typename Source>
__device__ __forceinline__ void wide_product(float (&sum)[16], Block& b, int units, int operand,
                                             Source source) {
  const int half = b.group / 2;
  float result[TILE / 4];
  multiply<F, TILE / 2, TILE, TILE_CHUNKS, 2>(result, b, units, operand, half,
                                              TILE / 2 * (b.group % 2), source);
  if (IN_AREA) {
    all_consumers();
    b.free_x();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float given[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Of a row's eight numbers in either half, the first or last four.
      const int low = 4 * (i % 2 * 2 + j / 2) + 2 * (i / 2) + j % 2, high = low + 16;
      given[j] = half ? result[low] : result[high];
      sum[4 * i + j] = half ? result[high] : result[low];
    }
    if (b.row + 8 * (i / 2) < ROWS) {
      *quad(b, i, b.group) = make_float4(given[0], given[1], given[2], given[3]);
    }
  }
  named_barrier(8 + b.group % 2, CONSUMERS / 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (b.row + 8 * (i / 2) < ROWS) add_quad(sum + 4 * i, b, i, b.group ^ 2);
  }
}

// Columns 128 · rank … of a cluster's share of the out or down projection. Tiles are packed so that
// the eight sums of a row are neighbours.
__device__ __forceinline__ void project(Block& b, bool mlp, float alpha) {
  const u32 mark = mark_of(mlp);
  const int units = mlp ? DOWN_UNITS : OUT_UNITS;
  float sum[16];
  wide_product<Format>(sum, b, units, mlp ? HIDDEN : MERGED,
                       FromPeers(b, mlp ? HIDDEN_FULL : MERGED_FULL, units));
  const int column = b.rank * TILE + quarter(b) + b.lane % 4 * 8;
  char* to = b.buffers + SUMS + b.head * (WIDTH * 2) + column * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = alpha * sum[8 * i + j];
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
  wide_product<Format, true>(sum, b, WIDE_UNITS, AREA, PieceOfX<TILE_CHUNKS>{1});
  const int column = b.rank * (TILE / 2) + quarter(b) / 2 + b.lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    float hidden[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      hidden[j] = gated(alpha * sum[8 * i + 2 * j], alpha * sum[8 * i + 2 * j + 1]);
    }
    store_operand(b, HIDDEN, row, column, hidden, inverse_scale);
  }
  wait(b.shared + X_FREE, 1);
  b.share(HIDDEN + b.rank * HIDDEN_PIECE, HIDDEN_PIECE, HIDDEN_FULL, DOWN_UNITS);
}

}  // namespace
