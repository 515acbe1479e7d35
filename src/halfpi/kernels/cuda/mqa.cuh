// What both kernels of multi-query attention agree on. A cluster has PEERS blocks.
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

// A thread of a block of a cluster.
struct Place {
  char* memory;
  u32 shared, rank;
  int thread, group, warp, lane;  // warp of the group

  __device__ __forceinline__ explicit Place(char* memory)
      : memory(memory), shared(shared_address(memory)), rank(cluster_rank()),
        thread(threadIdx.x), group(uniform(thread / 128)), warp(uniform(thread / 32 % 4)),
        lane(thread % 32) {}
  __device__ __forceinline__ float* floats(int at) const {
    return reinterpret_cast<float*>(memory + at);
  }
  __device__ __forceinline__ void wait_for(int barrier, u32 parity) const {
    wait(shared + barrier, parity);
  }
};

// Which of `total` keys a block has, all shared out evenly, and their tiles, which are at least one.
template <int TILE>
struct Share {
  int first, count, tiles;

  __device__ __forceinline__ Share(u32 rank, int total)
      : first(rank * total / PEERS), count((rank + 1) * total / PEERS - first),
        tiles(count > TILE ? (count + TILE - 1) / TILE : 1) {}
};

}  // namespace
