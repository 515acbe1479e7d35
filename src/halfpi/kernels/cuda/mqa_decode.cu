// Attention of a few queries whose heads share one head of keys: a cluster has 64 rows, which are
// heads of tokens, and its blocks share out the keys. A block adds up the values of its keys, then
// merges all blocks' sums of some dimensions.
#include "mqa.cuh"

namespace {

constexpr int ROWS = 64, TILE = 128;  // keys at a time
constexpr int GROUPS = 2, THREADS = 128 * GROUPS;
static_assert(PEERS == 4 * GROUPS, "each warp sends to one");
constexpr int QUERY_LINE = ROWS * LINE * 2, TILE_LINE = TILE * LINE * 2;
// A group has PARTS lines of the values. Of each a peer merges 16 dimensions: half of its piece.
constexpr int PARTS = LINES / GROUPS, HALF_PIECE = ROWS * 16 * 2, PIECE = PARTS * HALF_PIECE;
constexpr int QUERIES = 0, KEYS = QUERIES + LINES * QUERY_LINE, VALUES = KEYS + LINES * TILE_LINE;
constexpr int AVERAGES = QUERIES, STAGED = VALUES;  // once those are read
constexpr int WEIGHTS = VALUES + LINES * TILE_LINE;  // (chunk of keys, row, 16 bytes)
constexpr int HIGHEST = WEIGHTS + TILE * ROWS * 2, TOTAL = HIGHEST + GROUPS * ROWS * 4;
constexpr int PART_BYTES = ROWS * 8;  // RowPart of a block's keys
constexpr int ROW_PART = TOTAL + GROUPS * ROWS * 4, ROW_PARTS = ROW_PART + GROUPS * PART_BYTES;
constexpr int KEYS_FULL = ROW_PARTS + PEERS * PART_BYTES, VALUES_FULL = KEYS_FULL + 8 * LINES;
constexpr int AVERAGES_FULL = VALUES_FULL + 8 * LINES;
static_assert(AVERAGES_FULL + 8 <= SHARED_BYTES, "the launcher allocates what the kernel uses");

struct Block : Place {
  int row = 16 * warp + lane / 4;  // of a thread's two the first: the other is 8 on

  using Place::Place;
  // By one thread: of a tile of keys, with the queries if it is the first, or of values.
  __device__ __forceinline__ void copy_keys(const TensorMap& keys, int key,
                                            const TensorMap* queries, int row) const {
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      const u32 full = shared + KEYS_FULL + 8 * line;
      mbarrier_expect(full, TILE_LINE + (queries ? QUERY_LINE : 0));
      if (queries) {
        tensor_copy(shared + QUERIES + line * QUERY_LINE, *queries, line * LINE, row, full);
      }
      tensor_copy(shared + KEYS + line * TILE_LINE, keys, line * LINE, key, full);
    }
  }
  __device__ __forceinline__ void copy_values(const TensorMap& values, int key) const {
#pragma unroll
    for (int i = 0; i < LINES; ++i) {
      const int line = i % GROUPS * PARTS + i / GROUPS;  // first what both groups begin with
      mbarrier_expect(shared + VALUES_FULL + 8 * line, TILE_LINE);
      tensor_copy(shared + VALUES + line * TILE_LINE, values, line * LINE, key,
                  shared + VALUES_FULL + 8 * line);
    }
  }
  // All threads of a group meet.
  __device__ __forceinline__ void together() const { named_barrier(1 + group, 128); }
  // Maxima or sums of both groups: each gives (64,), of which a thread wants two rows.
  __device__ __forceinline__ void give(int statistic, const float (&v)[2]) const {
    float* to = floats(statistic) + group * ROWS + row;
    if (lane % 4 == 0) to[0] = v[0], to[8] = v[1];
  }
  __device__ __forceinline__ float taken(int statistic, int of_group, int second) const {
    return floats(statistic)[of_group * ROWS + row + 8 * second];
  }
};

struct Attention {
  static constexpr int KEYS_EACH = TILE / GROUPS;  // of a group
  float average[PARTS][LINE / 2] = {};             // of line PARTS · group + part
  float highest[2] = {-infinity(), -infinity()}, total[2] = {};

  // Logits of a group's keys.
  __device__ __forceinline__ void multiply(const Block& b, float (&logits)[KEYS_EACH / 2],
                                           u32 parity) const {
#pragma unroll
    for (int i = 0; i < KEYS_EACH / 2; ++i) logits[i] = 0.0f;
    settle(logits);
    wgmma_fence();
#pragma unroll
    for (int line = 0; line < LINES; ++line) {
      const Swizzled queries(b.shared + QUERIES + line * QUERY_LINE);
      const Swizzled keys(b.shared + KEYS + line * TILE_LINE + b.group * KEYS_EACH * LINE * 2);
      b.wait_for(KEYS_FULL + 8 * line, parity);
#pragma unroll
      for (int k = 0; k < LINE; k += 16) Bf16::mma(logits, queries.at(k * 2), keys.at(k * 2));
    }
    wgmma_commit();
    wgmma_wait<0>();
    settle(logits);
  }

  __device__ __forceinline__ void weigh(const Block& b, const float (&logits)[KEYS_EACH / 2]) {
    float base[2], sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float top = fmaxf(b.taken(HIGHEST, 0, i), b.taken(HIGHEST, 1, i));
      base[i] = base_of(top, LOGIT_SCALE);
      shrink(average, total, i, exp2_fast(highest[i] * LOGIT_SCALE - base[i]));
      highest[i] = top;
    }
    const u32 to = b.shared + WEIGHTS + b.group * KEYS_EACH / 8 * 1024;
    store_weights<KEYS_EACH>(logits, LOGIT_SCALE, base, to + b.row * 16 + b.lane % 4 * 4, sum);
    sum[0] = over_quad(sum[0], false), sum[1] = over_quad(sum[1], false);
    b.give(TOTAL, sum);
    fence_async_proxy();
    __syncthreads();
    for (int i = 0; i < 2; ++i) total[i] += b.taken(TOTAL, 0, i) + b.taken(TOTAL, 1, i);
  }

  // The last tile's go to peers, each part while the next is multiplied.
  __device__ __forceinline__ void add_values(const Block& b, u32 parity, bool last) {
    static_assert(PARTS == 2, "one is multiplied while the other is sent");
    const Matrix weights(b.shared + WEIGHTS, 1024, 128);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const int line = PARTS * b.group + part;
      const Swizzled values(b.shared + VALUES + line * TILE_LINE);
      b.wait_for(VALUES_FULL + 8 * line, parity);
      __syncwarp();
      settle(average[part]);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < TILE; k += 16) {
        Bf16::mma_transposed(average[part], weights.at(k / 8 * 1024), values.at(k * LINE * 2));
      }
      wgmma_commit();
    }
    wgmma_wait<1>();
    settle(average[0]);
    if (last) {
      cluster_wait();
      send<0>(b);
    }
    wgmma_wait<0>();
    settle(average[1]);
    if (last) send<1>(b);
  }

  // As (chunk, row, 16 bytes) of each of four peers, and once RowPart.
  template <int PART>
  __device__ __forceinline__ void send(const Block& b) const {
    const u32 staged = b.shared + STAGED + PARTS * b.group * TILE_LINE + PART * 4 * HALF_PIECE;
    if (PART == 0) b.together();  // values of this part are read
    const u32 to = staged + b.lane % 4 * 4;
    store_sums<ROWS>(average[PART], b.row, [&](int i) { return to + i * HALF_PIECE; });
    RowPart* of_row = reinterpret_cast<RowPart*>(b.memory + ROW_PART + b.group * PART_BYTES) + b.row;
    if (PART == 0) store_row_parts(of_row, b.lane, highest, LOGIT_SCALE, total);
    fence_async_proxy();
    b.together();
    if (!elected()) return;
    const u32 peer = 4 * b.group + b.warp, full = in_block(b.shared + AVERAGES_FULL, peer);
    bulk_push(in_block(b.shared + AVERAGES + b.rank * PIECE + PART * HALF_PIECE, peer),
              staged + b.warp * HALF_PIECE, HALF_PIECE, full);
    if (PART) return;
    bulk_push(in_block(b.shared + ROW_PARTS + b.rank * PART_BYTES, peer),
              b.shared + ROW_PART + b.group * PART_BYTES, PART_BYTES, full);
  }
};

// This block's share of the dimensions of `rows` rows.
__device__ __forceinline__ void merge(const Block& b, char* out, int rows, float scale) {
  const int row = b.thread % ROWS, chunk = b.thread / ROWS;  // eight dimensions
  static_assert(THREADS * 16 == PIECE, "each thread has one chunk");
  if (row >= rows) return;
  float sum[8];
  merge_parts<PEERS>(reinterpret_cast<const RowPart*>(b.memory + ROW_PARTS) + row, ROWS,
                     b.shared + AVERAGES + (chunk * ROWS + row) * 16, PIECE, sum);
  const int line = PARTS * (b.rank / 4) + chunk / 2;
  const int column = line * LINE + b.rank % 4 * 16 + chunk % 2 * 8;
  store_eight<FP8>(out + (long(row) * HEAD + column) * BYTES, 0, sum, scale);
}

}  // namespace

// Grid: (PEERS, tiles of rows, sequences). Of a sequence there are `capacity` keys and `rows` rows,
// `heads` of them a token; counts say how many keys and tokens are valid.
extern "C" __global__ void __cluster_dims__(PEERS, 1, 1) __launch_bounds__(THREADS, 1)
    mqa_decode(const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
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
  if (b.thread == 0) {
    prefetch_map(queries), prefetch_map(keys), prefetch_map(values);
    for (int i = KEYS_FULL; i <= AVERAGES_FULL; i += 8) mbarrier_init(b.shared + i, 1);
    mbarriers_ready();
  }
  cluster_barrier();
  wait_for_kernel_before();
  if (valid_rows <= 0) return;

  const Share<TILE> share(b.rank, key_total);
  const int key = sequence * capacity + share.first;
  const bool copies = b.group == 0 && b.warp == 0;
  if (copies && elected()) {
    b.copy_keys(keys, key, &queries, sequence * rows + first_row);
    b.copy_values(values, key);
    mbarrier_expect(b.shared + AVERAGES_FULL, PEERS * (PIECE + PART_BYTES));
  }
  Attention attention;
#pragma unroll 1
  for (int tile = 0;; ++tile) {
    const bool last = tile == share.tiles - 1;
    float logits[Attention::KEYS_EACH / 2], top[2] = {attention.highest[0], attention.highest[1]};
    attention.multiply(b, logits, tile & 1);
    find_top<Attention::KEYS_EACH>(
        logits, b.lane, share.count - tile * TILE - b.group * Attention::KEYS_EACH, top);
    top[0] = over_quad(top[0], true), top[1] = over_quad(top[1], true);
    b.give(HIGHEST, top);
    __syncthreads();  // keys are read
    if (last) {
      cluster_arrive_relaxed();  // and queries, so that averages may come
    } else if (copies && elected()) {
      b.copy_keys(keys, key + (tile + 1) * TILE, nullptr, 0);
    }
    attention.weigh(b, logits);
    attention.add_values(b, tile & 1, last);
    if (last) break;
    __syncthreads();  // values and weights are read
    if (copies && elected()) b.copy_values(values, key + (tile + 1) * TILE);
  }
  b.wait_for(AVERAGES_FULL, 0);
  __syncwarp();
  cluster_arrive_relaxed();  // peers need not stay to give more
  const long row = sequence * rows + first_row;
  merge(b, out + row * HEAD * BYTES, valid_rows, inverse_scale);
  cluster_wait();
}
