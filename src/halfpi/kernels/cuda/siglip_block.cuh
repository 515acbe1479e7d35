// What the threads of a block of siglip_layers.cu share: shared memory, its barriers, and how blocks hand
// rows to each other.
//
// A block has 64 rows of an image for each of its groups of 128 threads, and of each product's columns a
// sixteenth: its head's, or as many. So sixteen blocks have the same rows, a team, and nobody else needs
// those, but for keys and values, which the image's other blocks with this head read. Rows go through the
// L2. A block that has stored its part of them tells so with a flag of its own, a word with a number that
// differs from the one before; those that launches leave (DEPTH, 2 DEPTH, DEPTH - 1) differ from the first
// (1, 2). No buffer needs another copy but for keys and values: whoever writes one again has waited,
// directly or through others, for all that read it before.
#pragma once
#include "siglip.cuh"

namespace {

using namespace siglip;

constexpr int HEADS = 16, WIDTH = HEADS * HEAD, HIDDEN = 4352;
constexpr int GROUP_ROWS = 64, ROWS = GROUP_ROWS * GROUPS, WARPS = 4 * GROUPS;
constexpr int TEAMS = TOKENS / ROWS;  // of an image
// The hidden columns of a block come in two parts, each between those of the other blocks.
constexpr int FIRST = 2 * HEAD, LAST = HIDDEN / HEADS - FIRST, LAST_BEGIN = HEADS * FIRST;

// Operands come as lines of 128 bytes of a row, in a ring of lines of all rows, and one of units: lines of 72
// columns of weights.
constexpr int LINE = 128, X_LINE = ROWS * LINE, UNIT = HEAD * LINE;
constexpr int NORMED_LINES = WIDTH / LINE, MIXED_LINES = 2 * WIDTH / LINE;
constexpr int FIRST_LINES = LAST_BEGIN / LINE, HIDDEN_LINES = HIDDEN / LINE;
// Of a line, units that are multiplied together lie side by side, for which one is left out behind the keys'.
constexpr int PAIR = 2, LEFT_OUT = 1;
static_assert((NORMED_LINES + LEFT_OUT) % PAIR == 0 && MIXED_LINES % PAIR == 0 && HIDDEN_LINES % PAIR == 0,
              "pairs do not wrap");

// Constants of a layer and a block, fp32: vectors for its columns, and numbers.
enum Vector { QUERY_BIAS, ATTN_GAIN, ATTN_SHIFT, OUT_BIAS, MLP_GAIN, MLP_SHIFT, FC2_BIAS, FC1_BIAS };
enum Number { QKV_ALPHA, FC1_ALPHA, FC2_ALPHA, HIDDEN_FACTOR, NUMBERS };
constexpr int NUMBERS_AT = FC1_BIAS * HEAD + FIRST + LAST, CONSTANTS = NUMBERS_AT + NUMBERS;
constexpr int CONSTANT_BYTES = CONSTANTS * 4;

constexpr int PITCH = 2 * HEAD;  // bytes of a row that is staged
// Normed rows are multiplied twice, for which their lines stay. Two groups' take so much that weights, which
// have what is left, would not be far enough ahead: so some come AGAIN.
constexpr int X_LINES = GROUPS > 1 ? 8 : 10, AGAIN = X_LINES < NORMED_LINES ? NORMED_LINES - X_LINES : 0;
constexpr int FOR_BARRIERS = 512;
constexpr int UNITS = (SHARED_BYTES - X_LINES * X_LINE - ROWS * PITCH - 2 * CONSTANT_BYTES - FOR_BARRIERS) /
                      UNIT / PAIR * PAIR;
constexpr int WEIGHTS = 0, X = WEIGHTS + UNITS * UNIT, STAGED = X + X_LINES * X_LINE;
constexpr int CONSTANTS_AT = STAGED + ROWS * PITCH, BARRIERS = CONSTANTS_AT + 2 * CONSTANT_BYTES;
constexpr int OTHERS = 2 * UNITS + 2 * X_LINES, BARRIER_COUNT = OTHERS + 6;
static_assert(BARRIERS + 8 * BARRIER_COUNT <= SHARED_BYTES, "the launcher allocates what is used");
// Where rows were, which attention does not need, are keys and then values, in the last lines.
constexpr int OPERANDS = X_LINES * X_LINE - 2 * OPERAND_BYTES;
static_assert(OPERANDS >= 0 && OPERANDS % 1024 == 0, "they have room there");
static_assert(X % 1024 == 0 && CONSTANT_BYTES % 16 == 0 && BARRIERS % 8 == 0, "alignment");

struct Arguments {
  const TensorMap &qkv, &out, &fc1, &fc2;                  // weights of all layers, below each other
  const TensorMap &normed, &mixed, &hidden, &most, &rest;  // rows, and keys and values
  const float* constants;                                  // (DEPTH, HEADS, CONSTANTS)
  char *residual, *normed_rows, *mixed_rows, *hidden_rows, *keys;
  Word* statistics;  // (2, rows, HEADS)
  u32* flags;
  int images;
};

// Rows that a team's blocks tell each other of.
enum Kind { NORMED, MIXED, HIDDEN_FIRST, HIDDEN_LAST, KINDS };
// Words from the flags that some blocks wait for to those that others do: a line of the L2, else they are in
// each other's way.
constexpr int FLAG_LINE = 32;

struct Block {
  char* memory;
  u32 shared;
  int lane, warp, group;  // of four warps
  int share, row;  // its head, its first row
  Arguments a;

  __device__ __forceinline__ u32 barrier(int i) const { return shared + BARRIERS + 8 * i; }
  __device__ __forceinline__ u32 unit_full(int slot) const { return barrier(slot); }
  __device__ __forceinline__ u32 unit_empty(int slot) const { return barrier(UNITS + slot); }
  __device__ __forceinline__ u32 line_full(int slot) const { return barrier(2 * UNITS + slot); }
  __device__ __forceinline__ u32 line_empty(int slot) const { return barrier(2 * UNITS + X_LINES + slot); }
  // There is room for two layers.
  __device__ __forceinline__ u32 constants_full(int layer) const { return barrier(OTHERS + layer % 2); }
  __device__ __forceinline__ u32 constants_empty(int layer) const { return barrier(OTHERS + 2 + layer % 2); }
  // Of all keys of the image, or all values.
  __device__ __forceinline__ u32 operand_full(int values) const { return barrier(OTHERS + 4 + values); }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < UNITS; ++i) mbarrier_init(unit_full(i), 1), mbarrier_init(unit_empty(i), WARPS);
    for (int i = 0; i < X_LINES; ++i) mbarrier_init(line_full(i), 1), mbarrier_init(line_empty(i), WARPS);
    for (int i = 0; i < 2; ++i) mbarrier_init(constants_full(i), 1), mbarrier_init(constants_empty(i), WARPS);
    for (int i = 0; i < 2; ++i) mbarrier_init(operand_full(i), 1);
    mbarriers_ready();
  }

  __device__ __forceinline__ int image() const { return row / TOKENS; }
  // Of its image.
  __device__ __forceinline__ int team() const { return row / ROWS % TEAMS; }
  // Flags of the team's blocks.
  __device__ __forceinline__ u32* flags(Kind kind) const {
    return a.flags + (kind * a.images * TEAMS + row / ROWS) * FLAG_LINE;
  }
  // Keys and values of this head and image have two places in turn.
  __device__ __forceinline__ int operand(int layer, int values) const {
    return ((layer % 2 * a.images + image()) * HEADS + share) * 2 + values;
  }
  __device__ __forceinline__ u32 operand_at(int values) const {
    return shared + X + OPERANDS + values * OPERAND_BYTES;
  }
  // Flags of the blocks with this head and image.
  __device__ __forceinline__ u32* operand_flags(int layer, int values) const {
    return a.flags + (KINDS * a.images * TEAMS + operand(layer, values)) * FLAG_LINE;
  }
};

// Between two looks at flags, which take from others what they need to go on.
constexpr int NAP = 100;  // ns

}  // namespace
