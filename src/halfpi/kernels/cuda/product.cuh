// Matrix products of h rows with the weights of the ring, and what becomes of their results.
#pragma once
#include "block.cuh"

namespace {

// result (64 rows, N) = operand · the ring's next units. A unit has ROWS_W rows of weights, of which N
// from `column` on count, and CHUNKS of K, of which this group multiplies one of PARTS.
template <typename F, int N, int ROWS_W, int CHUNKS, int PARTS, typename Ready>
__device__ __forceinline__ void multiply(float (&result)[N / 2], Block& b, int units, int operand,
                                         int part, int column, Ready ready) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) result[i] = 0.0f;
  const Matrix activations(b.shared + operand + 2 * part * ROWS * 16, ROWS * 16, 128);
  const Matrix weights(b.shared + RING + (column + 2 * part * ROWS_W) * 16, ROWS_W * 16, 128);
  int held = 0;  // the slot whose product may still be under way
#pragma unroll 1
  for (int u = 0; u < units; ++u) {
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

// Where four columns of partial sums lie in a row: neighbours change places in every other four
// rows, so that eight threads with the same columns of eight rows read different banks.
__device__ __forceinline__ int swizzled(int row, int column) { return column ^ (row & 4); }

// Rows of a group's result to its place among the partial sums.
template <int N>
__device__ __forceinline__ void store_partial(const float (&result)[N / 2], const Block& b,
                                              float* to, int stride) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    int row = b.row + 8 * i;
    if (row >= ROWS) continue;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      *reinterpret_cast<float2*>(to + row * stride + 8 * j + swizzled(row, 2 * (b.lane % 4))) =
          make_float2(result[4 * j + 2 * i], result[4 * j + 2 * i + 1]);
    }
  }
}

// alpha · Σ over PARTS partial sums that lie PART floats apart, of columns `column` … of a row.
template <int COUNT, int PARTS, int PART>
__device__ __forceinline__ void sum_partials(float (&v)[COUNT], const float* of_row, int row,
                                             int column, float alpha) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
      float4 part =
          *reinterpret_cast<const float4*>(of_row + p * PART + swizzled(row, column + i));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    v[i] = alpha * sum.x, v[i + 1] = alpha * sum.y;
    v[i + 2] = alpha * sum.z, v[i + 3] = alpha * sum.w;
  }
}

// Eight neighbours of a row turn by the angles of its position, bf16.
struct Turn {
  float cos[4], sin[4];

  __device__ void load(const Arguments& a, long position, int column, bool turns) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      long at = position * (HEAD / 2) + column / 2 + i;
      cos[i] = turns ? a.cos[at] : 1.0f, sin[i] = turns ? a.sin[at] : 0.0f;
    }
  }
  __device__ __forceinline__ uint4 apply(const float (&v)[8]) const {
    float w[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w[2 * i] = v[2 * i] * cos[i] - v[2 * i + 1] * sin[i];
      w[2 * i + 1] = v[2 * i + 1] * cos[i] + v[2 * i] * sin[i];
    }
    return pack_eight_bf16(w);
  }
};

// Queries of this block's share of its head, to all peers; eight columns of keys or values, by the
// last threads, to all blocks.
__device__ __forceinline__ void qkv(Block& b, const Arguments& a, float alpha) {
  constexpr int PART = ROWS * QKV_TILE, QUERY_CHUNKS = HEAD / PEERS / 8, LAST = CONSUMERS - STORING;
  const bool recent = b.thread >= LAST;
  const int chunk = recent ? QUERY_CHUNKS : b.thread / 64, row = b.thread % 64;
  const bool finishes = row < ROWS && (recent || chunk < QUERY_CHUNKS);
  const int column = recent ? 8 * b.index % HEAD : HEAD / PEERS * b.rank + 8 * chunk;
  Turn turn;
  turn.load(a, b.prefix + row, column, finishes && !(recent && 8 * b.index >= HEAD));

  float result[QKV_TILE / 2];
  multiply<Format, QKV_TILE, QKV_TILE, QKV_CHUNKS, GROUPS>(
      result, b, QKV_UNITS, AREA, b.group, 0, PieceReady<QKV_CHUNKS>{b, 0});
  all_consumers();  // X is read
  store_partial<QKV_TILE>(result, b, b.floats(PARTIALS) + b.group * PART, QKV_TILE);
  all_consumers();
  b.free_x();
  if (finishes) {
    float v[8];
    sum_partials<8, GROUPS, PART>(v, b.floats(PARTIALS) + row * QKV_TILE, row, 8 * chunk, alpha);
    const uint4 turned = turn.apply(v);
    if (recent) {
      int split = row * PEERS / ROWS, slot = row - Split::begin(split);
      store_relaxed(b.buffers + RECENT + ((split * BLOCKS + b.index) * RECENT_SLOTS + slot) * 16,
                    Words{{turned.x, turned.y}, {turned.z, turned.w}});
    } else {
      store_shared(b.shared + QUERIES + ((QUERY_CHUNKS * b.rank + chunk) * ROWS + row) * 16, turned);
    }
  }
  if (b.thread < 64 * QUERY_CHUNKS) {
    wait(b.shared + X_FREE, 0);
    b.share(QUERIES + b.rank * QUERY_PIECE, QUERY_PIECE, QUERIES_FULL, 64 * QUERY_CHUNKS);
  } else if (recent) {
    mbarrier_arrive(b.shared + RECENT_STORED, 1);
  }
}

// The next units of tiles of 128 rows: each group has half of the rows and half of K. Ends with two
// partial sums of each row.
constexpr int WIDE_PART = ROWS * STRIDE;
template <typename Ready>
__device__ __forceinline__ void wide_product(Block& b, int units, int operand, Ready ready) {
  const int column = b.group % 2 * (TILE / 2), part = b.group / 2;
  float result[TILE / 4];
  multiply<Format, TILE / 2, TILE, TILE_CHUNKS, 2>(result, b, units, operand, part, column, ready);
  all_consumers();  // what lay in the area is read
  store_partial<TILE / 2>(result, b, b.floats(PARTIALS) + part * WIDE_PART + column, STRIDE);
  all_consumers();
}

// Columns 128 · rank … of a cluster's share of the out or down projection.
__device__ __forceinline__ void project(Block& b, bool mlp, float alpha) {
  constexpr int LANES = TILE / 4;
  const u32 mark = mark_of(mlp);
  b.wait_for(mlp ? HIDDEN_FULL : MERGED_FULL);
  wide_product(b, mlp ? DOWN_UNITS : OUT_UNITS, mlp ? HIDDEN : MERGED, AllReady());
  const int first = b.thread / LANES, column = b.thread % LANES * 4;
  char* to = b.buffers + SUMS + b.head * (WIDTH * 2) + (b.rank * TILE + column) * 2;
#pragma unroll
  for (int i = 0; i < ROWS; i += CONSUMERS / LANES) {
    const int row = first + i;
    if (row >= ROWS) continue;
    float v[4];
    sum_partials<4, 2, WIDE_PART>(v, b.floats(PARTIALS) + row * STRIDE, row, column, alpha);
    store_relaxed(to + row * SUMS_BYTES,
                  marked(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), mark));
  }
}

__device__ __forceinline__ float gated(float gate, float up) {
  float u = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 √(2/π) …
  return __fdividef(gate, 1.0f + exp2_fast(-1.44269504f * u)) * up;
}

// Gate and up lie side by side; eight hidden columns a thread.
__device__ __forceinline__ void geglu(Block& b, float alpha, float inverse_scale) {
  wide_product(b, WIDE_UNITS, AREA, PieceReady<TILE_CHUNKS>{b, 1});
  b.free_x();
  const int row = b.thread % 64, eighth = b.thread / 64;
  if (row < ROWS) {
    float wide[16], hidden[8];
    sum_partials<16, 2, WIDE_PART>(wide, b.floats(PARTIALS) + row * STRIDE, row, 16 * eighth, alpha);
#pragma unroll
    for (int i = 0; i < 8; ++i) hidden[i] = gated(wide[2 * i], wide[2 * i + 1]);
    store_operand(b, HIDDEN, 8 * b.rank + eighth, row, hidden, inverse_scale);
  }
  wait(b.shared + X_FREE, 1);
  b.share(HIDDEN + b.rank * HIDDEN_PIECE, HIDDEN_PIECE, HIDDEN_FULL, CONSUMERS);
}

}  // namespace
