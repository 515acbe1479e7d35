// Matrix products of h rows with the weights of the ring, and what becomes of their results.
#pragma once
#include "block.cuh"

namespace {

// Where in an operand the K of a unit lies, and waiting for it. X comes in pieces, twice a layer.
template <int CHUNKS>
struct PieceOfX {
  static constexpr int UNITS = PIECE_CHUNKS / CHUNKS;
  int parity;
  using Operand = Swizzled;
  __device__ static __forceinline__ Operand of(u32 address) { return Operand(address); }
  __device__ static __forceinline__ u32 offset(int chunk) {
    return chunk / 8 * LINE_BYTES + chunk % 8 * 16;
  }
  __device__ __forceinline__ int place(int unit) const { return unit; }
  __device__ __forceinline__ u32 at(int place, int chunk) const {
    return offset(place * CHUNKS + chunk);
  }
  __device__ __forceinline__ void wait(const Block& b, int place) const {
    if (place % UNITS == 0) exchange::wait(b.shared + X_FULL + 8 * (place / UNITS), parity);
  }
};
// Other operands come from peers, in parts of so many units, and a block begins each with its own piece
// (expert_stream.py).
struct FromPeers {
  using Operand = Matrix;
  __device__ static __forceinline__ Operand of(u32 address) {
    return Operand(address, ROWS * 16, 128);
  }
  __device__ static __forceinline__ u32 offset(int chunk) { return chunk * ROWS * 16; }
  int barrier, last, first;
  __device__ __forceinline__ FromPeers(const Block& b, int barrier, int units)
      : barrier(barrier), last(units - 1), first(own_unit(b.rank, units)) {}
  __device__ __forceinline__ int place(int unit) const {
    return (TURNS > 1 ? unit & ~last : 0) | ((unit + first) & last);
  }
  __device__ __forceinline__ u32 at(int place, int chunk) const {
    if (TURNS == 1) return offset(place * TILE_CHUNKS + chunk);
    return (place > last ? HIDDEN_PART : 0) + offset((place & last) * TILE_CHUNKS + chunk);
  }
  __device__ __forceinline__ void wait(const Block& b, int place) const {
    b.wait_for(barrier + 8 * place);
  }
};

// What a product tells nobody: of each unit but the last that it is multiplied, and that the last is under
// way.
struct Untold {
  __device__ __forceinline__ void multiplied(int) const {}
  __device__ __forceinline__ void last_begun() const {}
};

// result (64 rows, 2 SUMS) = operand · the ring's next units, an even number; or, FLIPPED, its transpose
// (64 weights, LINE_ROWS), in which the tensor cores do not multiply 64 rows where fewer are. A unit
// has ROWS_W rows of weights, which count from `column` on, and CHUNKS of K, of which this is one of
// PARTS. USERS groups multiply it. Two units an iteration: four are slower. progress: see Untold.
template <typename F, bool FLIPPED, int ROWS_W, int CHUNKS, int PARTS, int USERS, int SUMS,
          typename Source, typename Progress = Untold>
__device__ __forceinline__ void multiply(float (&result)[SUMS], Block& b, int units, int operand,
                                         int column, int part, Source source,
                                         Progress progress = {}) {
  constexpr int SHARE = GROUPS / USERS;  // of what makes a unit free
#pragma unroll
  for (int i = 0; i < SUMS; ++i) result[i] = 0.0f;
  const typename Source::Operand activations =
      Source::of(b.shared + operand + part * Source::offset(2));
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
        const u64 x = activations.at(source.at(place, k));
        const u64 w = weights.at(b.ring.slot * UNIT + k * ROWS_W * 16);
        F::mma(result, FLIPPED ? w : x, FLIPPED ? x : w);
      }
      wgmma_commit();
      if (u) {
        wgmma_wait<1>();
        b.release(held, SHARE);
        progress.multiplied(u - 1);
      }
      held = b.ring.slot;
      b.ring.advance(1);
    }
  }
  progress.last_begun();
  wgmma_wait<0>();
  settle(result);
  b.release(held, SHARE);
}

constexpr int FLIPPED_SUMS = LINE_ROWS / 2;

// Of tiles of up to 128 rows: a group multiplies 64 of them.
template <typename F, bool FLIPPED, int ROWS_W = TILE, int SUMS, typename Source>
__device__ __forceinline__ void wide_product(float (&result)[SUMS], Block& b, int units, int operand,
                                             Source source) {
  static_assert(!FLIPPED || SUMS == FLIPPED_SUMS, "rows of actions, in eights");
  multiply<F, FLIPPED, ROWS_W, TILE_CHUNKS, 1, GROUPS>(result, b, units, operand, 64 * b.group, 0,
                                                       source);
}

// Of a flipped product, of row lane / 4 + 8 i, two neighbouring columns of a warp's first or second
// eight, times `factor`.
__device__ __forceinline__ u32 flipped_pair(const float (&result)[FLIPPED_SUMS], int i, int second,
                                            float factor) {
  const float* v = result + 4 * i + 2 * second;
  return transposed(pack_bf16(v[0] * factor, v[1] * factor));
}

// Eight columns of a result: a thread has two neighbours of each of two rows, which turn by the
// angle of the row's position. Then they are bf16.
struct Turn {
  float cos[2] = {1.0f, 1.0f}, sin[2] = {0.0f, 0.0f};

  __device__ __forceinline__ void load(const Block& b, const Arguments& a, int first) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (b.row + 8 * i >= ROWS) continue;
      const long at = long(b.prefix + b.row + 8 * i) * (HEAD / 2) + first / 2 + b.lane % 4;
      cos[i] = a.cos[at], sin[i] = a.sin[at];
    }
  }
  // Of the sum of both groups' results.
  template <typename Store>
  __device__ __forceinline__ void apply(const Block& b, const float* own, const float4& other,
                                        float alpha, Store store) const {
    const float sum[4] = {own[0] + other.x, own[1] + other.y, own[2] + other.z, own[3] + other.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float even = alpha * sum[2 * i], odd = alpha * sum[2 * i + 1];
      const u32 word = pack_bf16(even * cos[i] - odd * sin[i], odd * cos[i] + even * sin[i]);
      if (b.row + 8 * i < ROWS) store(b.row + 8 * i, word);
    }
  }
};

// This block's share of its head's queries, four chunks of eight columns, to all peers; and a chunk
// of keys or values of the actions to all blocks. So few columns that a group takes half of K: then
// each gives the other some chunks, and finishes the rest.
__device__ __forceinline__ void qkv(Block& b, const Arguments& a, const Scale& scale) {
  constexpr int CHUNKS = HEAD / PEERS / 8;
  static_assert(QKV_TILE == 8 * (CHUNKS + 1), "and one of keys or values");
  const auto finishes = [&](int chunk) { return (chunk >= CHUNKS / 2) == (b.group == 1); };
  Turn turns[CHUNKS + 1];
#pragma unroll
  for (int i = 0; i <= CHUNKS; ++i) {
    const int column = 8 * (i == CHUNKS ? b.index : CHUNKS * b.rank + i);
    if (finishes(i) && column < HEAD) turns[i].load(b, a, column);  // not values
  }
  float result[QKV_TILE / 2];
  multiply<Format, false, QKV_TILE, QKV_CHUNKS, GROUPS, GROUPS>(
      result, b, QKV_UNITS, X_AT, 0, b.group, PieceOfX<QKV_CHUNKS>{0});
  b.all_free_x();
  const bool gives = b.thread % 128 < GIVING;  // all that have a row of the actions
  float4* given = reinterpret_cast<float4*>(b.memory + GIVEN) + b.thread % 128;
#pragma unroll
  for (int i = 0; i <= CHUNKS; ++i) {
    if (finishes(i) || !gives) continue;
    given[GIVING * i] = make_float4(result[4 * i], result[4 * i + 1], result[4 * i + 2],
                                    result[4 * i + 3]);
  }
  all_consumers();
  const float alpha = scale.alpha();
  if (finishes(CHUNKS) && gives) {
    char* to = b.buffers + b.lane % 4 * 4;
    turns[CHUNKS].apply(b, result + 4 * CHUNKS, given[GIVING * CHUNKS], alpha, [&](int row, u32 word) {
      store_relaxed(to + place_of_recent(b.index, row, b.layer), word);
    });
  }
  if (finishes(CHUNKS)) mbarrier_arrive(b.shared + RECENT_STORED, 1);
  const u32 to = b.shared + QUERIES + b.rank * QUERY_PIECE + b.lane % 4 * 4;
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (!finishes(i) || !gives) continue;
    turns[i].apply(b, result + 4 * i, given[GIVING * i], alpha, [&](int row, u32 word) {
      store_shared(to + (i * ROWS + row) * 16, word);
    });
  }
  b.piece_written();
}

// Columns 128 · rank … of a cluster's share of the out or down projection. Tiles are packed so that
// four columns of a thread are neighbours.
__device__ __forceinline__ void project(Block& b, bool mlp, const Scale& scale) {
  const u32 mark = mark_of(mlp);
  const int units = mlp ? DOWN_UNITS : OUT_UNITS;
  float sum[FLIPPED_SUMS];
  wide_product<Format, true>(
      sum, b, units, mlp ? HIDDEN : MERGED,
      FromPeers(b, mlp ? HIDDEN_FULL : MERGED_FULL, mlp ? units / TURNS : units));
  const float alpha = scale.alpha();
  const int column = b.rank * TILE + 64 * b.group + 16 * b.warp + b.lane % 4 * 4;
  char* to = b.buffers + SUMS + b.head * (WIDTH * 2) + column * 2;
#pragma unroll
  for (int i = 0; i < LINE_ROWS / 8; ++i) {
    const int row = b.lane / 4 + 8 * i;
    const u32 low = flipped_pair(sum, i, 0, alpha), high = flipped_pair(sum, i, 1, alpha);
    if (row < ROWS) store_relaxed(to + row * SUMS_BYTES, marked(low, high, mark));
  }
  if (b.lane < PEERS) mbarrier_arrive_at(in_block(b.shared + SUMS_STORED, b.lane));
}

// GELU(gate) · 2 up.
__device__ __forceinline__ float gated(u32 gate_up) {
  const float gate = low_bf16(gate_up);
  return gelu_product(gate, gate * high_bf16(gate_up));
}

// In turns, hidden activations replace a piece of X each, once the second group is past those pieces, here
// and in all peers. A turn ends when its last unit is there: the next must not wait for what replaces a
// unit in the ring before the first has seen that.
struct Turns {
  using Source = PieceOfX<WIDE_CHUNKS>;
  const Block& b;

  __device__ __forceinline__ void multiplied(int unit) const {
    if (TURNS == 1 || unit != TURNS * Source::UNITS - 1 || b.group != GROUPS - 1) return;
    b.together();
    b.free_x<4>(b.warp);
  }
  __device__ __forceinline__ void last_begun() const { b.end_turn(); }
};

// Gate and up lie side by side; two hidden columns a thread.
__device__ __forceinline__ void geglu(Block& b, const Scale& scale, const Scale& next) {
  constexpr int COLUMNS = WIDE_TILE / 2;  // of a turn
  const int turn = TURNS > 1 ? b.group : 0, group = TURNS > 1 ? 0 : b.group;  // of the turn
  float sum[FLIPPED_SUMS];
  if (TURNS > 1) b.ring.skip(turn * WIDE_UNITS);
  b.await_turn();
  multiply<Format, true, WIDE_TILE, WIDE_CHUNKS, 1, GROUPS / TURNS>(
      sum, b, WIDE_UNITS, X_AT, 64 * group, 0, Turns::Source{1}, Turns{b});
  if (TURNS > 1) {
    b.ring.skip((TURNS - 1 - turn) * WIDE_UNITS);
  } else {
    b.all_free_x();
  }
  const bool is_up = b.lane / 4 % 2;  // before it is transposed
  const float factor = scale.alpha() * (is_up ? 0.5f * next.inverse() : 1.0f);
#pragma unroll
  for (int i = 0; i < LINE_ROWS / 8; ++i) {
    sum[2 * i] = gated(flipped_pair(sum, i, 0, factor));
    sum[2 * i + 1] = gated(flipped_pair(sum, i, 1, factor));
  }
  if (TURNS > 1) wait(b.shared + X_FREE, SECOND);
  const int column = b.rank * COLUMNS + 32 * group + 8 * b.warp + b.lane % 4 * 2;
  const u32 to = b.shared + HIDDEN + turn * HIDDEN_PART;
#pragma unroll
  for (int i = 0; i < LINE_ROWS / 8; ++i) {
    const int row = b.lane / 4 + 8 * i;
    if (row < ROWS) {
      store_pair<FP8>(place_in_operand(to, row, column), sum[2 * i], sum[2 * i + 1]);
    }
  }
  b.piece_written(TURNS, turn);
  if (TURNS > 1) all_consumers();  // what they wrote is an operand of all
}

}  // namespace
