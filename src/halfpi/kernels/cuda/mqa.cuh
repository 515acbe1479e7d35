// What both kernels of multi-query attention agree on.
#pragma once
#include "softmax.cuh"
#include "wgmma.cuh"

namespace {

using namespace hopper;

constexpr int HEAD = 256;
constexpr int BYTES = FP8 ? 1 : 2;                    // of an output
constexpr float LOGIT_SCALE = 0.0625f * 1.44269504f;  // 1/√k · log2 e
// Operands come as lines of 64 dimensions: (line, row, 128 bytes).
constexpr int LINE = 64, LINES = HEAD / LINE;

// Which of `total` keys a block has, all shared out evenly, and their tiles, which are at least one.
template <int PEERS, int TILE>
struct Share {
  int first, count, tiles;

  __device__ __forceinline__ Share(u32 rank, int total)
      : first(rank * total / PEERS), count((rank + 1) * total / PEERS - first),
        tiles(count > TILE ? (count + TILE - 1) / TILE : 1) {}
};

}  // namespace
