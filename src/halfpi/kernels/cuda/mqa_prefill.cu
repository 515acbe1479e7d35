// Attention of many queries whose heads share one head of keys: a pair of blocks has 128 rows, which
// are heads of tokens, and each takes half of the keys, so that a multiprocessor reads half of them.
// Then each merges half of the dimensions of all rows.
#include "mqa.cuh"

namespace {

constexpr int GROUPS = 2, ROWS = 64 * GROUPS, TILE = 64;  // keys at a time
constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;  // a warp of the last copies
constexpr int PEERS = 2;
constexpr int QUERY_LINE = ROWS * LINE * 2, TILE_LINE = TILE * LINE * 2;
constexpr int UNIT = LINES * TILE_LINE, SLOTS = 5;  // a ring of keys and values in turn
constexpr int QUERIES = 0, RING = QUERIES + LINES * QUERY_LINE;
constexpr int PART = RING + SLOTS * UNIT, PEERS_PART = PART + ROWS * 8;  // RowPart
constexpr int FULL = PEERS_PART + ROWS * 8, EMPTY = FULL + 8 * SLOTS;
constexpr int QUERIES_FULL = EMPTY + 8 * SLOTS, AVERAGES_FULL = QUERIES_FULL + 8 * LINES;
static_assert(AVERAGES_FULL + 8 <= SHARED_BYTES, "the launcher allocates what the kernel uses");
// Sums of a warp's sixteen rows lie where queries of its group were, in one of the lines: those for the
// other block, and those from there.
constexpr int HALF = HEAD / PEERS, HALF_BYTES = 16 * HALF * 2, PART_BYTES = 16 * 8;
static_assert(2 * HALF_BYTES * 4 * GROUPS == LINES * QUERY_LINE, "all of it");

using Cursor = RingCursor<SLOTS>;

struct Block : Place {
  using Place::Place;

  __device__ __forceinline__ u32 unit(const Cursor& at) const {
    return shared + RING + at.slot * UNIT;
  }
  __device__ __forceinline__ u32 given() const {  // by this warp
    return shared + QUERIES + warp * QUERY_LINE + group * (QUERY_LINE / GROUPS);
  }
  __device__ __forceinline__ u32 taken() const { return given() + HALF_BYTES; }
  __device__ __forceinline__ int row() const { return 64 * group + 16 * warp; }  // of this warp
};

// By a warp: all tiles of keys and values, and first the queries.
__device__ __forceinline__ void copy_all(const Block& b, const TensorMap& queries,
                                         const TensorMap& keys, const TensorMap& values, int row,
                                         int key, int tiles) {
  Cursor at{0, 1};
  auto fill = [&](const TensorMap& map, int first) {
    b.wait_for(EMPTY + 8 * at.slot, at.parity);
    const u32 full = b.shared + FULL + 8 * at.slot;
    if (elected()) {
      mbarrier_expect(full, UNIT);
#pragma unroll
      for (int i = 0; i < LINES; ++i) {
        tensor_copy(b.unit(at) + i * TILE_LINE, map, i * LINE, first, full);
      }
    }
    __syncwarp();
    at.advance();
  };
  for (int tile = 0; tile < tiles; ++tile) {
    fill(keys, key + tile * TILE);
    if (tile == 0 && elected()) {
#pragma unroll
      for (int i = 0; i < LINES; ++i) {
        const u32 full = b.shared + QUERIES_FULL + 8 * i;
        mbarrier_expect(full, QUERY_LINE);
        tensor_copy(b.shared + QUERIES + i * QUERY_LINE, queries, i * LINE, row, full);
      }
    }
    __syncwarp();
    fill(values, key + tile * TILE);
  }
}

// Of 64 rows. A thread has two, the second eight further on.
struct Attention {
  float average[HEAD / 2] = {}, logits[TILE / 2];
  float highest[2] = {-infinity(), -infinity()}, total[2] = {};
  u32 weights[TILE / 4];

  // Starts, and leaves waiting to the caller.
  __device__ __forceinline__ void multiply(const Block& b, const Cursor& at, bool first) {
#pragma unroll
    for (int i = 0; i < TILE / 2; ++i) logits[i] = 0.0f;
    b.wait_for(FULL + 8 * at.slot, at.parity);
    __syncwarp();
    settle(logits);
    wgmma_fence();
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      if (first) b.wait_for(QUERIES_FULL + 8 * line, 0);
      const int at_query = QUERIES + line * QUERY_LINE + b.group * (QUERY_LINE / GROUPS);
      const Swizzled queries(b.shared + at_query);
      const Swizzled keys(b.unit(at) + line * TILE_LINE);
#pragma unroll
      for (int k = 0; k < LINE; k += 16) Bf16::mma(logits, queries.at(k * 2), keys.at(k * 2));
    }
    wgmma_commit();
  }

  // Logits, of which `valid` keys count, become weights.
  __device__ __forceinline__ void weigh(const Block& b, int valid) {
    settle(logits);
    float top[2] = {highest[0], highest[1]}, base[2], shrink[2];
    find_top<TILE>(logits, b.lane, valid, top);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = over_quad(top[i], true);
      base[i] = base_of(top[i], LOGIT_SCALE);
      shrink[i] = exp2_fast(highest[i] * LOGIT_SCALE - base[i]);
      highest[i] = top[i];
      total[i] *= shrink[i];
    }
    make_weights<TILE / 2>(logits, LOGIT_SCALE, base, weights, total);
#pragma unroll
    for (int i = 0; i < HEAD / 2; ++i) average[i] *= shrink[i / 2 % 2];
  }

  __device__ __forceinline__ void add_values(const Block& b, const Cursor& at) {
    b.wait_for(FULL + 8 * at.slot, at.parity);
    __syncwarp();
    const Swizzled values(b.unit(at), TILE_LINE);
    settle(average);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE; k += 16) {
      Bf16::mma_transposed(average, weights + k / 4, values.at(k * LINE * 2));
    }
    wgmma_commit();
  }
  // Waits for what add_values started, but for LATER products.
  template <int LATER>
  __device__ __forceinline__ void added() {
    wgmma_wait<LATER>();
    settle(average);
    keep(weights);
  }

  __device__ __forceinline__ RowPart part(int i) const { return {highest[i] * LOGIT_SCALE, total[i]}; }
  __device__ static __forceinline__ RowPart* part_at(const Block& b, int at) {
    return reinterpret_cast<RowPart*>(b.memory + at) + b.row() + b.lane / 4;
  }

  // The half from FIRST on, to the same warp of the other block, as 16 bytes of each thread in turn.
  template <int FIRST>
  __device__ __forceinline__ void send(const Block& b) const {
    const u32 peer = 1 - b.rank, full = in_block(b.shared + AVERAGES_FULL, peer);
#pragma unroll
    for (int i = 0; i < HALF / 2; i += 8) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* v = average + FIRST / 2 + i + 2 * j;
        words[j] = pack_bf16(v[0], v[1]);
      }
      store_shared(b.given() + (i / 8 * 32 + b.lane) * 16,
                   make_uint4(words[0], words[1], words[2], words[3]));
    }
    if (b.lane % 4 == 0) part_at(b, PART)[0] = part(0), part_at(b, PART)[8] = part(1);
    fence_async_proxy();
    __syncwarp();
    if (!elected()) return;
    bulk_push(in_block(b.taken(), peer), b.given(), HALF_BYTES, full);
    bulk_push(in_block(b.shared + PEERS_PART + b.row() * 8, peer), b.shared + PART + b.row() * 8,
              PART_BYTES, full);
  }

  // The half from FIRST on, with what the other block sent.
  template <int FIRST>
  __device__ __forceinline__ void merge(const Block& b, float scale) {
    float own[2], other[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RowPart mine = part(i), theirs = part_at(b, PEERS_PART)[8 * i];
      const float top = fmaxf(mine.highest, theirs.highest);
      own[i] = exp2_fast(mine.highest - top), other[i] = exp2_fast(theirs.highest - top);
      const float inverse = scale * reciprocal(own[i] * mine.total + other[i] * theirs.total);
      own[i] *= inverse, other[i] *= inverse;
    }
#pragma unroll
    for (int i = 0; i < HALF / 2; i += 8) {
      const uint4 v = load_shared(b.taken() + (i / 8 * 32 + b.lane) * 16);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float* at = average + FIRST / 2 + i + 2 * j;
        at[0] = at[0] * own[j % 2] + low_bf16(words[j]) * other[j % 2];
        at[1] = at[1] * own[j % 2] + high_bf16(words[j]) * other[j % 2];
      }
    }
    __syncwarp();
  }

  // Of the warp's rows `valid`, the half from FIRST on, to where it is in the first row, by way of
  // shared memory: 16 bytes of a row change places.
  template <int FIRST>
  __device__ __forceinline__ void store(const Block& b, char* out, int valid) const {
    constexpr int ROW_BYTES = HALF * BYTES, PIECES = ROW_BYTES / 16;
#pragma unroll
    for (int i = 0; i < HALF / 2; i += 2) {
      const int row = b.lane / 4 + i / 2 % 2 * 8;
      const int byte = (i / 4 * 8 + b.lane % 4 * 2) * BYTES;
      const u32 at = b.taken() + row * ROW_BYTES + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
      const float* v = average + FIRST / 2 + i;
      store_pair<FP8>(at, v[0], v[1]);
    }
    __syncwarp();
#pragma unroll
    for (int i = b.lane; i < 16 * PIECES; i += 32) {
      const int row = i / PIECES, piece = i % PIECES;
      if (row >= valid) continue;
      const uint4 v = load_shared(b.taken() + row * ROW_BYTES + (piece ^ (row % 8)) * 16);
      *reinterpret_cast<uint4*>(out + long(row) * HEAD * BYTES + piece * 16) = v;
    }
  }

  // What is left once all queries are read: this block keeps the half from OWN on.
  template <int OWN>
  __device__ __forceinline__ void finish(const Block& b, float scale, char* out, int valid) {
    send<HALF - OWN>(b);
    b.wait_for(AVERAGES_FULL, 0);
    __syncwarp();
    cluster_arrive_relaxed();  // the other block need not stay to give more
    merge<OWN>(b, scale);
    store<OWN>(b, out + OWN * BYTES, valid);
  }
};

__device__ __forceinline__ void release(const Block& b, const Cursor& at) {
  if (b.lane == 0) mbarrier_arrive(b.shared + EMPTY + 8 * at.slot, 1);
}

// All keys of this block. Each product but the first is started while the values of the tile before
// are added.
__device__ __forceinline__ void attend(const Block& b, Attention& attention,
                                       const Share<PEERS, TILE>& share) {
  Cursor keys, values;
  values.advance();
  attention.multiply(b, keys, true);
  wgmma_wait<0>();
  release(b, keys);
#pragma unroll 1
  for (int tile = 0; tile < share.tiles - 1; ++tile) {
    attention.weigh(b, share.count - tile * TILE);
    attention.add_values(b, values);
    keys.advance(), keys.advance();
    attention.multiply(b, keys, false);
    attention.added<1>();
    release(b, values);
    values.advance(), values.advance();
    wgmma_wait<0>();
    release(b, keys);
  }
  cluster_arrive_relaxed();  // queries are read, so averages may come
  attention.weigh(b, share.count - (share.tiles - 1) * TILE);
  attention.add_values(b, values);
  attention.added<0>();
}

}  // namespace

// Grid: (PEERS, tiles of rows, sequences). Of a sequence there are `capacity` keys and `rows` rows,
// `heads` of them a token; counts say how many keys and tokens are valid.
extern "C" __global__ void __cluster_dims__(PEERS, 1, 1) __launch_bounds__(THREADS, 1)
    mqa_prefill(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
                const __grid_constant__ TensorMap values, char* out, const float* scale,
                const int* key_count, const int* query_count, long long capacity, long long rows,
                long long heads) {
  extern __shared__ __align__(1024) char memory[];
  const Block b(memory);
  const int sequence = blockIdx.z, first_row = blockIdx.y * ROWS;

  launch_dependents();
  const int key_total = valid_count(key_count, sequence, capacity);
  const int valid_rows = valid_count(query_count, sequence, rows, heads) - first_row;
  const float inverse_scale = FP8 ? reciprocal(*scale) : 1.0f;
  const Share<PEERS, TILE> share(b.rank, key_total);
  if (threadIdx.x == 0) {
    prefetch_map(queries), prefetch_map(keys), prefetch_map(values);
    for (int i = FULL; i <= AVERAGES_FULL; i += 8) {
      mbarrier_init(b.shared + i, i >= EMPTY && i < QUERIES_FULL ? CONSUMERS / 32 : 1);
    }
    mbarriers_ready();
    mbarrier_expect(b.shared + AVERAGES_FULL, CONSUMERS / 32 * (HALF_BYTES + PART_BYTES));
  }
  cluster_barrier();
  wait_for_kernel_before();
  if (valid_rows <= 0) return;

  const long row = sequence * rows + first_row;
  if (b.group == GROUPS) {
    fewer_registers<40>();
    const int key = sequence * capacity + share.first;
    if (b.warp == 0) copy_all(b, queries, keys, values, row, key, share.tiles);
    cluster_arrive_relaxed();
    cluster_wait();
    cluster_arrive_relaxed();
  } else {
    more_registers<232>();
    Attention attention;
    attend(b, attention, share);
    attention.total[0] = over_quad(attention.total[0], false);
    attention.total[1] = over_quad(attention.total[1], false);
    cluster_wait();
    char* to = out + (row + b.row()) * HEAD * BYTES;
    if (b.rank) {
      attention.finish<HALF>(b, inverse_scale, to, valid_rows - b.row());
    } else {
      attention.finish<0>(b, inverse_scale, to, valid_rows - b.row());
    }
  }
  cluster_wait();
}
