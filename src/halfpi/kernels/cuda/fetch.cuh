// The warps that do not compute: one streams weights and cached keys and values into the ring, two
// copy what other blocks write, one gives peers what this block wrote.
#pragma once
#include "block.cuh"

namespace {

// What comes to the L2 ahead of the copies of a block's weights, which repeat every step. With fp8
// that gains nothing.
struct Ahead {
  static constexpr int MOST = FP8 ? 0 : 2 << 16, PIECE = 8192, PACE = 115;  // bytes and clocks
  const char *begin, *end, *next;
  u64 once;
  int bytes = 0;

  __device__ __forceinline__ bool wants_more() const { return bytes < MOST; }
  __device__ __forceinline__ void fetch() {
    const int size = end - next < PIECE ? end - next : PIECE;
    if (elected()) bulk_prefetch(next, size, once);
    next += size, bytes += size;
    if (next == end) next = begin;
    pause(PACE);  // faster, it is in the way of others
  }
  __device__ __forceinline__ void copied(const char* unit, int size) {
    bytes -= size;
    if (bytes < 0) bytes = 0, next = unit + size == end ? begin : unit + size;
  }
};

// Warps of a block with rows that lay out cached keys and values, see lay_out_others.
constexpr int LAYING = (THREADS - CONSUMERS) / 32;

// A warp's place in the ring when it fills it.
struct Filler {
  u32 shared;
  Ahead ahead;
  Cursor at{0, 1};

  // Fetches ahead while there is no room.
  template <typename Start>
  __device__ __forceinline__ void fill(u32 bytes, Start start) {
    const u32 empty = shared + EMPTY + 8 * at.slot;
    while (ahead.wants_more() && !mbarrier_passed_already(empty, at.parity)) ahead.fetch();
    wait(empty, at.parity);
    if (elected()) {
      mbarrier_expect(shared + FULL + 8 * at.slot, bytes);
      start(shared + RING + at.slot * UNIT, shared + FULL + 8 * at.slot);
    }
    at.advance();
  }
};

__device__ __forceinline__ void stream_units(const Arguments& a, const Block& b) {
  const u64 once = policy_evict_first();  // all clusters read the cache, one block its weights
  const int cached = key_tiles(b.prefix) * 2 * KEY_UNITS;
  const char* begin = a.stream + long(b.index) * DEPTH * LAYER_BYTES;
  Filler ring{b.shared, {begin, begin + long(DEPTH) * LAYER_BYTES, begin, once}};
  auto stream = [&](const char* unit, int units, u32 bytes) {
#pragma unroll 1
    for (int i = 0; i < units; ++i, unit += bytes) {
      ring.fill(bytes, [&](u32 to, u32 full) { bulk_copy(to, unit, bytes, full, once); });
      ring.ahead.copied(unit, bytes);
    }
  };
  for (int step = 0; step < STEPS; ++step) {
    const char* weights = begin;
    for (int layer = 0; layer < DEPTH; ++layer, weights += LAYER_BYTES) {
      stream(weights, QKV_UNITS, QKV_UNIT);
      if (step == 0 && layer) await(place(b.counters, LAID_OUT) + layer, LAYING * (gridDim.x - BLOCKS));
      const char* unit = a.cache + (layer * PEERS + b.rank) * long(cached) * KEY_UNIT;
#pragma unroll 1
      for (int i = 0; i < cached; ++i, unit += KEY_UNIT) {
        ring.fill(KEY_UNIT, [&](u32 to, u32 full) { bulk_copy(to, unit, KEY_UNIT, full); });
      }
      stream(weights + QKV_BYTES, OUT_UNITS + TURNS * WIDE_UNITS + DOWN_UNITS, UNIT);
    }
  }
}

// Whether something of LINES lines of X is blank. A warp looks at a word of each, in all banks.
template <int LINES>
__device__ __forceinline__ bool some_blank_line(const Block& b, u32 copy) {
  bool some = false;
#pragma unroll
  for (int i = 0; i < (LINES + 31) / 32; ++i) {
    const int line = i * 32 + b.lane;
    const bool is_row = line % LINE_ROWS < ROWS && line < LINES;
    const bool is_blank = load_shared_word(copy + line * LINE + b.lane * 4) == BLANK;
    some |= is_row & is_blank;
  }
  return __any_sync(~0u, some);
}

// The same of keys and values, of each 16 bytes.
__device__ __forceinline__ bool some_blank_chunk(const Block& b, u32 copy) {
  bool some = false;
#pragma unroll
  for (int i = 0; i < RECENT_BYTES / 512; ++i) {
    some |= load_shared_word(copy + i * 512 + b.lane * 16 + b.lane / 8 * 4) == BLANK;
  }
  return __any_sync(~0u, some);
}

// Copies of what several blocks write, one after another, until nothing in one is blank. Two must not be
// under way to the same place: a later one may read something earlier, and bring it after all has come.
struct Copies {
  u32 to;
  const char* from;
  u32 bytes, copied, full;  // barriers: a copy is there, and nothing in one is blank

  __device__ __forceinline__ void start() const {
    if (!elected()) return;
    mbarrier_expect(copied, bytes);
    bulk_copy(to, from, bytes, copied);
  }
  template <typename SomeBlank>
  __device__ __forceinline__ void finish(u32& parity, SomeBlank some_blank) const {
    Watchdog watchdog;
    for (;; start()) {
      wait(copied, parity);
      parity ^= 1;
      if (!some_blank()) break;
      watchdog.check();
    }
    if (elected()) mbarrier_arrive(full, 1);
  }
};

// X, twice a layer, once the whole cluster has stored its sums: then nobody reads, here or to send it to
// peers, what X may replace. The counter alone would not do: a row counts when some of its sums are there.
// If X is apart, its first piece is copied from then on until it has come, and then the other.
__device__ __forceinline__ void fetch_rows(const Block& b) {
  constexpr int PIECE = X_BYTES / PIECES;
  u32 parities[PIECES] = {};
#pragma unroll 1
  for (int exchange = 0; exchange < STEPS * DEPTH * 2; ++exchange) {
    const char* from = b.buffers + X + exchange % 2 * X_BYTES;
    const auto piece = [&](int i) {
      return Copies{b.shared + X_AT + i * PIECE, from + i * PIECE, PIECE, b.shared + X_COPIED + 8 * i,
                    b.shared + X_FULL + 8 * i};
    };
    if (exchange) wait(b.shared + SUMS_STORED, (exchange - 1) % 2);
    await(place(b.counters, ROWS_DONE), (exchange + !X_APART) * ROWS);
#pragma unroll
    for (int i = 0; i < (X_APART ? 1 : PIECES); ++i) piece(i).start();
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      piece(i).finish(parities[i], [&] { return some_blank_line<PIECE / LINE>(b, piece(i).to); });
      if (X_APART && i + 1 < PIECES) piece(i + 1).start();
    }
  }
}

// What this block wrote of keys and values is no longer there, so that it may write those of `layer`. By a
// warp.
__device__ __forceinline__ void blank_recent(const Block& b, int layer) {
  for (int row = b.lane; row < ROWS; row += 32) {
    *reinterpret_cast<uint4*>(b.buffers + place_of_recent(b.index, row, layer)) =
        make_uint4(BLANK, BLANK, BLANK, BLANK);
  }
  __syncwarp();
}

// Keys and values of the actions, copied from when this block's are stored until all have come. When copies
// begin, all blocks have read those of the layer before, so this block's are made blank; it stores the next in
// their place once it is told that these have come.
__device__ __forceinline__ void fetch_recent(const Block& b) {
  u32 parity = 0;
#pragma unroll 1
  for (int layer = 0; layer < STEPS * DEPTH; ++layer) {
    wait(b.shared + RECENT_STORED, layer & 1);
    await(place(b.counters, RECENT_DONE), layer * BLOCKS);
    const Copies copies{
        b.shared + RECENT_KEYS, b.buffers + RECENT + layer % 2 * RECENT_BUFFER + b.rank * RECENT_BYTES,
        RECENT_BYTES, b.shared + RECENT_COPIED, b.shared + RECENT_FULL};
    copies.start();
    blank_recent(b, layer + 1);
    copies.finish(parity, [&] { return some_blank_chunk(b, copies.to); });
    if (!elected()) continue;
    __threadfence();
    arrive(place(b.counters, RECENT_DONE));
  }
}

// This block's piece of an operand, once it is written (in a turn of several), to the same place in all
// peers: first to those that will multiply it first (FromPeers). No two blocks send to the same peer at
// a time. barrier: of the first of the operand's units.
__device__ __forceinline__ void share(const Block& b, int operand, u32 bytes, int barrier,
                                      int units, OverX over_x, int turns = 1, int turn = 0) {
  const int pieces = PEERS / units, own = own_unit(b.rank, units);  // of a unit
  if (elected()) {
    for (int unit = 0; unit < units; ++unit) {
      mbarrier_expect(b.shared + barrier + 8 * unit, (pieces - (unit == own)) * bytes);
    }
  }
  b.until_piece_written(turns, turn);
  if (!X_APART && over_x != NOT) wait(b.shared + X_FREE, over_x);
  if (!elected()) return;
  const u32 piece = b.shared + operand + b.rank * bytes, full = b.shared + barrier + 8 * own;
#pragma unroll 1
  for (int i = 1; i < PEERS; ++i) {
    const int unit = (own - i / pieces) & (units - 1);
    const int peer = unit * pieces + ((b.rank + i) & (pieces - 1));
    bulk_push(in_block(piece, peer), piece, bytes, in_block(full, peer));
  }
}

__device__ __forceinline__ void share_pieces(const Block& b) {
#pragma unroll 1
  for (int layer = 0; layer < STEPS * DEPTH; ++layer) {
    share(b, QUERIES, QUERY_PIECE, QUERIES_FULL, KEY_UNITS, FIRST);
    share(b, MERGED, MERGED_PIECE, MERGED_FULL, OUT_UNITS, NOT);
    constexpr int UNITS = DOWN_UNITS / TURNS;
#pragma unroll 1
    for (int turn = 0; turn < TURNS; ++turn) {
      share(b, HIDDEN + turn * HIDDEN_PART, HIDDEN_PIECE, HIDDEN_FULL + 8 * UNITS * turn, UNITS, SECOND,
            TURNS, turn);
    }
  }
}

// A warp's share of laying out keys and values of the prefix as units of the ring, behind a split's keys
// zeros, for one layer. It moves pieces of four chunks of eight keys, several at a time.
__device__ __forceinline__ void lay_out(const Arguments& a, const Block& b, int layer, int warp, int warps) {
  constexpr int AT_A_TIME = 8, FOURS = HEAD / 8 / 4, EIGHTS = KEY_TILE / 8;
  constexpr int TILE_PIECES = FOURS * EIGHTS, TILE_BYTES = KEY_TILE * HEAD * 2;
  const int tiles = key_tiles(b.prefix), pieces = PEERS * tiles * 2 * TILE_PIECES;
  const auto key = [&](int piece) { return piece % EIGHTS * 8 + b.lane % 8; };
  const auto chunk = [&](int piece) { return piece / EIGHTS % FOURS * 4 + b.lane / 8; };
  const auto load = [&](int piece) {
    const int tile = piece / TILE_PIECES, rank = tile / 2 / tiles;
    const Split split(rank, b.prefix);
    const int place = tile / 2 % tiles * KEY_TILE + key(piece);
    if (piece >= pieces || place >= split.keys) return make_uint4(0, 0, 0, 0);
    // Of keys, the dimensions of which the block has queries come first (product.cuh).
    const int first = own_unit(rank, KEY_UNITS) * TILE_CHUNKS;
    const int which = tile % 2 ? value_chunk(chunk(piece)) : (chunk(piece) + first) % (HEAD / 8);
    const char* from = tile % 2 ? a.values : a.keys;
    const long row = layer * a.capacity + split.first + place;
    return *reinterpret_cast<const uint4*>(from + row * (HEAD * 2) + which * 16);
  };
  char* const laid_out = a.cache + long(layer) * PEERS * tiles * 2 * TILE_BYTES;
#pragma unroll 1
  for (int i = warp; i < pieces; i += AT_A_TIME * warps) {
    uint4 v[AT_A_TIME];
#pragma unroll
    for (int j = 0; j < AT_A_TIME; ++j) v[j] = load(i + j * warps);
#pragma unroll
    for (int j = 0; j < AT_A_TIME; ++j) {
      const int piece = i + j * warps;
      if (piece >= pieces) break;
      char* to = laid_out + piece / TILE_PIECES * TILE_BYTES;
      *reinterpret_cast<uint4*>(to + (chunk(piece) * KEY_TILE + key(piece)) * 16) = v[j];
    }
  }
}

// The first layer, by all warps of the launch before they meet.
__device__ __forceinline__ void lay_out_first(const Arguments& a, const Block& b) {
  lay_out(a, b, 0, b.index * (THREADS / 32) + b.thread / 32, gridDim.x * (THREADS / 32));
}

// The other layers, while those before are computed, by warps that have nothing else to do.
__device__ __forceinline__ void lay_out_others(const Arguments& a, const Block& b) {
  const int warps = (gridDim.x - BLOCKS) * LAYING;
#pragma unroll 1
  for (int layer = 1; layer < DEPTH; ++layer) {
    lay_out(a, b, layer, (b.index - BLOCKS) * LAYING + b.warp, warps);
    __syncwarp();
    if (elected()) {
      __threadfence();
      arrive(place(b.counters, LAID_OUT) + layer);
    }
  }
}

}  // namespace
