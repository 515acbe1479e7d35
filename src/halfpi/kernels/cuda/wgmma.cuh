// Products of the tensor cores: D (64 rows, N) in registers += A (64, 32 bytes of K) · B (N, 32 bytes of K)ᵀ.
#pragma once
#include "hopper.cuh"

namespace hopper {

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

// Sums that a thread has, n of them, as operands of assembly, and what they are called there.
#define SUM4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUM8(i) SUM4(i), SUM4(i + 4)
#define SUMS_4 SUM4(0)
#define SUMS_8 SUM8(0)
#define SUMS_16 SUMS_8, SUM8(8)
#define SUMS_24 SUMS_16, SUM8(16)
#define SUMS_32 SUMS_24, SUM8(24)
#define SUMS_40 SUMS_32, SUM8(32)
#define SUMS_48 SUMS_40, SUM8(40)
#define SUMS_56 SUMS_48, SUM8(48)
#define SUMS_64 SUMS_56, SUM8(56)
#define SUMS_72 SUMS_64, SUM8(64)
#define SUMS_80 SUMS_72, SUM8(72)
#define SUMS_88 SUMS_80, SUM8(80)
#define SUMS_96 SUMS_88, SUM8(88)
#define SUMS_104 SUMS_96, SUM8(96)
#define SUMS_112 SUMS_104, SUM8(104)
#define SUMS_120 SUMS_112, SUM8(112)
#define SUMS_128 SUMS_120, SUM8(120)
#define SUMS_12 SUMS_8, SUM4(8)
#define SUMS_20 SUMS_16, SUM4(16)
#define SUMS_28 SUMS_24, SUM4(24)
#define SUMS_36 SUMS_32, SUM4(32)
#define NAMES_4 "%0,%1,%2,%3"
#define NAMES_8 NAMES_4 ",%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_24 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define NAMES_32 NAMES_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES_40 NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define NAMES_48 NAMES_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES_56 NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define NAMES_64 NAMES_56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_72 NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define NAMES_80 NAMES_72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES_88 NAMES_80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define NAMES_96 NAMES_88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES_104 NAMES_96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define NAMES_112 NAMES_104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES_120 NAMES_112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define NAMES_128 NAMES_120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define NAMES_12 NAMES_8 ",%8,%9,%10,%11"
#define NAMES_20 NAMES_16 ",%16,%17,%18,%19"
#define NAMES_28 NAMES_24 ",%24,%25,%26,%27"
#define NAMES_36 NAMES_32 ",%32,%33,%34,%35"

// Of `columns` columns, of which a thread has n sums. Operands of assembly are counted: A is one, in shared
// memory, or four, in registers, and B, number b, is the last.
#define PRODUCT(name, columns, shape, n, b, flags)                                                  \
  __device__ static __forceinline__ void name(float (&d)[n], u64 x, u64 y) {                        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns shape " {" NAMES_##n "}, %" #n ", %" #b \
                 ", 1, 1, 1" flags ";"                                                              \
                 : SUMS_##n                                                                         \
                 : "l"(x), "l"(y));                                                                 \
  }
#define PRODUCT_OF_REGISTERS(name, columns, shape, n, a1, a2, a3, b, flags)                         \
  __device__ static __forceinline__ void name(float (&d)[n], const u32* x, u64 y) {                 \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns shape " {" NAMES_##n "}, {%" #n ",%" #a1 \
                 ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1" flags ";"                                  \
                 : SUMS_##n                                                                         \
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(y));                             \
  }
// Of all widths that a tile, or rows of actions, may have.
#define PRODUCTS(shape, flags) \
  PRODUCT(mma, 8, shape, 4, 5, flags) \
  PRODUCT(mma, 16, shape, 8, 9, flags) \
  PRODUCT(mma, 24, shape, 12, 13, flags) \
  PRODUCT(mma, 32, shape, 16, 17, flags) \
  PRODUCT(mma, 40, shape, 20, 21, flags) \
  PRODUCT(mma, 48, shape, 24, 25, flags) \
  PRODUCT(mma, 56, shape, 28, 29, flags) \
  PRODUCT(mma, 64, shape, 32, 33, flags) \
  PRODUCT(mma, 72, shape, 36, 37, flags) \
  PRODUCT(mma, 80, shape, 40, 41, flags) \
  PRODUCT(mma, 96, shape, 48, 49, flags) \
  PRODUCT(mma, 112, shape, 56, 57, flags) \
  PRODUCT(mma, 128, shape, 64, 65, flags) \
  PRODUCT(mma, 144, shape, 72, 73, flags) \
  PRODUCT(mma, 160, shape, 80, 81, flags) \
  PRODUCT(mma, 176, shape, 88, 89, flags) \
  PRODUCT(mma, 192, shape, 96, 97, flags) \
  PRODUCT(mma, 208, shape, 104, 105, flags) \
  PRODUCT(mma, 224, shape, 112, 113, flags) \
  PRODUCT(mma, 240, shape, 120, 121, flags) \
  PRODUCT(mma, 256, shape, 128, 129, flags)

#define BF16 "k16.f32.bf16.bf16"
struct Bf16 {
  PRODUCTS(BF16, ", 0, 0")
  // B (16, N) instead, rows of B contiguous.
  PRODUCT(mma_transposed, 64, BF16, 32, 33, ", 0, 1")
  // And A (16, 64), too.
  PRODUCT(mma_both_transposed, 8, BF16, 4, 5, ", 1, 1")
  PRODUCT(mma_both_transposed, 16, BF16, 8, 9, ", 1, 1")
  // A in registers, as a product leaves it there.
  PRODUCT_OF_REGISTERS(mma, 256, BF16, 128, 129, 130, 131, 132, ", 0")
  // And B transposed.
  PRODUCT_OF_REGISTERS(mma_transposed, 16, BF16, 8, 9, 10, 11, 12, ", 1")
  PRODUCT_OF_REGISTERS(mma_transposed, 64, BF16, 32, 33, 34, 35, 36, ", 1")
  PRODUCT_OF_REGISTERS(mma_transposed, 256, BF16, 128, 129, 130, 131, 132, ", 1")
};
#undef BF16

#define E4M3 "k32.f32.e4m3.e4m3"
struct E4m3 {
  PRODUCTS(E4M3, "")
};
#undef E4M3

// Begins sums += a line of 128 bytes of K of rows times one of columns.
template <class Format, int N>
__device__ __forceinline__ void begin_line(float (&sums)[N], const Swizzled& rows, const Swizzled& columns) {
  settle(sums);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 128; k += 32) Format::mma(sums, rows.at(k), columns.at(k));
  wgmma_commit();
}

#undef SUM4
#undef SUM8
#undef SUMS_4
#undef SUMS_12
#undef SUMS_20
#undef SUMS_28
#undef SUMS_36
#undef NAMES_4
#undef NAMES_12
#undef NAMES_20
#undef NAMES_28
#undef NAMES_36
#undef SUMS_8
#undef NAMES_8
#undef SUMS_16
#undef NAMES_16
#undef SUMS_24
#undef NAMES_24
#undef SUMS_32
#undef NAMES_32
#undef SUMS_40
#undef NAMES_40
#undef SUMS_48
#undef NAMES_48
#undef SUMS_56
#undef NAMES_56
#undef SUMS_64
#undef NAMES_64
#undef SUMS_72
#undef NAMES_72
#undef SUMS_80
#undef NAMES_80
#undef SUMS_88
#undef NAMES_88
#undef SUMS_96
#undef NAMES_96
#undef SUMS_104
#undef NAMES_104
#undef SUMS_112
#undef NAMES_112
#undef SUMS_120
#undef NAMES_120
#undef SUMS_128
#undef NAMES_128
#undef PRODUCT
#undef PRODUCT_OF_REGISTERS
#undef PRODUCTS

}  // namespace hopper
