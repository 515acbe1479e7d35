// The instructions of sm_90a that the kernels use, one small function each; products are in wgmma.cuh.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

namespace hopper {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers and the bulk copy engine

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// After the last one, by the same thread; all that use them must meet afterwards.
__device__ __forceinline__ void mbarriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u32 barrier, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}

__device__ __forceinline__ void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// At a barrier of any block of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ bool mbarrier_passed(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed;
}

// Of whatever should come soon: with WATCHDOG the kernel ends in an error when it does not.
struct Watchdog {
#ifdef WATCHDOG
  long long start = clock64();
  __device__ void check() {
    if (clock64() - start > 2000000000ll) __trap();
  }
#else
  __device__ void check() {}
#endif
};

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  Watchdog watchdog;
  while (!mbarrier_passed(barrier, parity)) watchdog.check();
}
// By a whole warp. The compiler sees that its threads go on as one, as it must for products whose operands
// are in registers.
__device__ __forceinline__ void wait_together(u32 barrier, u32 parity) {
  Watchdog watchdog;
  while (!__all_sync(~0u, mbarrier_passed(barrier, parity))) watchdog.check();
}

// A place in a ring, and of its barriers the phase to wait for. The first turn of who fills the ring
// does not wait: that begins with the parity of the turn before.
template <int SLOTS>
struct RingCursor {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  // Of the next turn of any slot.
  __device__ __forceinline__ u32 parity_of(int which) const { return parity ^ (which < slot); }
  __device__ __forceinline__ void advance(int units) {  // at most SLOTS
    slot += units;
    if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
  }
  // Any number, but not once a unit: it would take longer.
  __device__ __forceinline__ void skip(int units) {
    for (; units > SLOTS; units -= SLOTS) parity ^= 1;
    advance(units);
  }
};

// Whether it has passed at once, where mbarrier_passed may keep the thread for a while.
__device__ __forceinline__ bool mbarrier_passed_already(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed;
}

__device__ __forceinline__ u64 policy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// A tile of a tensor that the host has described.
struct alignas(64) TensorMap {
  char bytes[128];
};
__device__ __forceinline__ void tensor_copy(u32 to, const TensorMap& map, int column, int row,
                                            u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// The same of three dimensions.
__device__ __forceinline__ void tensor_copy(u32 to, const TensorMap& map, int column, int row, int plane,
                                            u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
      : "memory");
}
// To the same place in each of the BLOCKS blocks of the cluster, whose barriers count the bytes.
template <int BLOCKS>
__device__ __forceinline__ void tensor_copy_to_all(u32 to, const TensorMap& map, int column, int row,
                                                   u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<short>((1 << BLOCKS) - 1))
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// To the L2 only.
__device__ __forceinline__ void bulk_prefetch(const char* from, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_prefetch(const char* from, u32 bytes, u64 policy) {
  asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}

// This block's share of what the next products read.
__device__ __forceinline__ void prefetch_share(const char* all, int bytes) {
  constexpr int PIECE = 4096;
  for (int at = blockIdx.x * PIECE; at < bytes; at += gridDim.x * PIECE) {
    bulk_prefetch(all + at, bytes - at < PIECE ? bytes - at : PIECE);
  }
}

// ---- dependent launches

// The next kernel may start, which then waits for this one.
__device__ __forceinline__ void launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void wait_for_kernel_before() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---- clusters

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  cluster_wait();
}
// Of a barrier for which nothing that was written must be visible: that would take long.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// What a shared address of this block is called in block `rank` of the cluster.
__device__ __forceinline__ u32 in_block(u32 address, u32 rank) {
  u32 mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Shared memory of this block to another one's, whose barrier counts the bytes.
__device__ __forceinline__ void bulk_push(u32 to, u32 from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(to), "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// Two numbers to another block's shared memory, whose barrier counts the bytes.
__device__ __forceinline__ void push(u32 to, float2 v, u32 barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
      "f"(v.x), "f"(v.y), "r"(barrier)
      : "memory");
}

// ---- other memory operations

__device__ __forceinline__ void store_shared(u32 to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, uint2 v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, u32 v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_shared(u32 to, unsigned short v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(v) : "memory");
}

__device__ __forceinline__ uint4 load_shared(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ u32 load_shared_word(u32 from) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}

// Makes ordinary writes to shared memory visible to wgmma; a barrier must follow.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders what this thread knows to be written to global memory before copies that it starts.
__device__ __forceinline__ void fence_copies() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same without waiting for the others.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Eight bytes in L2, where other blocks see them; they are stored and loaded as a whole.
struct Word {
  u32 low, high;

  __device__ __forceinline__ u64 whole() const { return static_cast<u64>(high) << 32 | low; }
  __device__ static __forceinline__ Word of(u64 v) {
    return {static_cast<u32>(v), static_cast<u32>(v >> 32)};
  }
};

__device__ __forceinline__ void store_relaxed(void* to, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed(void* to, Word v) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(v.whole()) : "memory");
}

// Behind all that this thread knows to be written.
__device__ __forceinline__ void store_release(void* to, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

// Ahead of all that this thread loads afterwards.
__device__ __forceinline__ u32 load_acquire(const void* from) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

__device__ __forceinline__ Word load_word(const void* from) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return Word::of(v);
}

// Two that are neighbours, each as a whole.
__device__ __forceinline__ void load_words(Word (&words)[2], const void* from) {
  u64 first, second;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(first), "=l"(second)
               : "l"(from)
               : "memory");
  words[0] = Word::of(first), words[1] = Word::of(second);
}

// Again, into the same registers, unless `loaded`. The compiler would load into others, and wait for
// each before the next.
__device__ __forceinline__ void load_word_unless(bool loaded, u64& word, const void* from) {
  asm volatile(
      "{\n.reg .pred missing;\n"
      "setp.eq.u32 missing, %2, 0;\n"
      "@missing ld.relaxed.gpu.global.b64 %0, [%1];\n}"
      : "+l"(word)
      : "l"(from), "r"(static_cast<u32>(loaded))
      : "memory");
}

// A constant, loaded here and not where it is used.
__device__ __forceinline__ float load_early(const float* from) {
  float v;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(from));
  return v;
}

__device__ __forceinline__ void pause(u32 clocks) {
  const u32 begin = clock();
  while (clock() - begin < clocks) {}
}

// About as long, off the multiprocessor's schedule.
template <int NANOSECONDS>
__device__ __forceinline__ void nap() {
  asm volatile("nanosleep.u32 %0;" ::"n"(NANOSECONDS));
}

// Registers that a thread of this warpgroup may have from here on, out of what the launch was given.
template <int COUNT>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// One thread of a warp whose threads do the same, so that all that it needs is in the registers
// of the warp.
__device__ __forceinline__ bool elected() {
  u32 chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(chosen));
  return chosen;
}

// The same for all threads of a warp, which the compiler then knows.
__device__ __forceinline__ int uniform(int v) { return __shfl_sync(~0u, v, 0); }

__device__ __forceinline__ float sum_over_warp(float v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}

// How many of `capacity` are valid: those that `count` says at `index`, `each` of what it counts, or all
// without it.
__device__ __forceinline__ int valid_count(const int* count, int index, long long capacity,
                                           int each = 1) {
  return count && count[index] * each < capacity ? count[index] * each : int(capacity);
}

// ---- number formats; the first argument ends up at the lower address

__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
  return word;
}

// Of eight rows of eight numbers of 16 bits, of which thread 4 r + c of a warp has two of row r: it gets
// two of column r.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 word;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(word) : "r"(pair));
  return word;
}

__device__ __forceinline__ float low_bf16(u32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(u32 word) {
  return __uint_as_float(word & 0xFFFF0000u);
}

// Of four numbers times `factor`.
__device__ __forceinline__ u32 pack_e4m3(const float* v, float factor) {
  u32 word;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(v[0] * factor), "f"(v[1] * factor), "f"(v[2] * factor), "f"(v[3] * factor));
  return word;
}

__device__ __forceinline__ unsigned short pack_e4m3(float a, float b) {
  unsigned short word;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(word) : "f"(b), "f"(a));
  return word;
}

// Of eight.
__device__ __forceinline__ uint4 eight_bf16(const float (&v)[8]) {
  return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                    pack_bf16(v[6], v[7]));
}
__device__ __forceinline__ uint2 eight_e4m3(const float (&v)[8], float factor) {
  return make_uint2(pack_e4m3(&v[0], factor), pack_e4m3(&v[4], factor));
}

// Two neighbours as an output.
template <bool E4M3>
__device__ __forceinline__ auto pack_pair(float even, float odd) {
  if constexpr (E4M3) {
    return pack_e4m3(even, odd);
  } else {
    return pack_bf16(even, odd);
  }
}
template <bool E4M3>
__device__ __forceinline__ void store_pair(u32 to, float even, float odd) {
  store_shared(to, pack_pair<E4M3>(even, odd));
}

// A chunk of eight of a row of outputs; E4M3 has it times `factor`.
template <bool E4M3>
__device__ __forceinline__ void store_eight(char* row, int chunk, const float (&v)[8],
                                            float factor) {
  if constexpr (E4M3) {
    reinterpret_cast<uint2*>(row)[chunk] = eight_e4m3(v, factor);
  } else {
    reinterpret_cast<uint4*>(row)[chunk] = eight_bf16(v);
  }
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float GELU_LINEAR = 0.7978845608f, GELU_CUBIC = 0.0356774081f;  // √(2/π), and times 0.044715

// GELU(x) · y, where `half` is ½xy: half · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
__device__ __forceinline__ float gelu_product(float x, float half) {
  return fmaf(half, tanh_fast(x * fmaf(GELU_CUBIC * x, x, GELU_LINEAR)), half);
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 v;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
// GELU(x) · y of both, f16 as E4M3, beside whose error half precision's is small. GELU comes first: the
// product may be beyond f16, and then it is E4M3's largest number.
__device__ __forceinline__ unsigned short gelu_e4m3(u32 x, u32 y) {
  unsigned short v;
  asm("{.reg .b32 t, half;\n"
      "mul.rn.f16x2 t, %1, %1;\n"
      "fma.rn.f16x2 t, t, %2, %3;\n"
      "mul.rn.f16x2 t, t, %1;\n"
      "tanh.approx.f16x2 t, t;\n"
      "mul.rn.f16x2 half, %1, %4;\n"
      "fma.rn.f16x2 t, half, t, half;\n"
      "mul.rn.f16x2 t, t, %5;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 %0, t;}"
      : "=h"(v)
      : "r"(x), "r"(pack_f16(GELU_CUBIC, GELU_CUBIC)), "r"(pack_f16(GELU_LINEAR, GELU_LINEAR)),
        "r"(pack_f16(0.5f, 0.5f)), "r"(y));
  return v;
}

template <bool B, typename T, typename F>
struct conditional { using type = T; };
template <typename T, typename F>
struct conditional<false, T, F> { using type = F; };

}  // namespace hopper
