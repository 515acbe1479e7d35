// All layers of SigLIP in one launch, whose blocks wait for each other (siglip_block.cuh).
#include "siglip_service.cuh"

namespace {

// The 128 threads that multiply. Of products, a thread has two of each eight columns, of two rows, the second
// eight further on.
struct Group {
  const Block& b;
  RingCursor<X_LINES> x_at;
  RingCursor<UNITS> at;
  float residual[HEAD / 2];
  u32 constants = 0;
  int layer = 0, meetings = 0;

  __device__ __forceinline__ int warp_row() const { return b.row + b.warp * 16; }
  __device__ __forceinline__ int row() const { return warp_row() + b.lane / 4; }
  // Where the thread stages its first row's first column, of `bytes` for a pair.
  __device__ __forceinline__ u32 staged(int bytes) const {
    return b.shared + STAGED + (b.warp * 16 + b.lane / 4) * PITCH + b.lane % 4 * bytes;
  }

  // What is loaded of the layer's constants is ordered by this address alone, so that it may be loaded early.
  __device__ __forceinline__ void await_constants() {
    wait(b.constants_full(layer), layer / 2 % 2);
    constants = b.shared + CONSTANTS_AT + layer % 2 * CONSTANT_BYTES;
    not_earlier();
  }
  __device__ __forceinline__ void not_earlier() { asm volatile("" : "+r"(constants)); }
  __device__ __forceinline__ float number(Number which) const {
    float v;
    asm("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(constants + (NUMBERS_AT + which) * 4));
    return v;
  }
  // Of the thread's two columns of `chunk`.
  __device__ __forceinline__ float2 vector(int which, int chunk) const {
    float2 v;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];"
        : "=f"(v.x), "=f"(v.y)
        : "r"(constants + (which * HEAD + chunk * 8 + b.lane % 4 * 2) * 4));
    return v;
  }

  // something(chunk, second, i): of the columns of HEAD / 8 chunks, the i-th sum and the next.
  template <class Do>
  __device__ static __forceinline__ void each(const Do& something) {
#pragma unroll
    for (int i = 0; i < HEAD / 2; i += 2) something(i / 4, i / 2 % 2, i);
  }
  template <int N>
  __device__ static __forceinline__ void clear(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = 0.0f;
  }

  // sums += a line of rows times a line of STEP units of weights, once they are there.
  template <class Format, int STEP, int N>
  __device__ __forceinline__ void begin_line(float (&sums)[N]) const {
    const Swizzled rows(b.shared + X + x_at.slot * X_LINE), columns(b.shared + WEIGHTS + at.slot * UNIT);
    wait(b.line_full(x_at.slot), x_at.parity);
#pragma unroll
    for (int i = 0; i < STEP; ++i) wait(b.unit_full(at.slot + i), at.parity);
    settle(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < LINE; k += 32) Format::mma(sums, rows.at(k), columns.at(k));
    wgmma_commit();
  }
  // Of a line whose products are done. Rows that are multiplied again stay.
  template <int STEP, bool STAY>
  __device__ __forceinline__ void release(int x_slot, int slot) const {
    if (!STAY && b.lane == 0) mbarrier_arrive(b.line_empty(x_slot), 1);
    if (b.lane < STEP) mbarrier_arrive(b.unit_empty(slot + b.lane), 1);
  }
  template <class Format, int LINES, int STEP = 1, bool STAY = false, int N>
  __device__ __forceinline__ void multiply(float (&sums)[N]) {
    const RingCursor<X_LINES> begin = x_at;
    int x_before = 0, before = 0;
    clear(sums);
#pragma unroll 1
    for (int line = 0; line < LINES; ++line) {
      begin_line<Format, STEP>(sums);
      wgmma_wait<1>();
      if (line > 0) release<STEP, STAY>(x_before, before);
      x_before = x_at.slot, before = at.slot;
      x_at.advance();
      at.advance(STEP);
    }
    wgmma_wait<0>();
    settle(sums);
    release<STEP, STAY>(x_before, before);
    if (STAY) x_at = begin;
  }
  __device__ __forceinline__ void leave_out() {
    wait(b.unit_full(at.slot), at.parity);
    if (b.lane == 0) mbarrier_arrive(b.unit_empty(at.slot), 1);
    at.advance();
  }

  // So many pieces of each of the warp's rows, from where they are staged to `to`, rows `stride` bytes apart.
  template <class Piece, int PIECES>
  __device__ __forceinline__ void copy_out(char* to, long stride) const {
    constexpr int COUNT = (16 * PIECES + 31) / 32, SIZE = sizeof(Piece);
    int lane = b.lane;
    asm volatile("" : "+r"(lane));  // else all that follows from it would be kept, for which registers lack
    const auto index = [&](int i) { return lane + 32 * i; };
    Piece pieces[COUNT];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (index(i) >= 16 * PIECES) continue;
      const int at = index(i) / PIECES * PITCH + index(i) % PIECES * SIZE;
      pieces[i] = *reinterpret_cast<const Piece*>(b.memory + STAGED + b.warp * 16 * PITCH + at);
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      if (index(i) >= 16 * PIECES) continue;
      *reinterpret_cast<Piece*>(to + index(i) / PIECES * stride + index(i) % PIECES * SIZE) = pieces[i];
    }
    __syncwarp();
  }
  // What has been copied out may be told.
  __device__ __forceinline__ void meet() {
    named_barrier_arrive(MEETING + meetings++ % 2, MEETING_THREADS);
  }

  __device__ __forceinline__ char* residual_at() const {
    return b.a.residual + (long(row()) * WIDTH + b.share * HEAD + b.lane % 4 * 2) * 2;
  }
  __device__ __forceinline__ void load() {
    const char* from = residual_at();
    each([&](int chunk, int second, int i) {
      const u32 word = *reinterpret_cast<const u32*>(from + (second * 8 * WIDTH + chunk * 8) * 2);
      residual[i] = low_bf16(word), residual[i + 1] = high_bf16(word);
    });
  }
  __device__ __forceinline__ void store() const {
    char* const to = residual_at();
    each([&](int chunk, int second, int i) {
      u32* const word = reinterpret_cast<u32*>(to + (second * 8 * WIDTH + chunk * 8) * 2);
      *word = pack_bf16(residual[i], residual[i + 1]);
    });
  }

  // Mean of this block's columns, and sum of squares around it, in whose last bits is a mark, to the team.
  __device__ __forceinline__ void tell_statistics(bool mlp) const {
    float mean[2] = {}, squares[2] = {};
    each([&](int, int second, int i) { mean[second] += residual[i] + residual[i + 1]; });
#pragma unroll
    for (int second = 0; second < 2; ++second) mean[second] = over_quad(mean[second], false) * (1.0f / HEAD);
    each([&](int, int second, int i) {
      const float even = residual[i] - mean[second], odd = residual[i + 1] - mean[second];
      squares[second] = fmaf(even, even, fmaf(odd, odd, squares[second]));
    });
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      squares[second] = over_quad(squares[second], false);
      if (b.lane % 4 == second) {
        const u32 marked = (__float_as_uint(squares[second]) & ~31u) | (layer + 1);
        Word* const to = statistics(mlp) + b.share * 16 + b.lane / 4 + 8 * second;
        store_relaxed(to, Word{__float_as_uint(mean[second]), marked});
      }
    }
  }
  // Of the warp's sixteen rows: (HEADS, 16).
  __device__ __forceinline__ Word* statistics(bool mlp) const {
    return b.a.statistics + (int(mlp) * b.a.images * TOKENS + warp_row()) * HEADS;
  }
  // What norms a row: a factor and what is added. A lane has a quarter of the team's words of two
  // neighbouring rows.
  __device__ __forceinline__ void hear_statistics(bool mlp, float (&inverse)[2], float (&offset)[2]) const {
    constexpr int COUNT = HEADS / 4;
    const Word* const from = statistics(mlp) + b.lane * 2;
    Word words[COUNT][2];
    Watchdog watchdog;
    while (true) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) load_words(words[i], from + i * 64);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) all &= is_new(words[i][0]) && is_new(words[i][1]);
      if (__all_sync(~0u, all)) break;
      nap<NAP>();
      watchdog.check();
    }
    float means[2] = {}, factors[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float squares = 0.0f, between = 0.0f;
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        means[row] += __uint_as_float(words[i][row].low);
        squares += __uint_as_float(words[i][row].high);
      }
      means[row] = over_quarters(means[row]) * (1.0f / HEADS);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const float off = __uint_as_float(words[i][row].low) - means[row];
        between = fmaf(off, off, between);
      }
      squares = over_quarters(fmaf(float(HEAD), between, squares));
      factors[row] = rsqrtf(squares * (1.0f / WIDTH) + float(EPSILON));
    }
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const int from_lane = b.lane / 8 + 4 * second;
      inverse[second] = of_row(factors, from_lane);
      offset[second] = -of_row(means, from_lane) * inverse[second];
    }
  }
  // Of the neighbouring rows that a lane has, what the thread's row has.
  __device__ __forceinline__ float of_row(const float (&pair)[2], int from_lane) const {
    const float even = __shfl_sync(~0u, pair[0], from_lane), odd = __shfl_sync(~0u, pair[1], from_lane);
    return b.lane / 4 % 2 ? odd : even;
  }
  __device__ __forceinline__ bool is_new(Word word) const { return (word.high & 31) == layer + 1; }
  __device__ static __forceinline__ float over_quarters(float v) {
    v += __shfl_xor_sync(~0u, v, 8);
    return v + __shfl_xor_sync(~0u, v, 16);
  }
  __device__ static __forceinline__ void load_words(Word (&words)[2], const Word* from) {
    u64 first, second;
    asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(first), "=l"(second)
                 : "l"(from)
                 : "memory");
    words[0] = Word::of(first), words[1] = Word::of(second);
  }

  // The residual, normed, to the team.
  __device__ __forceinline__ void norm(bool mlp) {
    constexpr int CHUNKS = HEAD / 8;
    float inverse[2], offset[2];
    float2 gains[CHUNKS], shifts[CHUNKS];
    tell_statistics(mlp);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      gains[i] = vector(mlp ? MLP_GAIN : ATTN_GAIN, i);
      shifts[i] = vector(mlp ? MLP_SHIFT : ATTN_SHIFT, i);
    }
    hear_statistics(mlp, inverse, offset);
    unsigned short out[HEAD / 4];
    each([&](int chunk, int second, int i) {
      const float2 gain = gains[chunk], shift = shifts[chunk];
      const float even = fmaf(residual[i], inverse[second], offset[second]);
      const float odd = fmaf(residual[i + 1], inverse[second], offset[second]);
      out[i / 2] = pack_e4m3(fmaf(even, gain.x, shift.x), fmaf(odd, gain.y, shift.y));
    });
    const u32 to = staged(2);
    each([&](int chunk, int second, int i) {
      store_shared(to + second * 8 * PITCH + chunk * 8, out[i / 2]);
    });
    copy_out<uint2, HEAD / 8>(b.a.normed_rows + long(warp_row()) * WIDTH + b.share * HEAD, WIDTH);
    meet();
  }

  // Keys and values go to the image's other blocks, and meanwhile weights come for the queries, which stay
  // here, as operands.
  __device__ __forceinline__ void project(u32 (&queries)[20]) {
    float pairs[HEAD], sums[HEAD / 2];
    multiply<E4m3, NORMED_LINES, PAIR, true>(pairs);
    const float alpha = number(QKV_ALPHA);
    const u32 to = staged(4);
#pragma unroll
    for (int values = 0; values < 2; ++values) {
      const float* own = pairs + values * (HEAD / 2);
      each([&](int chunk, int second, int i) {
        store_shared(to + second * 8 * PITCH + chunk * 16, pack_bf16(own[i] * alpha, own[i + 1] * alpha));
      });
      const int first = b.key_row(layer, values) + warp_row() % TOKENS;
      copy_out<uint4, HEAD / 8>(b.a.keys + first * long(PITCH), PITCH);
    }
    meet();
    multiply<E4m3, NORMED_LINES>(sums);
    each([&](int chunk, int, int i) {
      const float2 bias = vector(QUERY_BIAS, chunk);
      queries[i / 2] = pack_bf16(fmaf(sums[i], alpha, bias.x), fmaf(sums[i + 1], alpha, bias.y));
    });
    queries[18] = queries[19] = 0;
  }
  __device__ __forceinline__ void attend(const u32 (&queries)[20]) {
    constexpr int PART = TOKENS / 2;  // keys, for whose logits a thread has registers
    const u32 keys = b.shared + KEYS, values = b.shared + VALUES;
    Softmax softmax;
#pragma unroll 1
    for (int first = 0; first < TOKENS; first += PART) {
      const SwizzledLines<2 * MOST> most(keys + first * 2 * MOST);
      const SwizzledLines<2 * REST> rest(keys + MOST_BYTES + first * 2 * REST);
      float logits[PART / 2];
      clear(logits);
      wait(b.keys_full(first / PART), layer % 2);
      settle(logits);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < MOST; k += 16) Bf16::mma(logits, queries + k / 4, most.at(k * 2));
      Bf16::mma(logits, queries + MOST / 4, rest.at(0));
      wgmma_commit();
      wgmma_wait<0>();
      settle(logits);
      keep(queries);
      softmax.add<PART>(logits, values, first);
    }
    softmax.template store<false>(b.shared + STAGED, 1.0f);
    copy_out<uint4, HEAD / 8>(b.a.mixed_rows + (long(warp_row()) * WIDTH + b.share * HEAD) * 2, 2 * WIDTH);
    meet();
  }

  // Both parts of the hidden columns, to the team. The first is on its way while the last is multiplied.
  __device__ __forceinline__ void widen() {
    char* const to = b.a.hidden_rows + long(warp_row()) * HIDDEN;
    widen_part<FIRST, true>(0, to + b.share * FIRST);
    widen_part<LAST, false>(FIRST, to + LAST_BEGIN + b.share * LAST);
  }
  template <int COLUMNS, bool STAY>
  __device__ __forceinline__ void widen_part(int column, char* to) {
    float sums[COLUMNS / 2];
    multiply<E4m3, NORMED_LINES, PAIR, STAY>(sums);
    activate(sums, column);
    copy_out<uint4, COLUMNS / 16>(to, HIDDEN);
    meet();
  }

  // GELU of sums of columns from `column` on.
  template <int N>
  __device__ __forceinline__ void activate(const float (&sums)[N], int column) {
    constexpr int BATCH = N % 16 ? 12 : 16;  // sums, whose chains of instructions run side by side
    static_assert(N % BATCH == 0, "batches are whole");
    const float alpha = number(FC1_ALPHA), factor = number(HIDDEN_FACTOR);
    const u32 to = staged(2);
#pragma unroll
    for (int begin = 0; begin < N; begin += BATCH) {
      not_earlier();
      float2 bias[BATCH / 4];
      unsigned short out[BATCH / 2];
#pragma unroll
      for (int i = 0; i < BATCH / 4; ++i) bias[i] = vector(FC1_BIAS, column / 8 + begin / 4 + i);
#pragma unroll
      for (int i = 0; i < BATCH; i += 2) {
        const float even = fmaf(sums[begin + i], alpha, bias[i / 4].x);
        const float odd = fmaf(sums[begin + i + 1], alpha, bias[i / 4].y);
        out[i / 2] = pack_e4m3(gelu_product(even, 0.5f * even) * factor,
                               gelu_product(odd, 0.5f * odd) * factor);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i += 2) {
        store_shared(to + i / 2 % 2 * 8 * PITCH + (begin + i) / 4 * 8, out[i / 2]);
      }
    }
  }

  // residual += alpha · sums + bias.
  __device__ __forceinline__ void update(const float (&sums)[HEAD / 2], float alpha, int bias_of) {
    each([&](int chunk, int, int i) {
      const float2 bias = vector(bias_of, chunk);
      residual[i] += fmaf(sums[i], alpha, bias.x), residual[i + 1] += fmaf(sums[i + 1], alpha, bias.y);
    });
  }

  __device__ __forceinline__ void run() {
    load();
    // Both halves of a layer in one loop, which is shorter: code that is not in a cache takes time.
#pragma unroll 1
    for (int half = 0; half < 2 * DEPTH; ++half) {
      const bool mlp = half % 2;
      if (!mlp) await_constants();
      norm(mlp);
      float sums[HEAD / 2];
      if (mlp) {
        leave_out();
        widen();
        multiply<E4m3, HIDDEN_LINES>(sums);
      } else {
        u32 queries[20];
        project(queries);
        attend(queries);
        multiply<Bf16, MIXED_LINES>(sums);
      }
      update(sums, mlp ? number(FC2_ALPHA) : 1.0f, mlp ? FC2_BIAS : OUT_BIAS);
      if (!mlp) continue;
      if (b.lane == 0) mbarrier_arrive(b.constants_empty(layer), 1);
      ++layer;
    }
    store();
  }
};

}  // namespace

// residual: bf16 (images · 256, WIDTH), of which the layers make what they leave of it. Buffers between
// blocks: normed and hidden in E4M3 and mixed in bf16, of as many rows, keys: bf16 (2, images, HEADS, 2, 256,
// HEAD), and statistics and flags, which begin as zeros (siglip_block.cuh).
extern "C" __global__ void __launch_bounds__(32 * WARPS + 128, 1)
    siglip_layers(const __grid_constant__ TensorMap qkv, const __grid_constant__ TensorMap out,
                  const __grid_constant__ TensorMap fc1, const __grid_constant__ TensorMap fc2,
                  const __grid_constant__ TensorMap normed_map,
                  const __grid_constant__ TensorMap mixed_map,
                  const __grid_constant__ TensorMap hidden_map, const __grid_constant__ TensorMap most,
                  const __grid_constant__ TensorMap rest, const float* constants, char* residual,
                  char* normed, char* mixed, char* hidden, char* keys, Word* statistics, u32* flags,
                  long long images) {
  extern __shared__ __align__(1024) char memory[];
  const Arguments a{qkv, out, fc1, fc2, normed_map, mixed_map, hidden_map, most, rest, constants,
                    residual, normed, mixed, hidden, keys, statistics, flags, int(images)};
  const int lane = threadIdx.x % 32, share = blockIdx.x % HEADS, row = blockIdx.x / HEADS * ROWS;
  const Block b{memory, shared_address(memory), lane, uniform(threadIdx.x / 32), share, row, a};
  if (threadIdx.x == 0) b.init_barriers();
  __syncthreads();
  if (b.warp < WARPS) {
    Group{b}.run();
  } else if (b.warp == WARPS) {
    if (elected()) WeightFiller{b}.fill();
  } else if (b.warp == WARPS + 1) {
    RowFiller{b}.fill();
  } else if (b.warp == WARPS + 2) {
    Teller{b}.tell_all();
  }
}
