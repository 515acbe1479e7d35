// Attention of the actions: a cluster has one head and its blocks share out the keys. A block
// adds up the values of its keys for all rows, then merges all sums of some dimensions.
#pragma once
#include "attention_few.cuh"
#include "attention_many.cuh"

namespace {

__device__ __forceinline__ void attend(Block& b) {
  conditional<FEW, AttentionOfFew<FLIPPED_SUMS>, AttentionOfMany>::type attention;
  const int tiles = key_tiles(b.prefix);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile) all_consumers();  // the weights of the tile before are read
    attention.tile(b, tile, tile == tiles - 1);
  }
}

// This block's share of the dimensions, to all peers.
__device__ __forceinline__ void merge(const Block& b, const Scale& scale) {
  constexpr int COLUMNS = HEAD / PEERS;
  static_assert(COLUMNS == 16 * GROUPS, "neighbours in a warp have sixteen columns");
  const int row = b.thread % 128 / 2, column = 16 * b.group + b.thread % 2 * 8;
  b.wait_for(AVERAGES_FULL);
  if (row < ROWS) {
    float sum[8];
    merge_parts<PEERS>(reinterpret_cast<const RowPart*>(b.memory + PARTS_OF_ROWS) + row, ROW_PARTS,
                       b.shared + AVERAGES + (column / 8 * ROWS + row) * 16, AVERAGE_PIECE, sum);
    store_operand(b, MERGED, row, COLUMNS * b.rank + column, sum, scale.inverse());
  }
  b.piece_written();
}

}  // namespace
