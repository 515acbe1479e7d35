// A linear layer, x (m, k) · weight (n, k)ᵀ, and what follows it. The blocks of a cluster have rows
// below each other and the same columns, of whose weights each brings its part for all.
#include "epilogue.cuh"
#include "ring.cuh"

namespace {

using namespace hopper;

// Groups that need more registers than an even share have a group beside them that fills the ring.
constexpr bool CROWDED = THREADS > 128 * GROUPS + 32;
constexpr int FILLS = GROUPS > 2 ? 32 : 24, MULTIPLIES = GROUPS > 2 ? 160 : 240;  // registers of a thread
constexpr int ROWS = 64 * GROUPS;
// Of a thread's sums of a tile that is HELD, those from HELD_FROM on are finished in PARTS, while the tensor
// cores have the next tile. Three groups do not have registers for all.
constexpr int HELD_FROM = GROUPS > 2 ? WIDTH / 48 * 8 : 0, HELD_SUMS = WIDTH / 2 - HELD_FROM;
constexpr int PART_SUMS = HELD_SUMS % 16 ? 8 : 16, PARTS = HELD ? HELD_SUMS / PART_SUMS : 1;
static_assert(!HELD || EPILOGUE == GATED, "what else follows a product wants sums that are not rounded");
constexpr int X_BYTES = ROWS * LINE, STAGE = X_BYTES + W_BYTES;
constexpr int PART = WIDTH / PEERS, PART_BYTES = W_BYTES / PEERS;  // columns that a block brings
constexpr int RING = STAGES * STAGE;
// A block with one tile stages it where the ring was.
constexpr int STAGED = ONE_TILE ? 0 : RING, STAGED_END = STAGED + ROWS * PITCH;
constexpr int COLUMN_BIAS = RING > STAGED_END ? RING : STAGED_END;
constexpr int BARRIERS = COLUMN_BIAS + (BIAS ? WIDTH * 4 : 0);
// Where two blocks fit, one multiplies while the other begins or ends.
constexpr int PER_MULTIPROCESSOR = SHARED_BYTES <= 115712 && !CROWDED && WIDTH <= 112 ? 2 : 1;
static_assert(BARRIERS + 16 * STAGES <= SHARED_BYTES, "the launcher allocates what the kernel uses");
static_assert(PART_BYTES % 1024 == 0, "lines are swizzled in groups of eight");

// Where a tile begins in the output, and its steps along K.
struct Tile {
  int row, column, split, first, last;
};

// All tiles, of which a cluster has each `stride`-th.
struct Tiles {
  int rows, columns, steps, steps_of_split, count, begin, stride;

  __device__ __forceinline__ Tiles(int valid, int n, int k, int splits) {
    rows = (valid + PEERS * ROWS - 1) / (PEERS * ROWS);
    columns = (n + WIDTH - 1) / WIDTH;
    steps = (k + STEP - 1) / STEP;
    steps_of_split = (steps + splits - 1) / splits;
    count = rows * columns * splits;
    begin = blockIdx.x / PEERS, stride = gridDim.x / PEERS;
  }
  __device__ __forceinline__ Tile at(int index) const {
    const int split = index / (rows * columns), first = split * steps_of_split;
    const int last = first + steps_of_split;
    return {(index % rows * PEERS + int(blockIdx.x % PEERS)) * ROWS,
            index / rows % columns * WIDTH, split, first, last < steps ? last : steps};
  }
};

struct Ring : OperandRing<X_BYTES, BARRIERS> {
  __device__ __forceinline__ void init() const {
    for (int slot = 0; slot < STAGES; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), PEERS * GROUPS * 4);  // warps
    }
    mbarriers_ready();
  }
  // By a whole warp, whose products have read the slot.
  __device__ __forceinline__ void release(int slot) const {
    const int lane = threadIdx.x % 32;
    if (PEERS == 1) {
      if (lane == 0) mbarrier_arrive(empty(slot), 1);
    } else if (lane < PEERS) {
      mbarrier_arrive_at(in_block(empty(slot), lane));
    }
  }
};

// One thread fills the ring. Weights do not depend on the kernel before.
__device__ __forceinline__ void fill(const Ring& ring, const TensorMap& x, const TensorMap& weight,
                                     const Tiles& tiles, const char* later, int later_bytes) {
  const int rank = PEERS == 1 ? 0 : cluster_rank();
  auto bring_weights = [&](int slot, const Tile& tile, int step) {
    mbarrier_expect(ring.full(slot), STAGE);
    const u32 to = ring.weights(slot) + rank * PART_BYTES;
    const int row = tile.column + rank * PART;
    if (PEERS == 1) {
      tensor_copy(to, weight, step * STEP, row, ring.full(slot));
    } else {
      tensor_copy_to_all<PEERS>(to, weight, step * STEP, row, ring.full(slot));
    }
  };
  const Tile begin = tiles.at(tiles.begin);
  const int steps = begin.last - begin.first, early = steps < STAGES ? steps : STAGES;
  for (int i = 0; i < early; ++i) bring_weights(i, begin, begin.first + i);
  wait_for_kernel_before();

  RingCursor<STAGES> at{0, 1};
  int number = 0;
  for (int index = tiles.begin; index < tiles.count; index += tiles.stride) {
    const Tile tile = tiles.at(index);
    for (int step = tile.first; step < tile.last; ++step, ++number) {
      wait(ring.empty(at.slot), at.parity);
      if (number >= early) bring_weights(at.slot, tile, step);
      tensor_copy(ring.x(at.slot), x, step * STEP, tile.row, ring.full(at.slot));
      if (number + 1 == early) prefetch_share(later, later_bytes);
      at.advance();
    }
  }
}

// Sums of `steps` steps, by a group of 128 threads, which does parts of something else meanwhile.
template <class Part>
__device__ __forceinline__ void multiply(float (&sums)[WIDTH / 2], const Ring& ring,
                                         RingCursor<STAGES>& at, int group, int steps,
                                         const Part& part_of_other) {
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) sums[i] = 0.0f;
  int before = -1, step = 0;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int end = (part + 1) * steps / PARTS;
#pragma unroll 1
    for (; step < end; ++step) {
      ring.begin_products(sums, at, group);
      wgmma_wait<1>();
      if (before >= 0) ring.release(before);
      before = at.slot;
      at.advance();
    }
    part_of_other(part);
  }
  wgmma_wait<0>();
  settle(sums);
  if (before >= 0) ring.release(before);
}

// A warp's sums of a tile, gate and up, packed, until they are finished; of `rows` rows.
struct Held {
  u32 packed[HELD_SUMS / 2];
  long row;
  int column, rows;

  // Those that are not held are finished at once.
  __device__ __forceinline__ void take(const float (&sums)[WIDTH / 2], const Warp& epilogue, float alpha,
                                       float factor) {
#pragma unroll
    for (int i = 0; i < HELD_FROM; i += 8) {
      Finished out[PAIRS];
      epilogue.finish(sums + i, i, Turns{}, alpha, factor, out);
      epilogue.store(out, i);
    }
#pragma unroll
    for (int i = 0; i < HELD_SUMS; i += 8) {
      Warp::pack(sums + HELD_FROM + i, alpha, factor, packed + i / 2);
    }
  }
  __device__ __forceinline__ void finish(int part, const Warp& epilogue, const Outputs& to, float alpha,
                                         float factor) const {
    static_assert(!HELD || HELD_SUMS % 8 == 0, "a part has whole chunks");
#pragma unroll
    for (int i = part * PART_SUMS; i < (part + 1) * PART_SUMS; i += 8) {
      Finished out[PAIRS];
      epilogue.finish_packed(packed + i / 2, alpha, factor, out);
      epilogue.store(out, HELD_FROM + i);
    }
    if (part + 1 == PARTS) {
      __syncwarp();
      epilogue.copy_out(to, row, rows, column);
    }
  }
};

__device__ __forceinline__ float bias_at(const void* bias, int column) {
  return BIAS == 4 ? static_cast<const float*>(bias)[column]
                   : low_bf16(static_cast<const unsigned short*>(bias)[column]);
}

}  // namespace

// out: (m, n), or (splits, m, n) of ranges of K, or the query of EPILOGUE ROTATED. BIAS: the bytes of a
// number of it, which wants ONE_TILE. alpha, scale: one without. valid: the rows that are, all without.
// offset: zero without. capacity: places of the cache. later: weights that the next product reads.
extern "C" __global__ void __cluster_dims__(PEERS, 1, 1)
    __launch_bounds__(THREADS, PER_MULTIPROCESSOR)
    linear(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight, char* out,
           const void* bias, const float* alpha, const float* scale, const int* valid, long long m,
           long long n, long long k, long long splits, const char* later, long long later_bytes,
           const float* cos, const float* sin, char* keys, char* values, const int* offset,
           long long q_width, long long kv_width, long long capacity) {
  extern __shared__ __align__(1024) char memory[];
  const Ring ring{shared_address(memory)};
  const int thread = threadIdx.x, warp = uniform(thread / 32);
  const int rows = valid_count(valid, 0, m), place = offset ? *offset : 0;
  const Tiles tiles(rows, n, k, splits);

  launch_dependents();
  if (thread == 0) {
    prefetch_map(x), prefetch_map(weight);
    ring.init();
  }
  float* columns = reinterpret_cast<float*>(memory + COLUMN_BIAS);
  if (BIAS && tiles.begin < tiles.count) {
    const int first = tiles.at(tiles.begin).column;
    for (int i = thread; i < WIDTH && first + i < n; i += THREADS) {
      columns[i] = bias_at(bias, first + i);
    }
  }
  const float factor = scale ? reciprocal(*scale) : 1.0f, times = alpha ? *alpha : 1.0f;
  __syncthreads();
  if (PEERS > 1) cluster_barrier();

  if (tiles.begin >= tiles.count) {
    // Nothing is left for this cluster.
  } else if (warp >= 4 * GROUPS) {
    if (CROWDED) fewer_registers<FILLS>();
    if (warp == 4 * GROUPS && elected()) fill(ring, x, weight, tiles, later, later_bytes);
  } else {
    if (CROWDED) more_registers<MULTIPLIES>();
    const Warp epilogue{ring.shared + STAGED + warp * 16 * PITCH, thread % 32, columns};
    const int out_n = EPILOGUE == GATED ? n / 2 : n;
    const Outputs to{out, out_n, keys, values, cos, sin, int(q_width), int(kv_width), place,
                     int(capacity)};
    const int most = EPILOGUE == ROTATED && to.places - place < rows ? to.places - place : rows;
    RingCursor<STAGES> at;
    float sums[WIDTH / 2];
    Held held{};
    for (int index = tiles.begin; index < tiles.count; index += tiles.stride) {
      const Tile tile = tiles.at(index);
      if (tile.last <= tile.first) wait_for_kernel_before();  // which may read what is written
      const int steps = tile.last - tile.first, row = tile.row + warp * 16;
      Turns turns;
      if (EARLY_TURNS) turns.load(0, row, tile.column, to);  // one after another takes long
      multiply(sums, ring, at, warp / 4, steps, [&](int part) {
        if (HELD) held.finish(part, epilogue, to, times, factor);
      });
      if (HELD) {
        held.take(sums, epilogue, times, factor);
        held.row = tile.split * m + row, held.column = tile.column, held.rows = most - row;
      } else {
        if (ONE_TILE) named_barrier(1, 128 * GROUPS);
        epilogue.stage(sums, turns, row, tile.column, to, times, factor);
        epilogue.copy_out(to, tile.split * m + row, most - row, tile.column);
      }
    }
    if (HELD) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) held.finish(part, epilogue, to, times, factor);
    }
  }
  if (PEERS > 1) {  // whose barriers and memory others use
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();
  }
}
