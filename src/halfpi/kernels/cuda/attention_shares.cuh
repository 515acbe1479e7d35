// What attention of few and of many rows have in common: keys and values of the actions, and what goes to
// peers.
#pragma once
#include "product.cuh"
#include "softmax.cuh"

namespace {

constexpr int PARTS = KEY_UNITS / GROUPS;  // of a group's dimensions, each a unit of values
constexpr int PART_BYTES = AVERAGE_PIECE / PARTS;

// Of all rows with the keys of actions: a thread has two neighbours of b.row and of the row eight further on.
__device__ __forceinline__ void recent_logits(float (&logits)[4], const Block& b) {
  const Matrix queries(b.shared + QUERIES, ROWS * 16, 128);
  const Matrix keys(b.shared + RECENT_KEYS, RECENT_SLOTS * 16, 0);
  settle(logits);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < HEAD / 8; k += 2) {
    Bf16::mma(logits, queries.at(k * ROWS * 16), keys.at(k * RECENT_SLOTS * 16));
  }
  wgmma_commit();
  wgmma_wait<0>();
  settle(logits);
}

// Of 16 keys: both halves are the same eight, the second with weights of 0.
__device__ __forceinline__ u64 recent_values(const Block& b, int part) {
  const int chunk = 8 * (PARTS * b.group + part);
  return Matrix(b.shared + RECENT_VALUES + chunk * RECENT_SLOTS * 16, 0, RECENT_SLOTS * 16).at(0);
}

// Values of a tile, each group those of its dimensions. multiply(average, k, values): of 16 keys, those of
// actions behind a tile's. meanwhile: during the first products. send(part): of the last tile, each as soon
// as it is there.
template <int SUMS, typename Multiply, typename Meanwhile, typename Send>
__device__ __forceinline__ void add_values(Block& b, float (&average)[PARTS][SUMS], bool last,
                                           Multiply multiply, Meanwhile meanwhile, Send send) {
  const Matrix values(b.shared + RING, 128, KEY_TILE * 16);
  Cursor unit = b.ring;
  unit.advance(PARTS * b.group);
#pragma unroll
  for (int part = 0; part < PARTS; ++part, unit.advance(1)) {
    b.wait_full(unit);
    __syncwarp();
    settle(average[part]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEY_TILE / 8; k += 2) {
      multiply(average[part], k, values.at(unit.slot * UNIT + k * 128));
    }
    multiply(average[part], KEY_TILE / 8, recent_values(b, part));
    wgmma_commit();
    if (part == 0) meanwhile();
    wgmma_wait<0>();
    settle(average[part]);
    b.release(unit.slot, GROUPS);
    if (last) send(part);
  }
  b.ring.advance(KEY_UNITS);
}

// Where this block stores the sums of which `peer` merges sixteen dimensions: staged for it, or, of those that
// it merges itself, where they are merged. What it would stage for itself lies where its own queries were,
// and peers, which copy those, do not tell when they have them.
__device__ __forceinline__ u32 sums_for(const Block& b, int peer) {
  return b.shared + (peer == b.rank ? AVERAGES : STAGED) + peer * AVERAGE_PIECE;
}

// By one thread, once the sums of a part are stored: to `peer`, and once RowPart of all rows.
__device__ __forceinline__ void push_sums(const Block& b, int peer, int part, u32 rows) {
  const u32 full = b.shared + AVERAGES_FULL, of_peer = in_block(full, peer);
  if (peer != b.rank) {
    const u32 to = b.shared + AVERAGES + b.rank * AVERAGE_PIECE + part * PART_BYTES;
    bulk_push(in_block(to, peer), sums_for(b, peer) + part * PART_BYTES, PART_BYTES, of_peer);
  } else if (part == PARTS - 1) {
    mbarrier_expect(full, (PEERS - 1) * AVERAGE_PIECE + PEERS * ROW_PART_BYTES);
  }
  if (part) return;
  bulk_push(in_block(b.shared + PARTS_OF_ROWS + b.rank * ROW_PART_BYTES, peer), rows, ROW_PART_BYTES, of_peer);
}

}  // namespace
