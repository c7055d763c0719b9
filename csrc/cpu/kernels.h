// What the host hands to a CPU kernel: plain structs, no torch. Each instruction set has its own copy of every kernel.
//
// Activations are dense NHWC, float32 or bfloat16 (as uint16_t); filters lie in panels, one for every `panel` output
// channels, so that a product streams them once and in order; sums, bias and the epilogue are float32.
#pragma once

#include <cstdint>

namespace resnet_fast::cpu {

struct WinogradArgs {
  const void* x;  // [n, h, w, c]
  const float* filters;  // [k / panel, 24, c, panel], transformed
  const float* bias;  // [k]
  const void* residual;  // like out, or null
  void* out;  // [n, h, w, k]
  int64_t n, h, w, c, k;
  bool bf16, relu;
};

struct PointwiseArgs {
  const void* x;  // [n, h, w, c]
  const void* filters;  // [k / panel, c, panel] of float32, [k / panel, c / 2, panel, 2] of bfloat16
  const float* bias;  // [k]
  const void* residual;  // like out, or null, or out itself
  void* out;  // [n, (h - 1) / stride + 1, (w - 1) / stride + 1, k]
  int64_t n, h, w, c, k, stride;
  bool bf16, relu;
};

// One instruction set's kernels. A kernel does one block of the output; the caller shares blocks out among threads.
struct Isa {
  const char* name;
  int panel;  // output channels of a panel: two vectors
  bool bf16;  // whether pointwise takes bfloat16
  // Tiles [first, last) and output channels [k0, k1), through `scratch` of winograd_scratch(last - first, c) floats.
  // Returns the bits of the largest |x| it read: of a NaN or an infinity they are larger than those of any number.
  int32_t (*winograd)(const WinogradArgs&, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch);
  // Panels [first, last) of filters [k, c, 3, 3] with the given strides, transformed in double and rounded once.
  void (*winograd_filters)(const float* weight, const int64_t stride[4], int64_t c, float* filters, int64_t first, int64_t last);
  // Output pixels [first, last), counted over all images, and channels [k0, k1), through pointwise_scratch(last - first) floats.
  void (*pointwise)(const PointwiseArgs&, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch);
};

extern const Isa avx512_bf16, avx512, avx2;

// Static: each file that includes this keeps its own, compiled for its own instructions.

// A tile is 4x2 outputs, over all images; the last of a row or column of tiles may hang over the edge.
static inline int64_t tiles_of(int64_t n, int64_t h, int64_t w) { return n * ((h + 3) / 4) * ((w + 1) / 2); }

// Rows of a transformed input are this far apart, so that rows of 2^i channels do not all fall into one set of L1.
static inline int64_t row_stride(int64_t c) { return c + 16; }

static inline int64_t winograd_scratch(int64_t tiles, int64_t c) { return 24 * tiles * (row_stride(c) + 32); }

// Rows 2 KB or more apart would share one or two sets of L1: they are copied, as are those that a stride leaves gaps between.
static inline bool pointwise_gathers(const PointwiseArgs& a) { return a.stride > 1 || a.c * (a.bf16 ? 2 : 4) % 2048 == 0; }

// Elements from one row to the next as pointwise reads them: copies lie one cache line farther apart.
static inline int64_t pointwise_stride(const PointwiseArgs& a) {
  return !pointwise_gathers(a) ? a.c : a.bf16 ? a.c + 32 : row_stride(a.c);
}

static inline int64_t pointwise_scratch(const PointwiseArgs& a, int64_t rows) {
  return pointwise_gathers(a) ? rows * pointwise_stride(a) / (a.bf16 ? 2 : 1) : 0;
}

}  // namespace resnet_fast::cpu
