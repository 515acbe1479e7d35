// All denoise steps of the action expert in one launch; see expert_steps.py for the mathematics.
//
// 128 blocks, one an SM. Warps 0…7 compute, as two warpgroups that share the K of a product between
// them; warp 8 streams the block's weights into a ring; warp 9 clears exchanged buffers.
#include "exchange.cuh"

using namespace exchange;

namespace {

constexpr int DEPTH_TIMES_STEPS = DEPTH * STEPS;
constexpr int CONSUMERS = 256, THREADS = 384;
constexpr int SLOTS = 10, UNIT = 8192;
constexpr int QKV_ROWS = 32, QKV_BLOCKS = (HEADS + 2) * HEAD / QKV_ROWS;
constexpr int QKV_UNITS = WIDTH / CHUNK / 16, OUT_UNITS = HEADS * HEAD / K_SPLITS / CHUNK / 8;
constexpr int WIDE_UNITS = WIDTH / CHUNK / 8, DOWN_UNITS = MLP / K_SPLITS / CHUNK / 8;
constexpr int LAYER_UNITS = QKV_UNITS + OUT_UNITS + WIDE_UNITS + DOWN_UNITS;
constexpr float EPS = 1e-6f;
constexpr float LOGIT_SCALE = 0.0625f * 1.44269504f;  // 1/√k · log2 e
using Format = hopper::conditional<FP8, hopper::E4m3, hopper::Bf16>::type;

// Shared memory: operands (keys and values in the second half), ring, scratch, barriers.
constexpr int OPERANDS = 0, KEYS = 65536, VALUES = 98304, RING = 131072;
constexpr int SCRATCH = RING + SLOTS * UNIT, BARRIERS = SCRATCH + 16384;
constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * SLOTS, DEAD = EMPTY + 8 * SLOTS, CLEAN = DEAD + 8;
constexpr int SUMS = CLEAN + 8, ACTIONS = SUMS + 64;
constexpr int SHARED = ACTIONS + 128;
static_assert(SHARED <= SHARED_BYTES, "the launcher asks for what the kernel uses");

struct Arguments {
  const char* stream;  // (block, layer, unit, 8192 bytes)
  char* sets;
  u32* counter;
  float* actions;
  const char *keys, *values;
  long long capacity;
  const int *prefix_count, *decided;
  const float *cos, *sin, *modulations, *target, *weights, *gains;
  const float *weight_in, *bias_in, *weight_out, *bias_out;  // weight_in is (a, d)
  const float *input_scales, *weight_scales;
};

struct Scales {  // of the four products of a layer at a step
  float4 input, weight;
  __device__ void load(const Arguments& a, int step, int layer) {
    if (!FP8) return;
    input = reinterpret_cast<const float4*>(a.input_scales)[step * DEPTH + layer];
    weight = reinterpret_cast<const float4*>(a.weight_scales)[layer];
  }
};
#define ALPHA(site) (FP8 ? scales.input.site * scales.weight.site : 1.0f)
#define INVERSE(site) (FP8 ? 1.0f / scales.input.site : 1.0f)

struct Block {
  u32 shared;
  char* scratch;
  int index, thread, group, warp, lane, row;  // warp of the group; first of the two rows of a thread
  int unit = 0;                               // of the ring, the next one
  int prefix;

  __device__ float4* exchanged(int of) const {
    return reinterpret_cast<float4*>(scratch) + of * 512 + thread % 128;
  }
};

__device__ __forceinline__ void all_consumers() { named_barrier(1, CONSUMERS); }

// ---- matrix products

// (64 rows, N) of `from` · the next UNITS units of the ring. Each group sums half of the units, and
// ends with half of the columns: result[4 g + i] is column 8 (group · N / 16 + g) + 2 (lane % 4) +
// i % 2 of row `row` + 8 (i / 2).
template <int N, int UNIT_CHUNKS, int UNITS>
__device__ __forceinline__ void product(float (&result)[N / 4], Block& b, const char* from) {
  constexpr int BATCH = UNITS / 2 < 16 / UNIT_CHUNKS ? UNITS / 2 : 16 / UNIT_CHUNKS;
  constexpr int BATCHES = UNITS / 2 / BATCH;
  constexpr int CHUNKS = BATCH * UNIT_CHUNKS, ITEMS = CHUNKS * ROWS, LOADS = (ITEMS + 127) / 128;
  const uint4* items = reinterpret_cast<const uint4*>(from) + b.group * ITEMS;
  const int thread = b.thread % 128;
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;

  uint4 v[2][LOADS];
  load(v[0], items, thread, 128, ITEMS);
  all_consumers();  // the operands of the last product are read
#pragma unroll
  for (int t = 0; t < BATCHES; ++t) {
    settle(v[t % 2], items + 2 * t * ITEMS, thread, 128, ITEMS);
    if (t + 1 < BATCHES) load(v[(t + 1) % 2], items + 2 * (t + 1) * ITEMS, thread, 128, ITEMS);
    u32 a = b.shared + OPERANDS + (2 * t + b.group) * CHUNKS * 1024;
    stage(v[t % 2], a, thread, 128, ITEMS);
    fence_async_proxy();
    named_barrier(2 + b.group, 128);
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
        Format::mma(acc, descriptor(a + (u * UNIT_CHUNKS + 2 * k) * 1024, 1024, 128),
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
    product<QKV_ROWS, 16, QKV_UNITS>(result, b, set + X);
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
  }
};

__device__ __forceinline__ float gated(float gate, float up) {
  float u = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 √(2/π) …
  return __fdividef(gate, 1.0f + exp2_fast(-1.44269504f * u)) * up;
}

// The packing gives each thread four neighbouring columns, gate and up side by side.
__device__ __forceinline__ void geglu(Block& b, char* set, float alpha, float inverse_scale) {
  float result[16];
  product<64, 8, WIDE_UNITS>(result, b, set + X2);
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
}

// ---- attention: block 16 q + s has head q and split s of the keys

struct Split {  // prefix keys first, then keys of actions; both shared out evenly
  int head, prefix_first, prefix_keys, action_first, keys;

  __device__ Split(const Block& b) {
    int s = b.index % KEY_SPLITS;
    head = b.index / KEY_SPLITS;
    prefix_first = s * b.prefix / KEY_SPLITS;
    prefix_keys = (s + 1) * b.prefix / KEY_SPLITS - prefix_first;
    action_first = (s * ROWS + KEY_SPLITS - 1) / KEY_SPLITS;
    keys = prefix_keys + ((s + 1) * ROWS + KEY_SPLITS - 1) / KEY_SPLITS - action_first;
  }
};

// Starts copying what the cache has of keys first … first + 63; keys beyond the split become zeros.
__device__ __forceinline__ void fetch_prefix(const Block& b, const Split& split, const char* keys,
                                             const char* values, int first) {
  int chunk = b.thread / 32 * 4 + b.lane / 8;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    int slot = 8 * i + b.lane % 8, key = first + slot;
    bool cached = key < split.prefix_keys;
    if (cached || key >= split.keys) {
      long from = (cached ? split.prefix_first + key : 0) * (HEAD * 2L) + chunk * 16;
      u32 to = b.shared + chunk * 1024 + slot * 16;
      copy_async(to + KEYS, keys + from, cached);
      copy_async(to + VALUES, values + from, cached);
    }
  }
}

// Keys and values of actions among keys first … first + 63: at most four rows, 16 bytes a thread.
__device__ __forceinline__ void fetch_actions(const Block& b, const Split& split, const char* set,
                                              int first) {
  int chunk = b.thread % 32, key = split.prefix_keys + b.thread / 32 % 4;
  bool inside = key < split.keys && key >= first && key < first + 64;
  int head = HEADS + b.thread / 128;
  const uint4* from = reinterpret_cast<const uint4*>(set + QKV) + (head * 32 + chunk) * ROWS +
                      split.action_first + key - split.prefix_keys;
  uint4 v[1];
  load(v, from, 0, 1, inside);
  settle(v, from, 0, 1, inside);
  u32 to = b.shared + (b.thread / 128 ? VALUES : KEYS) + chunk * 1024 + (key - first) * 16;
  if (inside) store_shared(to, v[0]);
}

struct Softmax {  // of this thread's two rows
  float highest[2] = {-infinity(), -infinity()}, total[2] = {0.0f, 0.0f};

  // Logits become weights; what was summed before must shrink.
  __device__ __forceinline__ void update(float (&logits)[32], float (&acc)[64], int lane,
                                         int keys_left) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = highest[i];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& logit = logits[j / 2 * 4 + 2 * i + j % 2];
        bool valid = j / 2 * 8 + 2 * (lane % 4) + j % 2 < keys_left;
        logit = valid ? logit * LOGIT_SCALE : -infinity();
        top = fmaxf(top, logit);
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float base = top == -infinity() ? 0.0f : top;
      float shrink = exp2_fast(highest[i] - base);
      highest[i] = top;
      total[i] *= shrink;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float& logit = logits[j / 2 * 4 + 2 * i + j % 2];
        logit = exp2_fast(logit - base);
        total[i] += logit;
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) acc[j / 2 * 4 + 2 * i + j % 2] *= shrink;
    }
  }
};

// Both groups compute all weights; each averages half of the dimensions.
__device__ __forceinline__ void attend_block(const Block& b, Softmax& softmax, float (&acc)[64],
                                             int keys_left) {
  float logits[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) logits[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    Bf16::mma(logits, descriptor(b.shared + OPERANDS + k * 2048, 1024, 128),
              descriptor(b.shared + KEYS + k * 2048, 1024, 128));
  }
  wgmma_commit();
  wgmma_wait<0>();
  softmax.update(logits, acc, b.lane, keys_left);
  u32 weights[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) weights[i / 4][i % 4] = pack_bf16(logits[2 * i], logits[2 * i + 1]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    mma_weights(acc, weights[k],
                descriptor(b.shared + VALUES + b.group * 16384 + k * 256, 128, 1024));
  }
  wgmma_commit();
  wgmma_wait<0>();
}

__device__ __forceinline__ void attend(const Block& b, const Split& split, char* set,
                                       const char* keys, const char* values) {
  constexpr int ITEMS = HEAD / 8 * ROWS, LOADS = (ITEMS + CONSUMERS - 1) / CONSUMERS;
  const uint4* query = reinterpret_cast<const uint4*>(set + QKV) + split.head * ITEMS;
  uint4 v[LOADS];
  load(v, query, b.thread, CONSUMERS, ITEMS);
  settle(v, query, b.thread, CONSUMERS, ITEMS);
  stage(v, b.shared + OPERANDS, b.thread, CONSUMERS, ITEMS);

  Softmax softmax;
  float acc[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) acc[i] = 0.0f;
  for (int first = 0; first == 0 || first < split.keys; first += 64) {
    if (first) {
      all_consumers();
      fetch_prefix(b, split, keys, values, first);
    }
    fetch_actions(b, split, set, first);
    copy_async_wait();
    fence_async_proxy();
    all_consumers();
    attend_block(b, softmax, acc, split.keys - first);
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = softmax.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    int row = b.row + 8 * i;
    if (row >= ROWS) continue;
    int place = (split.head * ROWS + row) * KEY_SPLITS + b.index % KEY_SPLITS;
    if (b.group == 0 && b.lane % 4 == 0) {
      store_relaxed(set + LOG_SUMS + place * 4, __float_as_uint(softmax.highest[i] + log2f(total)));
    }
    char* to = set + AVERAGES + long(place) * (HEAD * 2) + b.group * 256 + b.lane % 4 * 4;
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      store_relaxed(to + g * 16, pack_bf16(acc[4 * g + 2 * i] * inverse,
                                           acc[4 * g + 2 * i + 1] * inverse));
    }
  }
}

// The splits' averages of every 16th row of a head, weighted by their sums; 64 threads a row.
__device__ __forceinline__ void merge(const Block& b, char* set, float inverse_scale) {
  int head = b.index / KEY_SPLITS, row = b.index % KEY_SPLITS + b.thread / 64 * KEY_SPLITS;
  if (row >= ROWS) return;
  int place = (head * ROWS + row) * KEY_SPLITS, column = b.thread % 64;
  const uint4* log_sums = reinterpret_cast<const uint4*>(set + LOG_SUMS) + place / 4;
  const uint2* averages = reinterpret_cast<const uint2*>(set + AVERAGES) + long(place) * 64;
  uint4 l[4];
  uint2 v[KEY_SPLITS];
  load(l, log_sums, 0, 1, 4);
  load(v, averages, column, 64, KEY_SPLITS * 64);
  settle(l, log_sums, 0, 1, 4);
  settle(v, averages, column, 64, KEY_SPLITS * 64);

  float weight[KEY_SPLITS], highest = -infinity(), total = 0.0f;
#pragma unroll
  for (int s = 0; s < KEY_SPLITS; ++s) {
    u32 word = s % 4 == 0 ? l[s / 4].x : s % 4 == 1 ? l[s / 4].y : s % 4 == 2 ? l[s / 4].z : l[s / 4].w;
    weight[s] = __uint_as_float(word);
    highest = fmaxf(highest, weight[s]);
  }
  float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int s = 0; s < KEY_SPLITS; ++s) {
    float w = exp2_fast(weight[s] - highest);
    total += w;
    sum[0] += w * __uint_as_float(v[s].x << 16);
    sum[1] += w * __uint_as_float(v[s].x & 0xFFFF0000u);
    sum[2] += w * __uint_as_float(v[s].y << 16);
    sum[3] += w * __uint_as_float(v[s].y & 0xFFFF0000u);
  }
  float inverse = 1.0f / total;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] *= inverse;
  publish(set + MERGED, row, head * HEAD + 4 * column, sum, inverse_scale);
}

// ---- what one block does for its row of the actions; the residual never leaves its registers

struct Row {
  float x[4];  // columns 4 · thread …

  __device__ static float4 at(const float* table, const Block& b) {
    return reinterpret_cast<const float4*>(table)[b.thread];
  }

  __device__ void embed(const Block& b, const Arguments& a, const float* actions) {
    float4 sum = at(a.bias_in, b);
#pragma unroll 8
    for (int i = 0; i < ACTION_DIM; ++i) {
      float4 w = at(a.weight_in + i * WIDTH, b);
      sum.x += actions[i] * w.x, sum.y += actions[i] * w.y;
      sum.z += actions[i] * w.z, sum.w += actions[i] * w.w;
    }
    x[0] = sum.x, x[1] = sum.y, x[2] = sum.z, x[3] = sum.w;
  }

  // x += gate · Σ partials, in order.
  __device__ void add(const Block& b, const char* partials, const float* modulation, int row) {
    float4 gate = at(modulation + 2 * WIDTH, b);
    const uint4* from = reinterpret_cast<const uint4*>(partials) + row * (WIDTH / 4);
    uint4 v[K_SPLITS];
    constexpr int STRIDE = ROWS * WIDTH / 4;
    load(v, from, b.thread, STRIDE, K_SPLITS * STRIDE);
    settle(v, from, b.thread, STRIDE, K_SPLITS * STRIDE);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < K_SPLITS; ++s) {
      sum[0] += __uint_as_float(v[s].x), sum[1] += __uint_as_float(v[s].y);
      sum[2] += __uint_as_float(v[s].z), sum[3] += __uint_as_float(v[s].w);
    }
    x[0] += gate.x * sum[0], x[1] += gate.y * sum[1];
    x[2] += gate.z * sum[2], x[3] += gate.w * sum[3];
  }

  __device__ void norm(const Block& b, float* sums, const float* modulation, float (&y)[4]) const {
    float4 scale = at(modulation, b), shift = at(modulation + WIDTH, b);
    float square = x[0] * x[0] + x[1] * x[1] + x[2] * x[2] + x[3] * x[3];
#pragma unroll
    for (int i = 16; i; i /= 2) square += __shfl_xor_sync(~0u, square, i);
    if (b.lane == 0) sums[b.thread / 32] = square;
    all_consumers();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < CONSUMERS / 32; ++i) total += sums[i];
    float inverse = rsqrtf(total / WIDTH + EPS);
    y[0] = x[0] * inverse * (1.0f + scale.x) + shift.x;
    y[1] = x[1] * inverse * (1.0f + scale.y) + shift.y;
    y[2] = x[2] * inverse * (1.0f + scale.z) + shift.z;
    y[3] = x[3] * inverse * (1.0f + scale.w) + shift.w;
  }

  // The velocity of this row, guided, moves its actions, unless they are decided.
  __device__ void move(const Block& b, const Arguments& a, const float (&y)[4], float* actions,
                       int step, int row, bool decided) const {
    float4* hidden = reinterpret_cast<float4*>(b.scratch);
    hidden[b.thread] = make_float4(y[0], y[1], y[2], y[3]);
    all_consumers();
    for (int i = b.thread / 32; i < ACTION_DIM; i += CONSUMERS / 32) {
      const float4* w = reinterpret_cast<const float4*>(a.weight_out + i * WIDTH);
      float dot = 0.0f;
#pragma unroll
      for (int j = b.lane; j < WIDTH / 4; j += 32) {
        dot += hidden[j].x * w[j].x + hidden[j].y * w[j].y + hidden[j].z * w[j].z +
               hidden[j].w * w[j].w;
      }
#pragma unroll
      for (int j = 16; j; j /= 2) dot += __shfl_xor_sync(~0u, dot, j);
      if (b.lane == 0 && !decided) {
        float velocity = dot + a.bias_out[i], time = 1.0f - step * (1.0f / STEPS);
        float weight = a.weights[row], error = 0.0f;
        if (weight != 0.0f) {
          error = (a.target[row * ACTION_DIM + i] - (actions[i] - time * velocity)) * weight;
        }
        actions[i] -= (velocity - a.gains[step] * error) * (1.0f / STEPS);
      }
    }
    all_consumers();
  }
};

// ---- roles

__device__ __forceinline__ void stream_weights(const Arguments& a, u32 shared, int block) {
  const int skipped = block < QKV_BLOCKS ? 0 : QKV_UNITS;
  const char* from = a.stream + long(block) * DEPTH * LAYER_UNITS * UNIT;
  const u64 policy = policy_evict_first();
  int unit = 0, ahead_layer = 0, ahead = skipped;
  for (int i = 0; i < AHEAD_UNITS + DEPTH_TIMES_STEPS * (LAYER_UNITS - skipped); ++i) {
    // The unit that is fetched to L2 now is copied AHEAD_UNITS later.
    if (AHEAD_UNITS) prefetch_l2(from + long(ahead_layer * LAYER_UNITS + ahead) * UNIT, UNIT, policy);
    if (++ahead == LAYER_UNITS) {
      ahead = skipped;
      ahead_layer = ahead_layer + 1 == DEPTH ? 0 : ahead_layer + 1;
    }
    if (i < AHEAD_UNITS) continue;
    int of_layer = unit % (LAYER_UNITS - skipped) + skipped;
    int layer = unit / (LAYER_UNITS - skipped) % DEPTH;
    int slot = unit % SLOTS;
    if (unit >= SLOTS) wait(shared + EMPTY + 8 * slot, (unit / SLOTS - 1) & 1);
    mbarrier_expect(shared + FULL + 8 * slot, UNIT);
    bulk_copy(shared + RING + slot * UNIT, from + long(layer * LAYER_UNITS + of_layer) * UNIT, UNIT,
              shared + FULL + 8 * slot, policy);
    ++unit;
  }
}

// Once a block has queries of layer l, all blocks have read all that layer l − 1 exchanged.
__device__ __forceinline__ void clear_sets(char* sets, u32 shared, int block, int lane) {
  for (int layer = 0; layer < DEPTH_TIMES_STEPS; ++layer) {
    wait(shared + DEAD, layer & 1);
    clear(sets + (layer + 1) % 2 * SET, block * 32 + lane, BLOCKS * 32);
    __threadfence();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared + CLEAN);
  }
}

#ifdef STAMPS
#define STAMP(point) if (b.thread == 0) stamps[(count * BLOCKS + b.index) * 16 + point] = clock64()
#else
#define STAMP(point)
#endif

__device__ __forceinline__ void compute(const Arguments& a, Block& b, float* sums, float* actions
#ifdef STAMPS
                                        , long long* stamps
#endif
) {
  constexpr int NORMS = 2 * DEPTH + 1;
  const int row = BLOCKS - 1 - b.index;
  const bool has_row = row < ROWS, decided = row < *a.decided;
  const Split split(b);
  QkvRope qkv;
  qkv.load(b, a);
  Row x;
  Scales scales;
  float y[4], result[16];
  if (has_row && b.thread < ACTION_DIM) actions[b.thread] = a.actions[row * ACTION_DIM + b.thread];
  all_consumers();

  int count = 0;
  for (int step = 0; step < STEPS; ++step) {
    const float* modulations = a.modulations + long(decided ? STEPS : step) * NORMS * 3 * WIDTH;
    if (has_row) x.embed(b, a, actions);
    for (int layer = 0; layer < DEPTH; ++layer, ++count) {
      char* set = a.sets + count % 2 * SET;
      char* last_set = a.sets + (count + 1) % 2 * SET;
      const float* modulation = modulations + 2 * layer * 3 * WIDTH;
      const char* keys = a.keys + layer * a.capacity * HEAD * 2;
      const char* values = a.values + layer * a.capacity * HEAD * 2;
      scales.load(a, step, layer);
      STAMP(0);
      if (has_row) {
        if (layer) x.add(b, last_set + DOWN, modulation - 3 * WIDTH, row);
        x.norm(b, sums, modulation, y);
        publish(set + X, row, 4 * b.thread, y, INVERSE(x));
      }
      STAMP(1);
      if (b.index < QKV_BLOCKS) qkv.run(b, set, ALPHA(x));
      else all_consumers();
      STAMP(2);
      fetch_prefix(b, split, keys, values, 0);
      attend(b, split, set, keys, values);
      if (b.thread == 0) mbarrier_arrive(b.shared + DEAD);
      STAMP(3);
      merge(b, set, INVERSE(y));
      STAMP(4);
      product<64, 8, OUT_UNITS>(result, b, set + MERGED + b.index % K_SPLITS * OUT_UNITS * 128 * ROWS);
      publish_partial(result, b, set + OUT, ALPHA(y));
      STAMP(5);
      if (has_row) {
        x.add(b, set + OUT, modulation, row);
        x.norm(b, sums, modulation + 3 * WIDTH, y);
        publish(set + X2, row, 4 * b.thread, y, INVERSE(z));
      }
      STAMP(6);
      geglu(b, set, ALPHA(z), INVERSE(w));
      STAMP(7);
      product<64, 8, DOWN_UNITS>(result, b, set + HIDDEN + b.index % K_SPLITS * DOWN_UNITS * 128 * ROWS);
      wait(b.shared + CLEAN, count & 1);
      publish_partial(result, b, set + DOWN, ALPHA(w));
      STAMP(8);
    }
    if (has_row) {
      const float* last = modulations + (NORMS - 1) * 3 * WIDTH;
      x.add(b, a.sets + (count + 1) % 2 * SET + DOWN, last - 3 * WIDTH, row);
      x.norm(b, sums, last, y);
      x.move(b, a, y, actions, step, row, decided);
    }
  }
  if (has_row && b.thread < ACTION_DIM) a.actions[row * ACTION_DIM + b.thread] = actions[b.thread];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_steps(
    const char* stream, char* sets, u32* counter, float* actions, const char* keys,
    const char* values, long long capacity, const int* prefix_count, const int* decided,
    const float* cos, const float* sin, const float* modulations, const float* target,
    const float* weights, const float* gains, const float* weight_in, const float* bias_in,
    const float* weight_out, const float* bias_out, const float* input_scales,
    const float* weight_scales
#ifdef STAMPS
    , long long* stamps
#endif
) {
  extern __shared__ __align__(1024) char memory[];
  const Arguments a{stream, sets, counter, actions, keys, values, capacity, prefix_count, decided,
                    cos, sin, modulations, target, weights, gains, weight_in, bias_in, weight_out,
                    bias_out, input_scales, weight_scales};
  const u32 shared = shared_address(memory);
  const int thread = threadIdx.x, block = blockIdx.x;
  if (thread == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared + FULL + 8 * i, 1);
      mbarrier_init(shared + EMPTY + 8 * i, 4);
    }
    mbarrier_init(shared + DEAD, 1);
    mbarrier_init(shared + CLEAN, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (thread < CONSUMERS) {
    more_registers<232>();
    for (int set = 0; set < 2; ++set) clear(sets + set * SET, block * CONSUMERS + thread, BLOCKS * CONSUMERS);
    all_consumers();
    if (thread == 0) meet(counter);
    all_consumers();
    Block b;
    b.shared = shared;
    b.scratch = memory + SCRATCH;
    b.index = block;
    b.thread = thread;
    b.group = thread / 128;
    b.warp = thread / 32 % 4;
    b.lane = thread % 32;
    b.row = 16 * b.warp + b.lane / 4;
    b.prefix = *prefix_count;
    float* sums = reinterpret_cast<float*>(memory + SUMS);
    compute(a, b, sums, reinterpret_cast<float*>(memory + ACTIONS)
#ifdef STAMPS
            , stamps
#endif
    );
  } else {
    fewer_registers<40>();
    if (thread == CONSUMERS) stream_weights(a, shared, block);
    if (thread / 32 == CONSUMERS / 32 + 1) clear_sets(sets, shared, block, thread % 32);
  }
}
