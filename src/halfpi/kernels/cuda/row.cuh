// What one block does for its row of the actions; the residual never leaves its registers.
#pragma once
#include "block.cuh"

namespace {

__device__ __forceinline__ void row_threads() { named_barrier(2, ROW_THREADS); }

struct Row {
  float x[4];  // columns 4 · thread …
  float4 gate, scale, shift;

  // Of norm `index` and the update before it, before waiting for the update.
  __device__ void load(const Block& b, const Arguments& a, int step, int index) {
    const int time = b.index < b.decided ? STEPS : step;
    const float* modulation = a.modulations + long(time * (2 * DEPTH + 1) + index) * 3 * WIDTH;
    scale = at(modulation, b), shift = at(modulation + WIDTH, b);
    if (index) gate = at(modulation - WIDTH, b);
  }

  __device__ static float4 at(const float* table, const Block& b) {
    return reinterpret_cast<const float4*>(table)[b.thread];
  }

  __device__ void embed(const Block& b, const Arguments& a, const float* actions) {
    float4 sum = at(a.bias_in, b);
#pragma unroll 16
    for (int i = 0; i < ACTION_DIM; ++i) {
      float4 w = at(a.weight_in + i * WIDTH, b);
      sum.x += actions[i] * w.x, sum.y += actions[i] * w.y;
      sum.z += actions[i] * w.z, sum.w += actions[i] * w.w;
    }
    x[0] = sum.x, x[1] = sum.y, x[2] = sum.z, x[3] = sum.w;
  }

  // x += gate · Σ of all clusters, in order, as soon as they are there.
  __device__ void add(const Block& b, bool mlp) {
    const char* from = b.buffers + SUMS + b.index * SUMS_BYTES + b.thread * 8;
    const u32 mark = mark_of(mlp);
    Word v[HEADS];
    bool all;
    Watchdog watchdog;
    do {
      all = true;
#pragma unroll
      for (int c = 0; c < HEADS; ++c) {
        v[c] = load_word(from + c * (WIDTH * 2));
        all &= has_mark(v[c], mark);
      }
      watchdog.check();
    } while (!all);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < HEADS; ++c) {
      sum[0] += low_bf16(v[c].low), sum[1] += high_bf16(v[c].low);
      sum[2] += low_bf16(v[c].high), sum[3] += high_bf16(v[c].high);
    }
    x[0] += gate.x * sum[0], x[1] += gate.y * sum[1];
    x[2] += gate.z * sum[2], x[3] += gate.w * sum[3];
  }

  __device__ void norm(const Block& b, float (&y)[4]) const {
    float* squares = b.floats(SQUARES);
    float square = x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
#pragma unroll
    for (int i = 16; i; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    if (b.lane == 0) squares[b.thread / 32] = square;
    row_threads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < ROW_THREADS / 32; ++i) total += squares[i];
    float inverse = rsqrtf(total / WIDTH + EPS);
    y[0] = x[0] * inverse * (1.0f + scale.x) + shift.x;
    y[1] = x[1] * inverse * (1.0f + scale.y) + shift.y;
    y[2] = x[2] * inverse * (1.0f + scale.z) + shift.z;
    y[3] = x[3] * inverse * (1.0f + scale.w) + shift.w;
  }

  // To all blocks, as operands.
  __device__ void publish(const Block& b, const float (&y)[4], float inverse_scale) const {
    const int column = 4 * b.thread;
    char* to = b.buffers + X + (column / CHUNK * ROWS + b.index) * 16 + column % CHUNK * BYTES;
    if constexpr (FP8) {
      store_relaxed(to, pack_e4m3(y[0] * inverse_scale, y[1] * inverse_scale,
                                  y[2] * inverse_scale, y[3] * inverse_scale));
    } else {
      store_relaxed(to, Word{pack_bf16(y[0], y[1]), pack_bf16(y[2], y[3])});
    }
    row_threads();
    if (b.thread == 0) arrive(b.counters, ROWS_DONE);
  }

  // The velocity of this row, guided, moves its actions, unless they are decided.
  __device__ void move(const Block& b, const Arguments& a, const float (&y)[4], float* actions,
                       int step) const {
    const bool moves = b.index >= b.decided;
    float4* hidden = reinterpret_cast<float4*>(b.memory + AREA);
    hidden[b.thread] = make_float4(y[0], y[1], y[2], y[3]);
    row_threads();
#pragma unroll 2
    for (int i = b.thread / 32; i < ACTION_DIM; i += ROW_THREADS / 32) {
      const float4* w = reinterpret_cast<const float4*>(a.weight_out + i * WIDTH);
      float dot = 0.0f;
#pragma unroll
      for (int j = b.lane; j < WIDTH / 4; j += 32) {
        dot += hidden[j].x * w[j].x + hidden[j].y * w[j].y + hidden[j].z * w[j].z +
               hidden[j].w * w[j].w;
      }
#pragma unroll
      for (int j = 16; j; j /= 2) dot += __shfl_xor_sync(~0u, dot, j);
      if (b.lane == 0 && moves) {
        float velocity = dot + a.bias_out[i], time = 1.0f - step * (1.0f / STEPS);
        float weight = a.weights[b.index], error = 0.0f;
        if (weight != 0.0f) {
          error = (a.target[b.index * ACTION_DIM + i] - (actions[i] - time * velocity)) * weight;
        }
        actions[i] -= (velocity - a.gains[step] * error) * (1.0f / STEPS);
      }
    }
    row_threads();
  }
};

}  // namespace
