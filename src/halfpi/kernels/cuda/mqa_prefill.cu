// Attention of many queries whose heads share one head of keys: a cluster of blocks has 128 rows, which
// are heads of tokens, and each block takes its share of the keys, so that a multiprocessor reads fewer
// of them. Then each merges its share of the dimensions of all rows.
#include "mqa.cuh"

namespace {

constexpr int GROUPS = 2, ROWS = 64 * GROUPS, TILE = 64;  // keys at a time
constexpr int CONSUMERS = 128 * GROUPS, THREADS = CONSUMERS + 128;  // a warp of the last copies
constexpr int WARPS = CONSUMERS / 32;
constexpr int QUERY_LINE = ROWS * LINE * 2, TILE_LINE = TILE * LINE * 2;
constexpr int UNIT = LINES * TILE_LINE, SLOTS = 5;  // a ring of keys and values in turn
constexpr int QUERIES = 0, RING = QUERIES + LINES * QUERY_LINE;
constexpr int PART = RING + SLOTS * UNIT;  // RowPart
constexpr int FULL = PART + ROWS * 8, EMPTY = FULL + 8 * SLOTS;
constexpr int QUERIES_FULL = EMPTY + 8 * SLOTS, AVERAGES_FULL = QUERIES_FULL + 8 * LINES;
static_assert(AVERAGES_FULL + 8 <= SHARED_BYTES, "the launcher allocates what the kernel uses");
// A block merges dimensions in sixteens: each thread sends 16 bytes of them, and E4M3 stores 16 of a row.
constexpr int SIXTEENS = HEAD / 16, WIDEST = (SIXTEENS + PEERS - 1) / PEERS * 16;
__device__ constexpr int first_dimension(int rank) { return rank * SIXTEENS / PEERS * 16; }
// Sums of a warp's sixteen rows go to the same warp of each other block, from a slot of the ring for each.
// There they lie where queries of its group were, in one of the lines, those of each block in its place.
constexpr int GIVEN_BYTES = UNIT / WARPS, MOST_BYTES = 16 * WIDEST * 2, PART_BYTES = 16 * 8;
constexpr int TAKEN_BYTES = MOST_BYTES + PART_BYTES, PLACE_BYTES = QUERY_LINE / GROUPS;
static_assert(MOST_BYTES <= GIVEN_BYTES && (PEERS - 1) * TAKEN_BYTES <= PLACE_BYTES, "they have room");
static_assert(PEERS <= SLOTS, "the last values are in a slot that is not free");

using Cursor = RingCursor<SLOTS>;

struct Block : Place {
  using Place::Place;

  __device__ __forceinline__ u32 unit(const Cursor& at) const {
    return shared + RING + at.slot * UNIT;
  }
  // Of this warp:
  __device__ __forceinline__ int row() const { return 64 * group + 16 * warp; }
  __device__ __forceinline__ u32 given(const Cursor& at) const {
    return unit(at) + (4 * group + warp) * GIVEN_BYTES;
  }
  // Where in memory sums are from the block whose rank is `distance` further on, and then RowPart.
  __device__ __forceinline__ int taken(int distance) const {
    return QUERIES + warp * QUERY_LINE + group * PLACE_BYTES + (distance - 1) * TAKEN_BYTES;
  }
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
    return reinterpret_cast<RowPart*>(b.memory + at) + b.lane / 4;
  }

  // What the block whose rank is DISTANCE further on merges, to the same warp there, as 16 bytes of each
  // thread in turn; then what the next merges. Slots of the ring after `at` are free.
  template <int RANK, int DISTANCE = 1>
  __device__ __forceinline__ void send(const Block& b, Cursor at) const {
    constexpr int PEER = (RANK + DISTANCE) % PEERS, FIRST = first_dimension(PEER);
    constexpr int WIDTH = first_dimension(PEER + 1) - FIRST;
    at.advance();
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 8) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* v = average + FIRST / 2 + i + 2 * j;
        words[j] = pack_bf16(v[0], v[1]);
      }
      store_shared(b.given(at) + (i / 8 * 32 + b.lane) * 16,
                   make_uint4(words[0], words[1], words[2], words[3]));
    }
    fence_async_proxy();
    __syncwarp();
    if (elected()) {
      const u32 to = in_block(b.shared + b.taken(PEERS - DISTANCE), PEER);
      const u32 full = in_block(b.shared + AVERAGES_FULL, PEER);
      bulk_push(to, b.given(at), 16 * WIDTH * 2, full);
      bulk_push(to + MOST_BYTES, b.shared + PART + b.row() * 8, PART_BYTES, full);
    }
    __syncwarp();
    if constexpr (DISTANCE + 1 < PEERS) send<RANK, DISTANCE + 1>(b, at);
  }

  // WIDTH dimensions from FIRST on, with what the other blocks sent.
  template <int FIRST, int WIDTH>
  __device__ __forceinline__ void merge(const Block& b, float scale) {
    float weights[PEERS][2];  // of this block's sums, and of those taken
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      RowPart parts[PEERS] = {part(i)};
      float top = parts[0].highest, sum = 0.0f;
#pragma unroll
      for (int s = 1; s < PEERS; ++s) {
        parts[s] = part_at(b, b.taken(s) + MOST_BYTES)[8 * i];
        top = fmaxf(top, parts[s].highest);
      }
#pragma unroll
      for (int s = 0; s < PEERS; ++s) {
        weights[s][i] = exp2_fast(parts[s].highest - top);
        sum += weights[s][i] * parts[s].total;
      }
      const float inverse = scale * reciprocal(sum);
#pragma unroll
      for (int s = 0; s < PEERS; ++s) weights[s][i] *= inverse;
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 8) {
      float* const sums = average + FIRST / 2 + i;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums[j] *= weights[0][j / 2 % 2];
#pragma unroll
      for (int s = 1; s < PEERS; ++s) {
        const uint4 v = load_shared(b.shared + b.taken(s) + (i / 8 * 32 + b.lane) * 16);
        const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[2 * j] += low_bf16(words[j]) * weights[s][j % 2];
          sums[2 * j + 1] += high_bf16(words[j]) * weights[s][j % 2];
        }
      }
    }
    __syncwarp();
  }

  // Of the warp's rows `valid`, WIDTH dimensions from FIRST on, to where the first row has them, by way
  // of shared memory: rows are an odd number of 16 bytes apart there, so that eight lie in all banks.
  template <int FIRST, int WIDTH>
  __device__ __forceinline__ void store(const Block& b, char* out, int valid) const {
    constexpr int PIECES = WIDTH * BYTES / 16, PITCH = (PIECES | 1) * 16;
    static_assert(16 * PITCH <= PLACE_BYTES, "where the queries were");
    const u32 staged = b.shared + b.taken(1);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; i += 2) {
      const int row = b.lane / 4 + i / 2 % 2 * 8;
      const float* v = average + FIRST / 2 + i;
      store_pair<FP8>(staged + row * PITCH + (i / 4 * 8 + b.lane % 4 * 2) * BYTES, v[0], v[1]);
    }
    __syncwarp();
#pragma unroll
    for (int i = b.lane; i < 16 * PIECES; i += 32) {
      const int row = i / PIECES, piece = i % PIECES;
      if (row >= valid) continue;
      const uint4 v = load_shared(staged + row * PITCH + piece * 16);
      *reinterpret_cast<uint4*>(out + long(row) * HEAD * BYTES + piece * 16) = v;
    }
  }

  // What is left once all blocks have read their queries, and all keys and values but the last values,
  // which are at `last`. RANK, this block's, tells which sums are whose: registers have no addresses.
  template <int RANK = 0>
  __device__ __forceinline__ void finish(const Block& b, const Cursor& last, float scale, char* out,
                                         int valid) {
    if constexpr (RANK + 1 < PEERS) {
      if (b.rank != RANK) return finish<RANK + 1>(b, last, scale, out, valid);
    }
    constexpr int FIRST = first_dimension(RANK), WIDTH = first_dimension(RANK + 1) - FIRST;
    store_row_parts(part_at(b, PART + b.row() * 8), b.lane, highest, LOGIT_SCALE, total);
    send<RANK>(b, last);
    b.wait_for(AVERAGES_FULL, 0);
    __syncwarp();
    cluster_arrive_relaxed();  // other blocks need not stay to give more
    merge<FIRST, WIDTH>(b, scale);
    store<FIRST, WIDTH>(b, out + FIRST * BYTES, valid);
  }
};

__device__ __forceinline__ void release(const Block& b, const Cursor& at) {
  if (b.lane == 0) mbarrier_arrive(b.shared + EMPTY + 8 * at.slot, 1);
}

// All keys of this block. Each product but the first is started while the values of the tile before
// are added. Tells where the last values are.
__device__ __forceinline__ Cursor attend(const Block& b, Attention& attention,
                                         const Share<TILE>& share) {
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
  cluster_arrive_relaxed();  // queries are read, so averages may come, and keys, so they may be staged
  attention.weigh(b, share.count - (share.tiles - 1) * TILE);
  attention.add_values(b, values);
  attention.added<0>();
  return values;
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
  const Share<TILE> share(b.rank, key_total);
  if (threadIdx.x == 0) {
    prefetch_map(queries), prefetch_map(keys), prefetch_map(values);
    for (int i = FULL; i <= AVERAGES_FULL; i += 8) {
      mbarrier_init(b.shared + i, i >= EMPTY && i < QUERIES_FULL ? WARPS : 1);
    }
    mbarriers_ready();
    const int width = first_dimension(b.rank + 1) - first_dimension(b.rank);
    const int bytes = 16 * width * 2 + PART_BYTES;  // of a warp, from each other block
    mbarrier_expect(b.shared + AVERAGES_FULL, (PEERS - 1) * WARPS * bytes);
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
    const Cursor last = attend(b, attention, share);
    attention.total[0] = over_quad(attention.total[0], false);
    attention.total[1] = over_quad(attention.total[1], false);
    cluster_wait();
    char* to = out + (row + b.row()) * HEAD * BYTES;
    attention.finish(b, last, inverse_scale, to, valid_rows - b.row());
  }
  cluster_wait();
}
