// A linear layer, x (m, k) · weight (n, k)ᵀ, the residual that it is added to, and the LayerNorm of that. A
// cluster has 64 whole rows. Each of its blocks has a share of the columns, brings a share of x for all, and
// tells the others mean and squares of its columns, which stay in its registers until they are normed.
#include "ring.cuh"
#include "softmax.cuh"

namespace {

using namespace hopper;

constexpr int PEERS = 8, ROWS = 64, WARPS = ROWS / 16, THREADS = 32 * WARPS + 32;  // the last warp copies
constexpr int N = PEERS * WIDTH;
constexpr int X_BYTES = ROWS * LINE, STAGE = X_BYTES + W_BYTES;
constexpr int PART = ROWS / PEERS;  // rows of x that a block brings
// A thread has two of each eight columns of a product. So that these are four side by side of each sixteen
// of the output, weights of the first two columns of each four lie before those of the last two.
constexpr int FOURS = WIDTH / 16;  // that a thread has, in two rows
constexpr int OUT_BYTES = OUT_FP8 ? 1 : 2;
// Of rows that are staged, where the ring was: an odd number of 16 bytes, so that eight lie in all banks.
constexpr int PIECES = WIDTH * OUT_BYTES / 16, PITCH = (PIECES | 1) * 16;
constexpr int TAKEN = STAGES * STAGE, TAKEN_BYTES = PEERS * ROWS * 8;
constexpr int BIASES = TAKEN + TAKEN_BYTES, GAINS = BIASES + WIDTH * 4, SHIFTS = GAINS + WIDTH * 4;
constexpr int BARRIERS = SHIFTS + WIDTH * 4;
static_assert(BARRIERS + 16 * STAGES + 8 * WARPS <= SHARED_BYTES, "the launcher allocates what is used");
static_assert(ROWS * PITCH <= TAKEN, "outputs have room");
static_assert(WIDTH % 16 == 0 && PART == 8, "lines are swizzled in groups of eight");

struct Ring : OperandRing<X_BYTES, BARRIERS> {
  __device__ __forceinline__ u32 taken(int warp) const { return empty(STAGES) + 8 * warp; }

  __device__ __forceinline__ void init() const {
    for (int slot = 0; slot < STAGES; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), PEERS * WARPS);
    }
    for (int warp = 0; warp < WARPS; ++warp) mbarrier_init(taken(warp), 1);
    mbarriers_ready();
    for (int warp = 0; warp < WARPS; ++warp) mbarrier_expect(taken(warp), TAKEN_BYTES / WARPS);
  }
  // By a whole warp, whose products have read the slot; not if it is not filled again: then nobody waits,
  // and the other block may have ended.
  __device__ __forceinline__ void release(int slot) const {
    const int lane = threadIdx.x % 32;
    if (lane < PEERS) mbarrier_arrive_at(in_block(empty(slot), lane));
  }
};

// Of a warp's rows, what the blocks of the cluster know of each: mean, and sum of squares around it.
struct Taken {
  const Ring& ring;
  int warp;

  __device__ __forceinline__ int at(int rank, int row) const {
    return TAKEN + ((warp * PEERS + rank) * 16 + row) * 8;
  }
  // A quad tells all blocks.
  __device__ __forceinline__ void push_to_all(int rank, int row, float2 part) const {
#pragma unroll
    for (int i = 0; i < PEERS; i += 4) {
      const int peer = i + threadIdx.x % 4;
      push(in_block(ring.shared + at(rank, row), peer), part, in_block(ring.taken(warp), peer));
    }
  }
  // Mean and variance of a whole row.
  __device__ __forceinline__ float2 whole(const char* memory, int row) const {
    float2 parts[PEERS];
    float mean = 0.0f, squares = 0.0f, between = 0.0f;
#pragma unroll
    for (int i = 0; i < PEERS; ++i) {
      parts[i] = *reinterpret_cast<const float2*>(memory + at(i, row));
      mean += parts[i].x, squares += parts[i].y;
    }
    mean *= 1.0f / PEERS;
#pragma unroll
    for (int i = 0; i < PEERS; ++i) {
      const float off = parts[i].x - mean;
      between = fmaf(off, off, between);
    }
    return {mean, fmaf(float(WIDTH), between, squares) * (1.0f / N)};
  }
};

// By one thread, which fills the ring. Weights do not depend on the kernel before.
struct Filler {
  const Ring& ring;
  const TensorMap &x, &weight;
  int steps, row, rank;

  __device__ __forceinline__ int early() const { return steps < STAGES ? steps : STAGES; }
  __device__ __forceinline__ void bring_weights(int slot, int step) const {
    const u32 full = ring.full(slot);
    mbarrier_expect(full, STAGE);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 to = ring.weights(slot) + i * (W_BYTES / 2);
      tensor_copy(to, weight, step * STEP, 2 * i, rank * (WIDTH / 4), full);
    }
  }
  // What needs neither the other blocks nor the kernel before.
  __device__ __forceinline__ void begin() const {
    prefetch_map(x);
    for (int step = 0; step < early(); ++step) bring_weights(step, step);
  }
  __device__ __forceinline__ void fill(const char* later, int later_bytes) const {
    RingCursor<STAGES> at{0, 1};
    for (int step = 0; step < steps; ++step) {
      if (step >= STAGES) {
        wait(ring.empty(at.slot), at.parity);
        bring_weights(at.slot, step);
      }
      tensor_copy_to_all<PEERS>(ring.x(at.slot) + rank * (PART * LINE), x, step * STEP, row + rank * PART,
                                ring.full(at.slot));
      if (step + 1 == early()) prefetch_share(later, later_bytes);
      at.advance();
    }
  }
};

// What a thread has: four columns of each sixteen, of two rows, the second eight further on.
struct Tile {
  float v[WIDTH / 2];

  // Column `i` of four, where the product leaves it.
  __device__ __forceinline__ float& at(int four, int second, int i) {
    return v[4 * (i / 2 * FOURS + four) + 2 * second + i % 2];
  }

  template <typename Do>
  __device__ static __forceinline__ void each(const Do& something) {
#pragma unroll
    for (int four = 0; four < FOURS; ++four) {
#pragma unroll
      for (int second = 0; second < 2; ++second) something(four, second);
    }
  }
  // Mean and sum of squares around it, of this block's columns of both rows.
  __device__ __forceinline__ void know(float2 (&parts)[2]) {
    float sums[2][4] = {}, squares[2][4] = {};
    each([&](int four, int second) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[second][i] += at(four, second, i);
    });
#pragma unroll
    for (int second = 0; second < 2; ++second) parts[second].x = over_four(sums[second]) * (1.0f / WIDTH);
    each([&](int four, int second) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float off = at(four, second, i) - parts[second].x;
        squares[second][i] = fmaf(off, off, squares[second][i]);
      }
    });
#pragma unroll
    for (int second = 0; second < 2; ++second) parts[second].y = over_four(squares[second]);
  }
  __device__ static __forceinline__ float over_four(const float (&v)[4]) {
    return over_quad((v[0] + v[1]) + (v[2] + v[3]), false);
  }
};

// Steps `first` to `last` of `all`, from the cursor on. Leaves waiting for the last to the caller.
__device__ __forceinline__ void multiply(Tile& product, const Ring& ring, RingCursor<STAGES>& at, int first,
                                         int last, int all) {
#pragma unroll 1
  for (int step = first; step < last; ++step) {
    ring.begin_products(product.v, at);
    wgmma_wait<1>();
    if (step > 0 && step - 1 + STAGES < all) ring.release(at.slot ? at.slot - 1 : STAGES - 1);
    at.advance();
  }
}

}  // namespace

// residual: bf16 (m, N), to which alpha times the product and bias are added. out: (m, N), its LayerNorm,
// times gain and with shift. alpha, scale: one without. later: weights that the next product reads.
extern "C" __global__ void __cluster_dims__(PEERS, 1, 1) __launch_bounds__(THREADS, 1)
    linear_norm(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
                const float* alpha, const float* bias, char* residual, const float* gain, const float* shift,
                char* out, const float* scale, long long m, long long k, const char* later,
                long long later_bytes) {
  extern __shared__ __align__(1024) char memory[];
  const Ring ring{shared_address(memory)};
  const int thread = threadIdx.x, lane = thread % 32, warp = uniform(thread / 32), rank = cluster_rank();
  const int first_row = blockIdx.x / PEERS * ROWS, first_column = rank * WIDTH;
  const int steps = (k + STEP - 1) / STEP;
  const Filler filler{ring, x, weight, steps, first_row, rank};

  launch_dependents();
  if (warp == WARPS && elected()) ring.init();
  __syncwarp();
  cluster_arrive_relaxed();
  if (warp == WARPS && elected()) filler.begin();
  const float times = alpha ? *alpha : 1.0f, factor = scale ? reciprocal(*scale) : 1.0f;
  float* const columns = reinterpret_cast<float*>(memory + BIASES);
#pragma unroll 1
  for (int i = thread; i < WIDTH; i += THREADS) {
    const int column = first_column + i;
    columns[i] = bias ? bias[column] : 0.0f;
    columns[WIDTH + i] = gain[column] * factor, columns[2 * WIDTH + i] = shift[column] * factor;
  }
  __syncthreads();
  cluster_wait();
  wait_for_kernel_before();

  if (warp == WARPS) {
    if (elected()) filler.fill(later, later_bytes);
    return;
  }
  const int first = lane % 4 * 4, row = warp * 16 + lane / 4;  // of the thread
  const int valid = m - first_row;
  char* const place = residual + ((first_row + row) * long(N) + first_column + first) * 2;
  const auto columns_at = [&](int begin, int four) {
    return *reinterpret_cast<const float4*>(memory + begin + (four * 16 + first) * 4);
  };

  uint2 before[FOURS][2];
  Tile::each([&](int four, int second) {
    before[four][second] = make_uint2(0, 0);
    if (row + second * 8 < valid) {
      before[four][second] = *reinterpret_cast<const uint2*>(place + second * 8 * N * 2 + four * 32);
    }
  });
  RingCursor<STAGES> at;
  Tile tile, more;
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) tile.v[i] = 0.0f;
  multiply(tile, ring, at, 0, steps / 2, steps);
  Tile::each([&](int four, int second) {  // while the tensor cores are busy
    const float4 biases = columns_at(BIASES, four);
    const uint2 words = before[four][second];
    more.at(four, second, 0) = low_bf16(words.x) + biases.x;
    more.at(four, second, 1) = high_bf16(words.x) + biases.y;
    more.at(four, second, 2) = low_bf16(words.y) + biases.z;
    more.at(four, second, 3) = high_bf16(words.y) + biases.w;
  });
  settle(more.v);
  multiply(tile, ring, at, steps / 2, steps, steps);
  wgmma_wait<0>();
  settle(tile.v);
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) tile.v[i] = fmaf(tile.v[i], times, more.v[i]);

  const Taken taken{ring, warp};
  float2 parts[2];
  tile.know(parts);
#pragma unroll
  for (int second = 0; second < 2; ++second) taken.push_to_all(rank, lane / 4 + second * 8, parts[second]);
  named_barrier(1, 32 * WARPS);  // all have read the ring
  Tile::each([&](int four, int second) {  // while they are on their way
    const uint2 words = make_uint2(pack_bf16(tile.at(four, second, 0), tile.at(four, second, 1)),
                                   pack_bf16(tile.at(four, second, 2), tile.at(four, second, 3)));
    if (row + second * 8 < valid) {
      *reinterpret_cast<uint2*>(place + second * 8 * N * 2 + four * 32) = words;
    }
  });
  float gains[4 * FOURS], shifts[4 * FOURS];
#pragma unroll
  for (int four = 0; four < FOURS; ++four) {
    *reinterpret_cast<float4*>(gains + 4 * four) = columns_at(GAINS, four);
    *reinterpret_cast<float4*>(shifts + 4 * four) = columns_at(SHIFTS, four);
  }
  settle(gains);
  settle(shifts);
  wait(ring.taken(warp), 0);  // the last that comes from other blocks, which may end

  float inverse[2], offset[2];
#pragma unroll
  for (int second = 0; second < 2; ++second) {
    const float2 whole = taken.whole(memory, lane / 4 + second * 8);
    inverse[second] = rsqrtf(whole.y + float(EPSILON)), offset[second] = -whole.x * inverse[second];
  }
  const u32 staged = ring.shared + warp * 16 * PITCH;
  Tile::each([&](int four, int second) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float normed = fmaf(tile.at(four, second, i), inverse[second], offset[second]);
      v[i] = fmaf(normed, gains[4 * four + i], shifts[4 * four + i]);
    }
    const u32 to = staged + (lane / 4 + second * 8) * PITCH + (four * 16 + first) * OUT_BYTES;
    if constexpr (OUT_FP8) {
      store_shared(to, pack_e4m3(v, 1.0f));
    } else {
      store_shared(to, make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])));
    }
  });
  __syncwarp();
  char* const to = out + ((first_row + warp * 16) * long(N) + first_column) * OUT_BYTES;
  constexpr int COUNT = (16 * PIECES + 31) / 32;
  uint4 pieces[COUNT];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int piece = lane + 32 * i;
    pieces[i] = load_shared(staged + piece / PIECES * PITCH + piece % PIECES * 16);
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int piece = lane + 32 * i, at_row = piece / PIECES;
    if (piece < 16 * PIECES && warp * 16 + at_row < valid) {
      *reinterpret_cast<uint4*>(to + (at_row * N * OUT_BYTES + piece % PIECES * 16)) = pieces[i];
    }
  }
}
