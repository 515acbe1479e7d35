// What the parts of the kernel share: constants, arguments, and a thread's view of its block.
#pragma once
#include "exchange.cuh"
#include "wgmma.cuh"

using namespace exchange;

namespace {

constexpr int GROUPS = 2, CONSUMERS = 128 * GROUPS;      // warpgroups that compute
constexpr int THREADS = CONSUMERS + 128;                 // the last group copies
constexpr int ROW_THREADS = CONSUMERS / ROWS_PER_BLOCK;  // of a row of the actions

// Tiles of weights: rows, and 16-byte chunks of K in a unit of the ring.
constexpr int UNIT = 16384;
constexpr int TILE = 128, TILE_CHUNKS = UNIT / (TILE * 16);
// Groups multiply gate/up together, or in TURNS, each rows of its own from units of its own. Hidden
// activations of the first then go to peers while the second multiplies.
static_assert(TURNS == 1 || TURNS == GROUPS, "all groups, or each after the other");
constexpr int WIDE_TILE = TILE / TURNS, WIDE_CHUNKS = UNIT / (WIDE_TILE * 16);
constexpr int QKV_TILE = HEAD / PEERS + 2 * HEAD / BLOCKS, QKV_CHUNKS = 2 * TILE_CHUNKS;
constexpr int QKV_UNIT = QKV_CHUNKS * QKV_TILE * 16, QKV_UNITS = WIDTH / CHUNK / QKV_CHUNKS;
constexpr int OUT_UNITS = HEAD / CHUNK / TILE_CHUNKS, WIDE_UNITS = WIDTH / CHUNK / WIDE_CHUNKS;
constexpr int DOWN_UNITS = MLP / HEADS / CHUNK / TILE_CHUNKS;
// A tile of keys or values has KEY_TILE keys, whose units are as many whatever that is.
constexpr int KEY_UNITS = HEAD / 8 / TILE_CHUNKS, KEY_UNIT = TILE_CHUNKS * KEY_TILE * 16;
static_assert(KEY_TILE % 16 == 0 && KEY_TILE <= TILE, "products take sixteen keys, and units have room");
static_assert(FEW || KEY_TILE == TILE, "groups of many rows take 64 keys each");
constexpr int QKV_BYTES = QKV_UNITS * QKV_UNIT;
constexpr int LAYER_BYTES = QKV_BYTES + (OUT_UNITS + TURNS * WIDE_UNITS + DOWN_UNITS) * UNIT;
// X of few rows in E4M3 is so small that it has room of its own. So it may be copied before it has come, and
// nobody waits until it is read.
constexpr bool X_APART = FEW && FP8;
constexpr int PIECES = X_APART ? 2 : 4, PIECE_CHUNKS = WIDTH / CHUNK / PIECES;  // of X

constexpr int HALF_A_TRIP = 250;  // in clocks, of a load from L2 at its fastest
constexpr float EPS = 1e-6f;
constexpr float LOGIT_SCALE = 0.0625f * 1.44269504f;  // 1/√k · log2 e
using Format = hopper::conditional<FP8, hopper::E4m3, hopper::Bf16>::type;

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Of attention: numbers of each row, and all those that a block works with (attention_few.cuh,
// attention_many.cuh).
constexpr int WARPS = 4 * GROUPS, STATISTIC = 64 * 4;
constexpr int STATISTICS_BYTES = (FEW ? 3 * WARPS + 2 : 4 * GROUPS) * STATISTIC;
constexpr int ROW_PARTS = FEW ? 32 : 64, ROW_PART_BYTES = ROW_PARTS * 8;  // of a block's keys

// Shared memory. The area has X, unless that is apart; then what groups give each other, what attention
// needs, or hidden activations, those of each turn where a piece of X was. Peers push queries and hidden
// activations once this block has told that it is done with the X that they replace. Averages, which are
// divided when they are merged, are staged for peers where queries were.
constexpr int AREA = 0, HIDDEN = AREA, WEIGHTS = AREA;
constexpr int WEIGHED = KEY_TILE + 16;  // keys of a tile, those of actions, and zeros
constexpr int STATISTICS = WEIGHTS + WEIGHED * (FEW ? LINE_ROWS : 64) * 2;
constexpr int QUERIES = STATISTICS + STATISTICS_BYTES;
constexpr int STAGED = QUERIES, AVERAGES = QUERIES + ROWS * HEAD * 2;
constexpr int MERGED = AVERAGES + ROWS * HEAD * 2, PARTS_OF_ROWS = MERGED + ROWS * HEAD * BYTES;
constexpr int RECENT_KEYS = PARTS_OF_ROWS + PEERS * ROW_PART_BYTES;
constexpr int RECENT_VALUES = RECENT_KEYS + RECENT_BYTES / 2;
// What groups give each other of q, k and v, by so many threads of each, while peers may push queries.
constexpr int GIVING = (ROWS + 15) / 16 * 32, GIVEN_BYTES = QKV_TILE / 8 * GIVING * 16;
constexpr int GIVEN = FEW ? RECENT_KEYS + RECENT_BYTES : AREA;
static_assert(GIVEN >= MERGED || GIVEN + GIVEN_BYTES <= QUERIES, "queries are not pushed over it");
constexpr int USED = larger(RECENT_KEYS + RECENT_BYTES, GIVEN + GIVEN_BYTES);
constexpr int AREA_BYTES = X_APART ? USED : larger(X_BYTES, USED);
constexpr int X_AT = X_APART ? (AREA_BYTES + 1023) / 1024 * 1024 : AREA;
constexpr int RING = X_APART ? X_AT + X_BYTES : (AREA_BYTES + 127) / 128 * 128;
constexpr int BARRIERS = SHARED_BYTES - 1024, SLOTS = (BARRIERS - RING) / UNIT;
static_assert(SLOTS >= KEY_UNITS, "a group that skips values knows the parities of their slots");
constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * SLOTS, X_FULL = EMPTY + 8 * SLOTS;
constexpr int X_COPIED = X_FULL + 8 * PIECES;
constexpr int QUERIES_FULL = X_COPIED + 8 * PIECES, MERGED_FULL = QUERIES_FULL + 8 * PEERS;
constexpr int HIDDEN_FULL = MERGED_FULL + 8 * PEERS, AVERAGES_FULL = HIDDEN_FULL + 8 * PEERS;
constexpr int RECENT_COPIED = AVERAGES_FULL + 8, RECENT_FULL = RECENT_COPIED + 8;
constexpr int RECENT_STORED = RECENT_FULL + 8, X_FREE = RECENT_STORED + 8, SUMS_STORED = X_FREE + 8;
constexpr int SQUARES = (SUMS_STORED + 8 + 15) / 16 * 16, ACTIONS = SQUARES + 64;
static_assert(ACTIONS + 256 <= SHARED_BYTES, "barriers and small things fit");
// Bytes that one block of a cluster gives the others.
constexpr int QUERY_PIECE = ROWS * HEAD / PEERS * 2, AVERAGE_PIECE = QUERY_PIECE;
constexpr int MERGED_PIECE = ROWS * HEAD / PEERS * BYTES;
constexpr int HIDDEN_PIECE = ROWS * MLP / BLOCKS / TURNS * BYTES;
constexpr int HIDDEN_PART = TURNS > 1 ? X_BYTES / PIECES : X_BYTES;  // of X, that a turn's replace
static_assert(PEERS * HIDDEN_PIECE <= (X_APART ? AREA_BYTES : HIDDEN_PART), "hidden activations have room");

struct Arguments {
  const char* stream;  // (block, layer, LAYER_BYTES)
  char* buffers;
  char* cache;         // (layer, split, tile, keys and values, chunk, key, 16 bytes)
  u32* counters;
  const float* actions;
  float* result;
  const char *keys, *values;
  long long capacity;
  const int *prefix_count, *decided;
  const float *cos, *sin, *modulations, *target, *weights, *gains;
  const float *weight_in, *bias_in, *weight_out, *bias_out;  // weight_in is (a, d)
  const float *input_scales, *weight_scales;
};

// Of the first or second product of half a layer at a step: loaded where this is made, long before
// it is used.
struct Scale {
  float input = 1.0f, weight = 1.0f;

  __device__ __forceinline__ Scale(const Arguments& a, int step, int half, int product) {
    if (!FP8) return;
    input = load_early(a.input_scales + (step * 2 * DEPTH + half) * 2 + product);
    weight = load_early(a.weight_scales + half * 2 + product);
  }
  __device__ __forceinline__ float alpha() const { return input * weight; }
  __device__ __forceinline__ float inverse() const { return FP8 ? reciprocal(input) : 1.0f; }
};

// A piece for peers lies where X was, which they have read the first or second time of a layer; or not.
enum OverX { FIRST, SECOND, NOT };

// Which rows of the cache and of the actions are keys of a split; all are shared out evenly.
struct Split {
  int first, keys, recent;

  __device__ Split(int split, int prefix) {
    first = split * prefix / PEERS;
    keys = (split + 1) * prefix / PEERS - first;
    const int first_recent = begin(split);
    recent = begin(split + 1) - first_recent;
  }
  __device__ static int begin(int split) { return (split * ROWS + PEERS - 1) / PEERS; }
};
__device__ __forceinline__ int key_tiles(int prefix) {  // of the longest split
  int longest = (prefix + PEERS - 1) / PEERS;
  return longest > KEY_TILE ? (longest + KEY_TILE - 1) / KEY_TILE : 1;
}

// A unit of values has half of what each of four peers merges, so that all peers get something
// while the other half is multiplied. Of the chunk at `place` among a row's values, which it is.
__device__ __forceinline__ int value_chunk(int place) {
  return (place & 0x11) | (place & 0x6) << 1 | (place & 0x8) >> 2;
}
__device__ __forceinline__ int place_of_value(int chunk) {
  return (chunk & 0x11) | (chunk & 0xC) >> 1 | (chunk & 0x2) << 2;
}

// Where a block's chunk of the keys and values of actions lies in those of a layer.
__device__ __forceinline__ long place_of_recent(int block, int row, int layer) {
  constexpr int CHUNKS = HEAD / 8;
  const int split = row * PEERS / ROWS, slot = row - Split::begin(split);
  const int place = block < CHUNKS ? block : CHUNKS + place_of_value(block - CHUNKS);
  return RECENT + layer % 2 * RECENT_BUFFER + ((split * BLOCKS + place) * RECENT_SLOTS + slot) * 16;
}

using Cursor = RingCursor<SLOTS>;

__device__ __forceinline__ void all_consumers() { named_barrier(1, CONSUMERS); }

// Peers give an operand in equal pieces. This unit has the piece of `rank`.
__device__ __forceinline__ int own_unit(int rank, int units) { return rank * units / PEERS; }
static_assert(PEERS % OUT_UNITS == 0 && PEERS * TURNS % DOWN_UNITS == 0 && PEERS % KEY_UNITS == 0,
              "a unit has whole pieces, and units are a power of two");

struct Block {
  u32 shared;
  char* memory;
  char* buffers;
  u32* counters;
  int index, head, rank;          // in the launch: 8 head + rank, and behind them blocks with rows
  int thread, group, warp, lane;  // warp of the group
  int row;                        // of a thread's two in a product the first: the other is 8 on
  int prefix, decided;            // counts of keys, and of rows that stay as they are
  Cursor ring;                    // the next unit
  int layer = 0;                  // over all steps

  __device__ __forceinline__ float* floats(int at) const {
    return reinterpret_cast<float*>(memory + at);
  }
  __device__ __forceinline__ void wait_full(const Cursor& at) const {
    wait(shared + FULL + 8 * at.slot, at.parity);
  }
  // By all warps of a group: they are done with a unit. It is free once all warps gave 1 each, or
  // those of one group GROUPS each.
  __device__ __forceinline__ void release(int slot, int count) const {
    if (lane == 0) mbarrier_arrive(shared + EMPTY + 8 * slot, count);
  }
  // By so many warps, of which this is one: nothing here needs what peers will overwrite, which they are
  // told.
  template <int WARPS>
  __device__ __forceinline__ void free_x(int one) const {
    if (!elected()) return;
#pragma unroll
    for (int i = 0; i < PEERS; i += WARPS) mbarrier_arrive_at(in_block(shared + X_FREE, i + one));
  }
  // By all that compute, when they have met.
  __device__ __forceinline__ void all_free_x() const {
    if (X_APART) return;
    all_consumers();
    free_x<4 * GROUPS>(4 * group + warp);
  }
  // For an operand that this layer has once.
  __device__ __forceinline__ void wait_for(int barrier) const { wait(shared + barrier, layer & 1); }
  // By all that compute, or those of a turn, and the warp that shares: this block's piece of an operand
  // is written.
  __device__ __forceinline__ void piece_written(int turns = 1, int turn = 0) const {
    fence_async_proxy();
    until_piece_written(turns, turn);
  }
  __device__ __forceinline__ void until_piece_written(int turns, int turn) const {
    named_barrier(6 + turn, CONSUMERS / turns + 32);
  }
  // All threads of a group meet.
  __device__ __forceinline__ void together() const { named_barrier(4 + group, 128); }
  // If there are turns, the second of two groups begins once the first ends its own.
  __device__ __forceinline__ void await_turn() const {
    if (TURNS > 1 && group) named_barrier(8, CONSUMERS);
  }
  __device__ __forceinline__ void end_turn() const {
    if (TURNS > 1 && !group) named_barrier_arrive(8, CONSUMERS);
  }
};

__device__ __forceinline__ int place_in_operand(int operand, int row, int column) {
  return operand + (column / CHUNK * ROWS + row) * 16 + column % CHUNK * BYTES;
}

// Columns `column` to `column` + 7 of `row` of an operand in shared memory.
__device__ __forceinline__ void store_operand(const Block& b, int operand, int row, int column,
                                              const float (&v)[8], float inverse_scale) {
  const u32 to = b.shared + place_in_operand(operand, row, column);
  if constexpr (FP8) {
    store_shared(to, eight_e4m3(v, inverse_scale));
  } else {
    store_shared(to, eight_bf16(v));
  }
}

}  // namespace
