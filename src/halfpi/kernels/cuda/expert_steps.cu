// All denoise steps of the action expert in one launch; see expert_steps.py for the mathematics.
//
// 128 blocks, one an SM. Warps 0…7 compute, as two warpgroups that share the K of a product between
// them; warp 8 streams the block's weights into a ring.
#include "exchange.cuh"

using namespace exchange;

namespace {

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
constexpr int PIECES = 9;  // of operands: at most 8 of a product, and queries
constexpr int FULL = BARRIERS, EMPTY = FULL + 8 * SLOTS, STAGED = EMPTY + 8 * SLOTS;
constexpr int SUMS = (STAGED + 8 * PIECES + 15) / 16 * 16, ACTIONS = SUMS + 64;
constexpr int SHARED = ACTIONS + 128;
static_assert(SHARED <= SHARED_BYTES, "the launcher asks for what the kernel uses");

struct Arguments {
  const char* stream;  // (block, layer, unit, 8192 bytes)
  char* sets;
  u32* counters;
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
  int layer = 0;                              // over all steps
  int prefix;
  u32 phases = 0;                             // parities of `STAGED`
  u32* counters;

  // All threads of the block have written what `counter` counts.
  __device__ __forceinline__ void publish(int counter) const {
    named_barrier(1, CONSUMERS);
    if (thread == 0) arrive(counters, counter);
  }
  // By one thread: `blocks` have written it in this layer.
  __device__ __forceinline__ void await(int counter, int blocks) const {
    exchange::await(counters, counter, (layer + 1) * blocks);
  }
  // By thread 0: starts copying a piece of operands.
  __device__ __forceinline__ void fetch(int piece, u32 to, const char* from, u32 bytes) const {
    mbarrier_expect(shared + STAGED + 8 * piece, bytes);
    bulk_copy(shared + to, from, bytes, shared + STAGED + 8 * piece);
  }
  __device__ __forceinline__ void wait_for(int piece) {
    wait(shared + STAGED + 8 * piece, phases >> piece & 1);
    phases ^= 1u << piece;
  }

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
__device__ __forceinline__ void product(float (&result)[N / 4], Block& b, const char* from,
                                        int counter, int writers) {
  constexpr int BATCH = UNITS / 2 < 16 / UNIT_CHUNKS ? UNITS / 2 : 16 / UNIT_CHUNKS;
  constexpr int BATCHES = UNITS / 2 / BATCH;
  constexpr int CHUNKS = BATCH * UNIT_CHUNKS, PIECE = CHUNKS * ROWS * 16;
  all_consumers();  // the operands of the last product are read
  if (b.thread == 0) {
    b.await(counter, writers);
    fence_copies();
    for (int p = 0; p < 2 * BATCHES; ++p) b.fetch(p, OPERANDS + p * PIECE, from + p * PIECE, PIECE);
  }
  float acc[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) acc[i] = 0.0f;
#pragma unroll
  for (int t = 0; t < BATCHES; ++t) {
    const u32 a = b.shared + OPERANDS + (2 * t + b.group) * PIECE;
    b.wait_for(2 * t + b.group);
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
        Format::mma(acc, descriptor(a + (u * UNIT_CHUNKS + 2 * k) * ROWS * 16, ROWS * 16, 128),
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
    product<QKV_ROWS, 16, QKV_UNITS>(result, b, set + X, ROWS_1, ROWS);
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
    int head = b.index * QKV_ROWS / HEAD;
    b.publish(head < HEADS ? QUERY + head : KEYS_VALUES);
  }
};

__device__ __forceinline__ float gated(float gate, float up) {
  float u = 1.5957691216f * (gate + 0.044715f * gate * gate * gate);  // 2 √(2/π) …
  return __fdividef(gate, 1.0f + exp2_fast(-1.44269504f * u)) * up;
}

// The packing gives each thread four neighbouring columns, gate and up side by side.
__device__ __forceinline__ void geglu(Block& b, char* set, float alpha, float inverse_scale) {
  float result[16];
  product<64, 8, WIDE_UNITS>(result, b, set + X2, ROWS_2, ROWS);
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
  b.publish(GATED + b.index / (BLOCKS / K_SPLITS));
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
  int head = HEADS + b.thread / 128;
  const uint4* from = reinterpret_cast<const uint4*>(set + QKV) + (head * 32 + chunk) * ROWS +
                      split.action_first + key - split.prefix_keys;
  u32 to = b.shared + (b.thread / 128 ? VALUES : KEYS) + chunk * 1024 + (key - first) * 16;
  if (key < split.keys && key >= first && key < first + 64) store_shared(to, load_relaxed(from));
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
    Bf16::mma(logits, descriptor(b.shared + OPERANDS + k * 2 * ROWS * 16, ROWS * 16, 128),
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

__device__ __forceinline__ void attend(Block& b, const Split& split, char* set,
                                       const char* keys, const char* values) {
  constexpr int QUERIES = HEAD * 2 * ROWS;
  if (b.thread == 0) {
    b.await(QUERY + split.head, HEAD / QKV_ROWS);
    fence_copies();
    b.fetch(PIECES - 1, OPERANDS, set + QKV + split.head * QUERIES, QUERIES);
    b.await(KEYS_VALUES, 2 * HEAD / QKV_ROWS);
  }
  all_consumers();
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
    if (first == 0) b.wait_for(PIECES - 1);
    __syncwarp();
    attend_block(b, softmax, acc, split.keys - first);
  }

  // Through this group's half of the values, which only it has read, to whole lines of the set.
  const u32 tile = b.shared + VALUES + b.group * 16384;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = softmax.total[i];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    float inverse = total > 0.0f ? 1.0f / total : 0.0f;
    int row = b.row + 8 * i;
    int place = (split.head * ROWS + row) * KEY_SPLITS + b.index % KEY_SPLITS;
    if (row < ROWS && b.group == 0 && b.lane % 4 == 0) {
      store_relaxed(set + LOG_SUMS + place * 4, __float_as_uint(softmax.highest[i] + log2f(total)));
    }
#pragma unroll
    for (int g = 0; g < 16; ++g) {
      store_shared(tile + row * 256 + (g ^ row % 8) * 16 + b.lane % 4 * 4,
                   pack_bf16(acc[4 * g + 2 * i] * inverse, acc[4 * g + 2 * i + 1] * inverse));
    }
  }
  named_barrier(2 + b.group, 128);
  for (int item = b.thread % 128; item < ROWS * 16; item += 128) {
    int row = item / 16, chunk = item % 16;
    long place = (split.head * ROWS + row) * KEY_SPLITS + b.index % KEY_SPLITS;
    *reinterpret_cast<uint4*>(set + AVERAGES + place * (HEAD * 2) + b.group * 256 + chunk * 16) =
        load_shared(tile + row * 256 + (chunk ^ row % 8) * 16);
  }
  b.publish(AVERAGE + split.head);
}

// The splits' averages of one row of a head, weighted by their sums; four columns a thread.
__device__ __forceinline__ void merge_row(const Block& b, char* set, float inverse_scale, int head,
                                          int row) {
  int place = (head * ROWS + row) * KEY_SPLITS, column = b.thread % 64;
  const uint4* log_sums = reinterpret_cast<const uint4*>(set + LOG_SUMS) + place / 4;
  const uint2* averages = reinterpret_cast<const uint2*>(set + AVERAGES) + long(place) * 64;
  uint4 l[4];
  uint2 v[KEY_SPLITS];
  load(l, log_sums, 0, 1);
  load(v, averages, column, 64);

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

// Every 16th row of a head, 64 threads a row.
__device__ __forceinline__ void merge(const Block& b, char* set, float inverse_scale) {
  int head = b.index / KEY_SPLITS, row = b.index % KEY_SPLITS + b.thread / 64 * KEY_SPLITS;
  if (b.thread == 0) b.await(AVERAGE + head, KEY_SPLITS);
  all_consumers();
  if (row < ROWS) merge_row(b, set, inverse_scale, head, row);
  b.publish(MERGE + head);
}

// ---- what one block does for its row of the actions; the residual never leaves its registers

struct Row {
  float x[4];  // columns 4 · thread …
  float4 gate, scale, shift;

  // Of the update that comes and of the norm after it, before waiting for the update.
  __device__ void load(const Block& b, const float* gated, const float* modulation) {
    gate = at(gated + 2 * WIDTH, b);
    scale = at(modulation, b), shift = at(modulation + WIDTH, b);
  }

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
  __device__ void add(const Block& b, const char* partials, int row) {
    all_consumers();
    const uint4* from = reinterpret_cast<const uint4*>(partials) + row * (WIDTH / 4);
    uint4 v[K_SPLITS];
    constexpr int STRIDE = ROWS * WIDTH / 4;
    exchange::load(v, from, b.thread, STRIDE);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int s = 0; s < K_SPLITS; ++s) {
      sum[0] += __uint_as_float(v[s].x), sum[1] += __uint_as_float(v[s].y);
      sum[2] += __uint_as_float(v[s].z), sum[3] += __uint_as_float(v[s].w);
    }
    x[0] += gate.x * sum[0], x[1] += gate.y * sum[1];
    x[2] += gate.z * sum[2], x[3] += gate.w * sum[3];
  }

  __device__ void norm(const Block& b, float* sums, float (&y)[4]) const {
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
  int slot = 0;
  u32 parity = 1;  // of the slot before this turn: the first turn does not wait
  for (int step = 0; step < STEPS; ++step) {
    for (int layer = 0; layer < DEPTH; ++layer) {
      for (int unit = skipped; unit < LAYER_UNITS; ++unit) {
        wait(shared + EMPTY + 8 * slot, parity);
        mbarrier_expect(shared + FULL + 8 * slot, UNIT);
        bulk_copy(shared + RING + slot * UNIT, from + long(layer * LAYER_UNITS + unit) * UNIT, UNIT,
                  shared + FULL + 8 * slot, policy);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
      }
    }
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

  for (int step = 0; step < STEPS; ++step) {
    const float* modulations = a.modulations + long(decided ? STEPS : step) * NORMS * 3 * WIDTH;
    if (has_row) x.embed(b, a, actions);
    for (int layer = 0; layer < DEPTH; ++layer, ++b.layer) {
      char* set = a.sets + b.layer % 2 * SET;
      char* last_set = a.sets + (b.layer + 1) % 2 * SET;
      const float* modulation = modulations + 2 * layer * 3 * WIDTH;
      const char* keys = a.keys + layer * a.capacity * HEAD * 2;
      const char* values = a.values + layer * a.capacity * HEAD * 2;
      scales.load(a, step, layer);
      if (FP8) fetch_prefix(b, split, keys, values, 0);  // E4M3 operands leave the space for them
      STAMP(0);
      if (has_row) {
        x.load(b, layer ? modulation - 3 * WIDTH : modulation, modulation);
        if (layer && b.thread == 0) exchange::await(b.counters, SUMS_2, b.layer * BLOCKS);
        if (layer) x.add(b, last_set + DOWN, row);
        x.norm(b, sums, y);
        publish(set + X, row, 4 * b.thread, y, INVERSE(x));
        b.publish(ROWS_1);
      }
      STAMP(1);
      if (b.index < QKV_BLOCKS) qkv.run(b, set, ALPHA(x));
      else all_consumers();
      STAMP(2);
      if (!FP8) fetch_prefix(b, split, keys, values, 0);
      attend(b, split, set, keys, values);
      STAMP(3);
      merge(b, set, INVERSE(y));
      STAMP(4);
      const int k = b.index % K_SPLITS;
      product<64, 8, OUT_UNITS>(result, b, set + MERGED + k * OUT_UNITS * 128 * ROWS, MERGE + k, KEY_SPLITS);
      publish_partial(result, b, set + OUT, ALPHA(y));
      b.publish(SUMS_1);
      STAMP(5);
      if (has_row) {
        x.load(b, modulation, modulation + 3 * WIDTH);
        if (b.thread == 0) b.await(SUMS_1, BLOCKS);
        x.add(b, set + OUT, row);
        x.norm(b, sums, y);
        publish(set + X2, row, 4 * b.thread, y, INVERSE(z));
        b.publish(ROWS_2);
      }
      STAMP(6);
      geglu(b, set, ALPHA(z), INVERSE(w));
      STAMP(7);
      product<64, 8, DOWN_UNITS>(result, b, set + HIDDEN + k * DOWN_UNITS * 128 * ROWS, GATED + k,
                                 BLOCKS / K_SPLITS);
      publish_partial(result, b, set + DOWN, ALPHA(w));
      b.publish(SUMS_2);
      STAMP(8);
    }
    if (has_row) {
      const float* last = modulations + (NORMS - 1) * 3 * WIDTH;
      x.load(b, last - 3 * WIDTH, last);
      if (b.thread == 0) exchange::await(b.counters, SUMS_2, b.layer * BLOCKS);
      x.add(b, a.sets + (b.layer + 1) % 2 * SET + DOWN, row);
      x.norm(b, sums, y);
      x.move(b, a, y, actions, step, row, decided);
    }
  }
  if (has_row && b.thread < ACTION_DIM) a.actions[row * ACTION_DIM + b.thread] = actions[b.thread];
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS, 1) expert_steps(
    const char* stream, char* sets, u32* counters, float* actions, const char* keys,
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
  const Arguments a{stream, sets, counters, actions, keys, values, capacity, prefix_count, decided,
                    cos, sin, modulations, target, weights, gains, weight_in, bias_in, weight_out,
                    bias_out, input_scales, weight_scales};
  const u32 shared = shared_address(memory);
  const int thread = threadIdx.x, block = blockIdx.x;
  if (thread == 0) {
    for (int i = 0; i < SLOTS; ++i) {
      mbarrier_init(shared + FULL + 8 * i, 1);
      mbarrier_init(shared + EMPTY + 8 * i, 4);
    }
    for (int i = 0; i < PIECES; ++i) mbarrier_init(shared + STAGED + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (thread < CONSUMERS) {
    more_registers<232>();
    if (block == 0 && thread < COUNTERS) *place(counters, thread) = 0;
    all_consumers();
    if (thread == 0) meet(place(counters, COUNTERS));
    all_consumers();
    Block b;
    b.shared = shared;
    b.scratch = memory + SCRATCH;
    b.index = block;
    b.counters = counters;
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
  }
}
