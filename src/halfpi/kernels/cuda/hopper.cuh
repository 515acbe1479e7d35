// The instructions of sm_90a that the kernel uses, one small function each.
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

// A place in a ring, and of its barriers the phase to wait for. The first turn of who fills the ring
// does not wait: that begins with the parity of the turn before.
template <int SLOTS>
struct RingCursor {
  int slot = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) slot = 0, parity ^= 1;
  }
  __device__ __forceinline__ void advance(int units) {  // at most SLOTS
    slot += units;
    if (slot >= SLOTS) slot -= SLOTS, parity ^= 1;
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

// Eight bytes in L2, where other blocks see them; they are stored and loaded as a whole.
struct Word {
  u32 low, high;

  __device__ __forceinline__ u64 whole() const { return static_cast<u64>(high) << 32 | low; }
  __device__ static __forceinline__ Word of(u64 v) {
    return {static_cast<u32>(v), static_cast<u32>(v >> 32)};
  }
};
struct Words {
  Word first, second;
};

__device__ __forceinline__ void store_relaxed(void* to, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed(void* to, Word v) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(v.whole()) : "memory");
}

__device__ __forceinline__ void store_relaxed(void* to, Words v) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(v.first.whole()),
               "l"(v.second.whole())
               : "memory");
}

__device__ __forceinline__ Word load_word(const void* from) {
  u64 v;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(v) : "l"(from) : "memory");
  return Word::of(v);
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

// ---- number formats; the first argument ends up at the lower address

__device__ __forceinline__ u32 pack_bf16(float a, float b) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(b), "f"(a));
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
__device__ __forceinline__ void store_pair(u32 to, float even, float odd) {
  if constexpr (E4M3) {
    store_shared(to, pack_e4m3(even, odd));
  } else {
    store_shared(to, pack_bf16(even, odd));
  }
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7F800000); }

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
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

// √(2/π) · (x + 0.044715 x³): GELU is ½x (1 + tanh of it).
__device__ __forceinline__ float gelu_argument(float x) {
  return x * fmaf(0.0356774081f * x, x, 0.7978845608f);
}

// ---- wgmma: D (64 rows, N) in registers += A (64, 32 bytes of K) · B (N, 32 bytes of K)ᵀ

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Sums in registers change only before a fence and are read only after a wait; the compiler, which
// sees no connection between the two, must not move either.
template <int N>
__device__ __forceinline__ void settle(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Operands in registers were read until now.
template <int N>
__device__ __forceinline__ void keep(const u32 (&operands)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" ::"r"(operands[i]));
}

// A matrix in shared memory, in core matrices of 8 rows of 16 bytes, without swizzle. lead: bytes
// from one core matrix to the next along K (along keys for a transposed B), stride: the same along
// the rows.
struct Matrix {
  u32 low, high;  // of the descriptor

  // In a cluster, high bits of an address tell the block.
  __device__ __forceinline__ Matrix(u32 address, u32 lead, u32 stride)
      : low((address & 0x3FFFF) >> 4 | (lead >> 4) << 16), high(stride >> 4) {}
  // Of the part that begins `bytes` further on.
  __device__ __forceinline__ u64 at(u32 bytes) const {
    return static_cast<u64>(high) << 32 | (low + (bytes >> 4));
  }
};

// A matrix of lines of 128 bytes, or of 32, in groups of eight from an address that is a multiple of
// a group's bytes. Of row r of 128 bytes the chunk of 16 bytes that belongs at c lies at c ^ (r % 8).
// lead: bytes to the next line along the rows of a transposed B, if it has several.
template <int LINE>
struct SwizzledLines : Matrix {
  static_assert(LINE == 128 || LINE == 32, "as the descriptor says");
  __device__ __forceinline__ explicit SwizzledLines(u32 address, u32 lead = 16)
      : Matrix(address, lead, 8 * LINE) {
    high |= (LINE == 128 ? 1u : 3u) << 30;
  }
};
using Swizzled = SwizzledLines<128>;

template <bool B, typename T, typename F>
struct conditional { using type = T; };
template <typename T, typename F>
struct conditional<false, T, F> { using type = F; };

#define R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(d, i) R4(d, i), R4(d, i + 4), R4(d, i + 8), R4(d, i + 12)
#define R20(d) R16(d, 0), R4(d, 16)
#define R64(d, i) R16(d, i), R16(d, i + 16), R16(d, i + 32), R16(d, i + 48)
#define D4 "%0,%1,%2,%3"
#define D8 D4 ",%4,%5,%6,%7"
#define D20 D8 ",%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19"
#define D32 D20 ",%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D128                                                                             \
  D32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"                 \
      ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"                 \
      ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"                 \
      ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"                 \
      ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"     \
      ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MMA(shape, registers, a, b, flags) \
  "wgmma.mma_async.sync.aligned." shape " {" registers "}, " a ", " b ", 1, 1, 1" flags ";"

struct Bf16 {
  __device__ static __forceinline__ void mma(float (&d)[4], u64 a, u64 b) {
    asm volatile(MMA("m64n8k16.f32.bf16.bf16", D4, "%4", "%5", ", 0, 0") : R4(d, 0)
                 : "l"(a), "l"(b));
  }
  __device__ static __forceinline__ void mma(float (&d)[20], u64 a, u64 b) {
    asm volatile(MMA("m64n40k16.f32.bf16.bf16", D20, "%20", "%21", ", 0, 0") : R20(d)
                 : "l"(a), "l"(b));
  }
  __device__ static __forceinline__ void mma(float (&d)[32], u64 a, u64 b) {
    asm volatile(MMA("m64n64k16.f32.bf16.bf16", D32, "%32", "%33", ", 0, 0")
                 : R16(d, 0), R16(d, 16)
                 : "l"(a), "l"(b));
  }
  __device__ static __forceinline__ void mma(float (&d)[128], u64 a, u64 b) {
    asm volatile(MMA("m64n256k16.f32.bf16.bf16", D128, "%128", "%129", ", 0, 0")
                 : R64(d, 0), R64(d, 64)
                 : "l"(a), "l"(b));
  }
  // B (16, N) instead, rows of B contiguous.
  __device__ static __forceinline__ void mma_transposed(float (&d)[32], u64 a, u64 b) {
    asm volatile(MMA("m64n64k16.f32.bf16.bf16", D32, "%32", "%33", ", 0, 1")
                 : R16(d, 0), R16(d, 16)
                 : "l"(a), "l"(b));
  }
  // The same with A in registers, as a product leaves it there.
  __device__ static __forceinline__ void mma_transposed(float (&d)[32], const u32* a, u64 b) {
    asm volatile(MMA("m64n64k16.f32.bf16.bf16", D32, "{%32,%33,%34,%35}", "%36", ", 1")
                 : R16(d, 0), R16(d, 16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
  __device__ static __forceinline__ void mma_transposed(float (&d)[128], const u32* a, u64 b) {
    asm volatile(MMA("m64n256k16.f32.bf16.bf16", D128, "{%128,%129,%130,%131}", "%132", ", 1")
                 : R64(d, 0), R64(d, 64)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
  __device__ static __forceinline__ void mma_transposed(float (&d)[8], const u32* a, u64 b) {
    asm volatile(MMA("m64n16k16.f32.bf16.bf16", D8, "{%8,%9,%10,%11}", "%12", ", 1")
                 : R4(d, 0), R4(d, 4)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct E4m3 {
  __device__ static __forceinline__ void mma(float (&d)[20], u64 a, u64 b) {
    asm volatile(MMA("m64n40k32.f32.e4m3.e4m3", D20, "%20", "%21", "") : R20(d)
                 : "l"(a), "l"(b));
  }
  __device__ static __forceinline__ void mma(float (&d)[32], u64 a, u64 b) {
    asm volatile(MMA("m64n64k32.f32.e4m3.e4m3", D32, "%32", "%33", "")
                 : R16(d, 0), R16(d, 16)
                 : "l"(a), "l"(b));
  }
};

#undef R4
#undef R16
#undef R20
#undef R64
#undef D4
#undef D8
#undef D20
#undef D32
#undef D128
#undef MMA

}  // namespace hopper
