// What both kernels of multi-query attention agree on.
#pragma once
#include "softmax.cuh"

namespace {

using namespace hopper;

constexpr int HEAD = 256;
constexpr int BYTES = FP8 ? 1 : 2;                    // of an output
constexpr float LOGIT_SCALE = 0.0625f * 1.44269504f;  // 1/√k · log2 e
// Operands come as lines of 64 dimensions: (line, row, 128 bytes).
constexpr int LINE = 64, LINES = HEAD / LINE;

}  // namespace
