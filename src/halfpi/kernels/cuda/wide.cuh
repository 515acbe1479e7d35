// Products of 64 rows and a multiple of 16 columns, up to 256.
#pragma once
#include "hopper.cuh"

namespace hopper {

// Sums of 64 rows and COLUMNS columns += A · Bᵀ, of 32 bytes of K in either format.
template <int COLUMNS, bool E4M3>
struct Wide;

#define R8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define R8_ R8(0)
#define R16_ R8_, R8(8)
#define R24_ R16_, R8(16)
#define R32_ R24_, R8(24)
#define R40_ R32_, R8(32)
#define R48_ R40_, R8(40)
#define R56_ R48_, R8(48)
#define R64_ R56_, R8(56)
#define R72_ R64_, R8(64)
#define R80_ R72_, R8(72)
#define R88_ R80_, R8(80)
#define R96_ R88_, R8(88)
#define R104_ R96_, R8(96)
#define R112_ R104_, R8(104)
#define R120_ R112_, R8(112)
#define R128_ R120_, R8(120)
#define D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D16 D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D24 D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define D32 D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define D40 D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D48 D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D56 D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D64 D56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D72 D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D80 D72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D88 D80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define D96 D88 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define D104 D96 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define D112 D104 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define D120 D112 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define D128 D120 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define WIDE(columns, e4m3, shape, n, a, b, flags)                                              \
  template <>                                                                                    \
  struct Wide<columns, e4m3> {                                                                   \
    __device__ static __forceinline__ void mma(float (&d)[n], u64 x, u64 y) {                    \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns shape " {" D##n "}, %" #a ", %" #b \
                   ", 1, 1, 1" flags ";"                                                         \
                   : R##n##_                                                                     \
                   : "l"(x), "l"(y));                                                            \
    }                                                                                            \
  };
#define BOTH(columns, a, b)                                       \
  WIDE(columns, false, "k16.f32.bf16.bf16", a, a, b, ", 0, 0") \
  WIDE(columns, true, "k32.f32.e4m3.e4m3", a, a, b, "")
BOTH(16, 8, 9)
BOTH(32, 16, 17)
BOTH(48, 24, 25)
BOTH(64, 32, 33)
BOTH(80, 40, 41)
BOTH(96, 48, 49)
BOTH(112, 56, 57)
BOTH(128, 64, 65)
BOTH(144, 72, 73)
BOTH(160, 80, 81)
BOTH(176, 88, 89)
BOTH(192, 96, 97)
BOTH(208, 104, 105)
BOTH(224, 112, 113)
BOTH(240, 120, 121)
BOTH(256, 128, 129)

#undef R8_
#undef D8
#undef R16_
#undef D16
#undef R24_
#undef D24
#undef R32_
#undef D32
#undef R40_
#undef D40
#undef R48_
#undef D48
#undef R56_
#undef D56
#undef R64_
#undef D64
#undef R72_
#undef D72
#undef R80_
#undef D80
#undef R88_
#undef D88
#undef R96_
#undef D96
#undef R104_
#undef D104
#undef R112_
#undef D112
#undef R120_
#undef D120
#undef R128_
#undef D128
#undef R8
#undef WIDE
#undef BOTH

}  // namespace hopper
