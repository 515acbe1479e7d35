// What the other blocks do, each for a row or two of the actions, whose residual never leaves their
// registers.
#pragma once
#include "block.cuh"

namespace {

// Shared memory of such a block: normed rows, and of the projections from and to actions as many rows
// as fit. Others come from the L2 or memory, once a step.
constexpr int TABLE_ROW = WIDTH * 4;
constexpr int ROWS_NORMED = AREA, TABLE_OUT = ROWS_NORMED + ROWS_PER_BLOCK * TABLE_ROW;
constexpr int TABLE_IN = TABLE_OUT + ACTION_DIM * TABLE_ROW;
constexpr int MOST_KEPT = (BARRIERS - TABLE_IN) / TABLE_ROW;
constexpr int KEPT = ACTION_DIM < MOST_KEPT ? ACTION_DIM : MOST_KEPT;  // rows of TABLE_IN
constexpr int TABLES_FULL = FULL;                                      // there is no ring here

// By one thread.
__device__ __forceinline__ void fetch_tables(const Block& b, const Arguments& a) {
  constexpr u32 OUT_BYTES = ACTION_DIM * TABLE_ROW, IN_BYTES = KEPT * TABLE_ROW;
  const u32 full = b.shared + TABLES_FULL;
  mbarrier_expect(full, OUT_BYTES + IN_BYTES);
  bulk_copy(b.shared + TABLE_OUT, a.weight_out, OUT_BYTES, full);
  bulk_copy(b.shared + TABLE_IN, a.weight_in, IN_BYTES, full);
}

struct Row {
  static constexpr int WORDS = WIDTH / 4 / ROW_THREADS;  // of four columns, that a thread has
  static constexpr int WARPS = ROW_THREADS / 32;
  // Rows of TABLE_IN that are not kept, but held in registers. Two rows a block leave too few of those.
  static constexpr int HELD = WORDS == 1 ? ACTION_DIM - KEPT : 0;
  int index, thread;  // of the row's threads
  int published = 0;  // times
  float* squares;
  float* actions;
  float4* hidden;
  const float *table_in, *table_out;
  float4 x[WORDS], gate[WORDS], scale[WORDS], shift[WORDS], bias_in[WORDS];
  float4 held[larger(HELD, 1)];
  float inverse_scale;  // of the operand that the next norm gives
  // Of the dimension of the action that this thread moves, if it does.
  int moved;
  float bias_out = 0.0f, weight = 0.0f, target = 0.0f;

  __device__ Row(const Block& b, const Arguments& a) {
    const int place = b.thread / ROW_THREADS;
    index = (b.index - BLOCKS) * ROWS_PER_BLOCK + place;
    thread = b.thread % ROW_THREADS;
    squares = b.floats(SQUARES) + place * 8;
    actions = b.floats(ACTIONS) + place * 32;
    hidden = reinterpret_cast<float4*>(b.floats(ROWS_NORMED)) + place * (WIDTH / 4);
    table_in = b.floats(TABLE_IN), table_out = b.floats(TABLE_OUT);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) bias_in[i] = at(a.bias_in, i);
    moved = thread / 32 + thread % 32 * WARPS;
    if (index >= ROWS || moved >= ACTION_DIM) return;
    bias_out = a.bias_out[moved], weight = a.weights[index];
    target = a.target[index * ACTION_DIM + moved];
  }
  __device__ void together() const {
    named_barrier(2 + index % ROWS_PER_BLOCK, ROW_THREADS);
  }
  // Of a table of `WIDTH` numbers.
  __device__ float4 at(const float* table, int word) const {
    return reinterpret_cast<const float4*>(table)[thread + word * ROW_THREADS];
  }

  // What norm `norm` and the update before it need, before waiting for the update.
  __device__ void load(const Block& b, const Arguments& a, int step, int norm) {
    const int time = index < b.decided ? STEPS : step;
    const float* modulation = a.modulations + long(time * (2 * DEPTH + 1) + norm) * 3 * WIDTH;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      scale[i] = at(modulation, i), shift[i] = at(modulation + WIDTH, i);
      if (norm) gate[i] = at(modulation - WIDTH, i);
    }
    inverse_scale = Scale(a, step, norm < 2 * DEPTH ? norm : 0, 0).inverse();
  }

  // From the L2 or memory, long before they are needed.
  __device__ void load_held(const Arguments& a) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) held[i] = at(a.weight_in + (KEPT + i) * WIDTH, 0);
  }
  __device__ void embed(const Arguments& a) {
#pragma unroll
    for (int word = 0; word < WORDS; ++word) {
      float4 sum = bias_in[word];
      const auto add = [&](float action, float4 w) {
        sum.x += action * w.x, sum.y += action * w.y;
        sum.z += action * w.z, sum.w += action * w.w;
      };
#pragma unroll
      for (int i = 0; i < KEPT; ++i) add(actions[i], at(table_in + i * WIDTH, word));
#pragma unroll
      for (int i = 0; i < HELD; ++i) add(actions[KEPT + i], held[i]);
#pragma unroll
      for (int i = KEPT + HELD; i < ACTION_DIM; ++i) add(actions[i], at(a.weight_in + i * WIDTH, word));
      x[word] = sum;
    }
  }

  // Until one of the sums is there, of some columns of a warp. Those that come during a nap need no
  // loads of their own.
  __device__ void await_some(const char* sums, u32 mark) const {
    constexpr int LANES = 32 / HEADS;            // of a cluster's sums
    // ns. Looks take power, which bf16 with many rows lacks.
    constexpr int NAP = FP8 || FEW ? 150 : 600;
    const int lane = thread % 32;
    const char* one = sums + lane / LANES * (WIDTH * 2) - (lane - lane % LANES) * 8;
    Watchdog watchdog;
    while (!__any_sync(~0u, has_mark(load_word(one), mark))) {
      nap<NAP>();
      watchdog.check();
    }
  }

  // x += gate · Σ of all clusters, in order, as soon as they are there. Once some are, there are
  // two sets of loads under way, half a trip apart, so that the last is seen early.
  __device__ void add(const Block& b, bool mlp) {
    const char* from = b.buffers + SUMS + index * SUMS_BYTES + thread * 8;
    const u32 mark = mark_of(mlp);
    constexpr int COUNT = WORDS * HEADS;
    Word v[COUNT];
    u64 loaded[2][COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) v[i].low = ~mark, loaded[0][i] = loaded[1][i] = ~mark;
    auto load = [&](u64 (&to)[COUNT]) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const char* word = from + i / HEADS * (ROW_THREADS * 8) + i % HEADS * (WIDTH * 2);
        load_word_unless(has_mark(v[i], mark), to[i], word);
      }
    };
    bool all;
    auto take = [&](const u64 (&of)[COUNT]) {
      all = true;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const Word word = Word::of(of[i]);
        if (has_mark(word, mark)) v[i] = word;
        all &= has_mark(v[i], mark);
      }
      all = __all_sync(~0u, all);
    };
    await_some(from, mark);
    load(loaded[0]);
    take(loaded[0]);
    Watchdog watchdog;
    if (!all) {
      load(loaded[0]);
      pause(HALF_A_TRIP);
    }
    while (!all) {
      load(loaded[1]);
      take(loaded[0]);
      if (all) break;
      load(loaded[0]);
      take(loaded[1]);
      watchdog.check();
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int c = 0; c < HEADS; ++c) {
        sum.x += low_bf16(v[i * HEADS + c].low), sum.y += high_bf16(v[i * HEADS + c].low);
        sum.z += low_bf16(v[i * HEADS + c].high), sum.w += high_bf16(v[i * HEADS + c].high);
      }
      x[i].x += gate[i].x * sum.x, x[i].y += gate[i].y * sum.y;
      x[i].z += gate[i].z * sum.z, x[i].w += gate[i].w * sum.w;
    }
  }

  // It will be published in about the time that others take to see this.
  __device__ void announce(const Block& b) const {
    if (thread == 0) arrive(exchange::place(b.counters, ROWS_DONE));
  }

  // By one thread: nothing in the other buffer is of this row. Long before the next is needed there.
  __device__ void announce_blank(const Block& b) {
    u32* const counter = exchange::place(b.counters, ROWS_DONE);
    await(counter, published++ * ROWS);
    arrive(counter);
  }

  // x becomes y: normed, scaled and shifted.
  __device__ void norm(float4 (&y)[WORDS]) const {
    float square = 0.0f;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      square += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
    }
    square = sum_over_warp(square);
    if (thread % 32 == 0) squares[thread / 32] = square;
    together();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_THREADS / 32; ++i) total += squares[i];
    float inverse = rsqrtf(total / WIDTH + EPS);
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      y[i].x = x[i].x * inverse * (1.0f + scale[i].x) + shift[i].x;
      y[i].y = x[i].y * inverse * (1.0f + scale[i].y) + shift[i].y;
      y[i].z = x[i].z * inverse * (1.0f + scale[i].z) + shift[i].z;
      y[i].w = x[i].w * inverse * (1.0f + scale[i].w) + shift[i].w;
    }
  }

  // To all blocks, as operands; and what they had before becomes blank.
  __device__ void publish(const Block& b, const float4 (&y)[WORDS], int half) {
    char* now = b.buffers + X + half % 2 * X_BYTES;
    char* other = b.buffers + X + (half + 1) % 2 * X_BYTES;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (FP8) {
        store_relaxed(now + place(i), pack_e4m3(&y[i].x, inverse_scale));
      } else {
        store_relaxed(now + place(i), Word{pack_bf16(y[i].x, y[i].y), pack_bf16(y[i].z, y[i].w)});
      }
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      if constexpr (FP8) {
        store_relaxed(other + place(i), BLANK);
      } else {
        store_relaxed(other + place(i), Word{BLANK, BLANK});
      }
    }
    together();
    if (thread) return;
    __threadfence();  // before the row is announced again
    if (X_APART) announce_blank(b);
  }

  // Of four columns in an operand.
  __device__ int place(int word) const {
    const int column = 4 * (thread + word * ROW_THREADS);
    const int at = column * BYTES, chunk = at % LINE / 16 ^ index % 8;
    return at / LINE * LINE_BYTES + index * LINE + chunk * 16 + at % 16;
  }

  // The velocity of this row, guided, moves its actions, unless they are decided. A warp has each
  // WARPS-th dimension.
  __device__ void move(const Block& b, const float4 (&y)[WORDS], int step, float gain) const {
    constexpr int DIMENSIONS = (ACTION_DIM + WARPS - 1) / WARPS;
    const int lane = thread % 32;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) hidden[thread + i * ROW_THREADS] = y[i];
    together();
    float dots[DIMENSIONS] = {};
#pragma unroll
    for (int j = lane; j < WIDTH / 4; j += 32) {
      const float4 h = hidden[j];
#pragma unroll
      for (int k = 0; k < DIMENSIONS; ++k) {
        const int i = thread / 32 + k * WARPS;
        if (i >= ACTION_DIM) continue;
        const float4 w = reinterpret_cast<const float4*>(table_out + i * WIDTH)[j];
        dots[k] += h.x * w.x + h.y * w.y + h.z * w.z + h.w * w.w;
      }
    }
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < DIMENSIONS; ++k) {
      const float sum = sum_over_warp(dots[k]);
      if (lane == k) dot = sum;
    }
    if (lane < DIMENSIONS && moved < ACTION_DIM && index >= b.decided) {
      const float velocity = dot + bias_out, time = 1.0f - step * (1.0f / STEPS);
      float error = 0.0f;
      if (weight != 0.0f) error = (target - (actions[moved] - time * velocity)) * weight;
      actions[moved] -= (velocity - gain * error) * (1.0f / STEPS);
    }
    together();
  }
};

// All steps of a row.
__device__ __forceinline__ void update_row(const Block& b, const Arguments& a) {
  Row row(b, a);
  if (row.index >= ROWS) return;
  float4 y[Row::WORDS];
  const int at = row.index * ACTION_DIM + row.thread;
  if (row.thread < ACTION_DIM) row.actions[row.thread] = a.actions[at];
  row.together();
  wait(b.shared + TABLES_FULL, 0);
  row.load_held(a);
  row.load(b, a, 0, 0);
  for (int step = 0; step < STEPS; ++step) {
    const float gain = a.gains[step];
    row.embed(a);
#pragma unroll 1
    for (int half = 0;; ++half) {
      const bool last = half == 2 * DEPTH;
      if (half) row.load(b, a, step, half);
      if (last) row.load_held(a);
      if (half) row.add(b, half % 2 == 0);
      if (!X_APART && !last) row.announce(b);
      row.norm(y);
      if (last) break;
      row.publish(b, y, half);
    }
    if (step + 1 < STEPS) row.load(b, a, step + 1, 0);
    row.move(b, y, step, gain);
  }
  if (row.thread < ACTION_DIM) a.result[at] = row.actions[row.thread];
}

}  // namespace
