// All layers of SigLIP in one launch, whose blocks wait for each other (siglip_block.cuh).
#include "siglip_residual.cuh"

namespace {

struct Layers : Residual {
  using Residual::Residual;

  // Keys go to the image's other blocks while values and queries are multiplied, and values while the keys
  // are weighed. The queries stay here, as operands.
  __device__ __forceinline__ void project(u32 (&queries)[20]) {
    float keys[HEAD / 2], pairs[HEAD];
    const float alpha = number(QKV_ALPHA);
    multiply<E4m3, NORMED_LINES, 1, true>(keys);
    hand_out(keys, alpha, 0);
    leave_out();
    multiply<E4m3, NORMED_LINES, PAIR>(pairs);
    hand_out(pairs, alpha, 1);
    each([&](int chunk, int, int i) {
      const float2 bias = vector(QUERY_BIAS, chunk);
      const float* own = pairs + HEAD / 2 + i;
      queries[i / 2] = pack_bf16(fmaf(own[0], alpha, bias.x), fmaf(own[1], alpha, bias.y));
    });
    queries[18] = queries[19] = 0;
  }
  // Keys or values.
  __device__ __forceinline__ void hand_out(const float* sums, float alpha, int values) {
    const u32 to = staged(4);
    each([&](int chunk, int second, int i) {
      store_shared(to + second * 8 * PITCH + chunk * 16, pack_bf16(sums[i] * alpha, sums[i + 1] * alpha));
    });
    const int first = b.operand(layer, values) * TOKENS + warp_row() % TOKENS;
    copy_out<uint4, HEAD / 8>(b.a.keys + first * long(PITCH), PITCH);
    meet();
  }
  __device__ __forceinline__ void attend(const u32 (&queries)[20]) {
    const SwizzledLines<2 * MOST> most(b.operand_at(0));
    const SwizzledLines<2 * REST> rest(b.operand_at(0) + MOST_BYTES);
    float logits[TOKENS / 2];
    clear(logits);
    wait_together(b.operand_full(0), layer % 2);
    settle(logits);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < MOST; k += 16) Bf16::mma(logits, queries + k / 4, most.at(k * 2));
    Bf16::mma(logits, queries + MOST / 4, rest.at(0));
    wgmma_commit();
    wgmma_wait<0>();
    settle(logits);
    keep(queries);
    Softmax softmax;
    softmax.add<TOKENS / 2>(logits, b.operand_at(1), [&] { wait_together(b.operand_full(1), layer % 2); });
    softmax.store<false>(b.shared + STAGED + b.group * GROUP_ROWS * PITCH, 1.0f);
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
    const u32 factors = pack_f16(factor, factor), to = staged(2);
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
        out[i / 2] = gelu_e4m3(pack_f16(even, odd), factors);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i += 2) {
        store_shared(to + i / 2 % 2 * 8 * PITCH + (begin + i) / 4 * 8, out[i / 2]);
      }
    }
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
  const int warp = uniform(threadIdx.x / 32);
  const Block b{memory, shared_address(memory), lane, warp, warp / 4, share, row, a};
  if (threadIdx.x == 0) b.init_barriers();
  __syncthreads();
  if (b.warp < WARPS) {
    if (GROUPS > 1) more_registers<232>();  // than an even share
    Layers(b).run();
    return;
  }
  if (GROUPS > 1) fewer_registers<40>();
  if (b.warp == WARPS) {
    if (elected()) WeightFiller{b}.fill();
  } else if (b.warp == WARPS + 1) {
    RowFiller{b}.fill();
  } else if (b.warp == WARPS + 2) {
    Teller{b}.tell_all();
  }
}
