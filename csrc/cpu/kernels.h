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

// One instruction set's kernels. A kernel does one block of the output; the caller shares blocks out among threads.
struct Isa {
  const char* name;
  int panel;  // output channels of a panel: two vectors
  // Tiles [first, last) and output channels [k0, k1), through `scratch` of winograd_scratch(last - first, c) floats.
  // Returns the bits of the largest |x| it read: of a NaN or an infinity they are larger than those of any number.
  int32_t (*winograd)(const WinogradArgs&, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch);
  // Panels [first, last) of filters [k, c, 3, 3] with the given strides, transformed in double and rounded once.
  void (*winograd_filters)(const float* weight, const int64_t stride[4], int64_t c, float* filters, int64_t first, int64_t last);
};

extern const Isa avx512, avx2;

// A tile is 4x2 outputs, over all images; the last of a row or column of tiles may hang over the edge.
inline int64_t tiles_of(int64_t n, int64_t h, int64_t w) { return n * ((h + 3) / 4) * ((w + 1) / 2); }

// Rows of a transformed input are this far apart, so that rows of 2^i channels do not all fall into one set of L1.
inline int64_t row_stride(int64_t c) { return c + 16; }

inline int64_t winograd_scratch(int64_t tiles, int64_t c) { return 24 * tiles * (row_stride(c) + 32); }

}  // namespace resnet_fast::cpu
