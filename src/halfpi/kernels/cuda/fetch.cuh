// The warps that do not compute: one warp streams weights and cached keys and values into the
// ring, another waits for what other blocks write and starts copying it.
#pragma once
#include "block.cuh"

namespace {

// A warp's place in the ring when it fills it.
struct Filler {
  u32 shared;
  int slot = 0;
  u32 parity = 1;  // of the slot before this turn: the first turn does not wait

  template <typename Copy>
  __device__ __forceinline__ void fill(u32 bytes, Copy copy) {
    wait(shared + EMPTY + 8 * slot, parity);
    if (elected()) {
      mbarrier_expect(shared + FULL + 8 * slot, bytes);
      copy(shared + RING + slot * UNIT, shared + FULL + 8 * slot);
    }
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void stream_units(const Arguments& a, const Block& b) {
  const u64 once = policy_evict_first();  // all clusters read the cache, one block its weights
  const int cached = key_tiles(b.prefix) * 2 * KEY_UNITS;
  const char* begin = a.stream + long(b.index) * DEPTH * LAYER_BYTES;
  Filler ring{b.shared};
  auto stream = [&](const char* unit, int units, u32 bytes) {
#pragma unroll 1
    for (int i = 0; i < units; ++i, unit += bytes) {
      ring.fill(bytes, [&](u32 to, u32 full) { bulk_copy(to, unit, bytes, full, once); });
    }
  };
  for (int step = 0; step < STEPS; ++step) {
    const char* weights = begin;
    for (int layer = 0; layer < DEPTH; ++layer, weights += LAYER_BYTES) {
      stream(weights, QKV_UNITS, QKV_UNIT);
      const char* unit = a.cache + (layer * PEERS + b.rank) * long(cached) * UNIT;
#pragma unroll 1
      for (int i = 0; i < cached; ++i, unit += UNIT) {
        ring.fill(UNIT, [&](u32 to, u32 full) { bulk_copy(to, unit, UNIT, full); });
      }
      stream(weights + QKV_BYTES, OUT_UNITS + WIDE_UNITS + DOWN_UNITS, UNIT);
    }
  }
}

// The next X.
__device__ __forceinline__ void fetch_x(const Block& b, int exchange) {
  constexpr int PIECE = ROWS * WIDTH * BYTES / PIECES;
  await(b.counters, ROWS_DONE, (exchange + 1) * ROWS);
  if (!elected()) return;
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    mbarrier_expect(b.shared + X_FULL + 8 * i, PIECE);
    bulk_copy(b.shared + AREA + i * PIECE, b.buffers + X + i * PIECE, PIECE,
              b.shared + X_FULL + 8 * i);
  }
}

// Keys and values of the actions, once all blocks have stored theirs.
__device__ __forceinline__ void fetch_recent(const Block& b, int layer) {
  wait(b.shared + RECENT_STORED, layer & 1);
  if (elected()) arrive(b.counters, RECENT_DONE);
  await(b.counters, RECENT_DONE, (layer + 1) * BLOCKS);
  if (!elected()) return;
  mbarrier_expect(b.shared + RECENT_FULL, RECENT_BYTES);
  bulk_copy(b.shared + RECENT_KEYS, b.buffers + RECENT + b.rank * RECENT_BYTES, RECENT_BYTES,
            b.shared + RECENT_FULL);
}

__device__ __forceinline__ void fetch_activations(const Block& b) {
  for (int layer = 0; layer < STEPS * DEPTH; ++layer) {
    fetch_x(b, 2 * layer);
    fetch_recent(b, layer);
    fetch_x(b, 2 * layer + 1);
  }
}

// Keys and values of the prefix as units of the ring, behind a split's keys zeros. A warp moves four
// chunks of eight keys.
__device__ __forceinline__ void lay_out_cache(const Arguments& a, const Block& b) {
  const int tiles = key_tiles(b.prefix), warps = BLOCKS * CONSUMERS / 32;
  const int pieces = DEPTH * PEERS * tiles * 2 * (HEAD / 8 / 4) * (TILE / 8);
#pragma unroll 4
  for (int i = b.index * (CONSUMERS / 32) + b.thread / 32; i < pieces; i += warps) {
    int key = i % 16 * 8 + b.lane % 8, chunk = i / 16 % 8 * 4 + b.lane / 8, tile = i / 128;
    const char* from = tile % 2 ? a.values : a.keys;
    const int rank = tile / 2 / tiles % PEERS;
    const Split split(rank, b.prefix);
    long layer = tile / 2 / tiles / PEERS;
    int place = tile / 2 % tiles * TILE + key;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (place < split.keys) {
      long row = layer * a.capacity + split.first + place;
      // Of keys, the dimensions of which the block has queries come first (product.cuh).
      const int first = tile % 2 ? 0 : own_unit(rank, KEY_UNITS) * TILE_CHUNKS;
      v = *reinterpret_cast<const uint4*>(from + row * (HEAD * 2) +
                                          (chunk + first) % (HEAD / 8) * 16);
    }
    *reinterpret_cast<uint4*>(a.cache + tile * (TILE * HEAD * 2l) + (chunk * TILE + key) * 16) = v;
  }
}

}  // namespace
