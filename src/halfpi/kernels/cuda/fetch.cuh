// The warps that do not compute: one streams weights and cached keys and values into the ring, two
// wait for what other blocks write and copy it.
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

__device__ __forceinline__ void fetch_rows(const Block& b) {
  constexpr int PIECE = X_BYTES / PIECES;
#pragma unroll 1
  for (int exchange = 0; exchange < STEPS * DEPTH * 2; ++exchange) {
    await(b.counters, ROWS_DONE, (exchange + 1) * ROWS);
    if (!elected()) continue;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      mbarrier_expect(b.shared + X_FULL + 8 * i, PIECE);
      bulk_copy(b.shared + AREA + i * PIECE, b.buffers + X + i * PIECE, PIECE,
                b.shared + X_FULL + 8 * i);
    }
  }
}

// What this block wrote of keys and values of the actions is no longer there. By a warp.
__device__ __forceinline__ void blank_recent(const Block& b, int layer) {
  for (int row = b.lane; row < ROWS; row += 32) {
    *reinterpret_cast<uint4*>(b.buffers + place_of_recent(b.index, row, layer)) =
        make_uint4(BLANK, BLANK, BLANK, BLANK);
  }
  __syncwarp();
  if (elected()) __threadfence();
}

// Whether something in the copy of keys and values is.
__device__ __forceinline__ bool some_blank(const Block& b) {
  bool some = false;
#pragma unroll
  for (int i = 0; i < RECENT_BYTES / 512; ++i) {
    const uint4 v = load_shared(b.shared + RECENT_KEYS + i * 512 + b.lane * 16);
    some |= v.x == BLANK || v.y == BLANK || v.z == BLANK || v.w == BLANK;
  }
  return __any_sync(~0u, some);
}

// Keys and values of the actions, once all blocks have stored theirs.
__device__ __forceinline__ void fetch_recent(const Block& b) {
  u32 copies = 0;
#pragma unroll 1
  for (int layer = 0; layer < STEPS * DEPTH; ++layer) {
    wait(b.shared + RECENT_STORED, layer & 1);
    if (elected()) hint(b.counters, RECENT_DONE);
    await(b.counters, RECENT_DONE, (layer + 1) * BLOCKS);
    Watchdog watchdog;
    do {
      if (elected()) {
        mbarrier_expect(b.shared + RECENT_COPIED, RECENT_BYTES);
        bulk_copy(b.shared + RECENT_KEYS,
                  b.buffers + RECENT + layer % 2 * RECENT_BUFFER + b.rank * RECENT_BYTES,
                  RECENT_BYTES, b.shared + RECENT_COPIED);
      }
      wait(b.shared + RECENT_COPIED, copies++ & 1);
      watchdog.check();
    } while (some_blank(b));
    if (elected()) mbarrier_arrive(b.shared + RECENT_FULL, 1);
    blank_recent(b, layer + 1);
  }
}

// Keys and values of the prefix as units of the ring, behind a split's keys zeros. A warp moves four
// chunks of eight keys.
__device__ __forceinline__ void lay_out_cache(const Arguments& a, const Block& b) {
  const int tiles = key_tiles(b.prefix), warps = gridDim.x * CONSUMERS / 32;
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
