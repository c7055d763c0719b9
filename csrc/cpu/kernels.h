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

struct ConvArgs {
  const void* x;  // [n, h, w, c]
  const void* filters;  // [k / panel, r * s * c, panel] of float32, [k / panel, (r * s * c + 1) / 2, panel, 2] of bfloat16
  const float* bias;  // [k]
  const void* residual;  // like out, or null, or out itself
  void* out;  // [n, height, width, k]
  int64_t n, h, w, c, k, r, s, stride, padding, height, width;
  bool bf16, relu;
};

struct BnArgs {
  const void *x, *residual, *y, *dy;  // [pixels, c]; the residual may be null
  const float *mean, *scale, *shift;  // [c]: y = act((x - mean) * scale + shift + residual)
  const float *level, *slope;  // [c]: dx = scale * (g - level - (x - mean) * slope)
  void *out, *dresidual;  // [pixels, c]: y, or dx; the residual's gradient, or null
  int64_t c;
  bool bf16, relu;
};

// One instruction set's kernels. A kernel does one block of the output; the caller shares blocks out among threads.
struct Isa {
  const char* name;
  int panel;  // output channels of a panel: two vectors
  bool bf16;  // whether conv takes bfloat16
  // Tiles [first, last) and output channels [k0, k1), through `scratch` of winograd_scratch(last - first, c) floats.
  // Returns the bits of the largest |x| it read: of a NaN or an infinity they are larger than those of any number.
  int32_t (*winograd)(const WinogradArgs&, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch);
  // Panels [first, last) of filters [k, c, 3, 3] with the given strides, transformed in double and rounded once.
  void (*winograd_filters)(const float* weight, const int64_t stride[4], int64_t c, float* filters, int64_t first, int64_t last);
  // Output pixels [first, last), counted over all images, and channels [k0, k1), through conv_scratch(args, last - first) floats.
  void (*conv)(const ConvArgs&, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch);
  // Pixels [first, last). A part is [3, c]: pivots, sums, sums of squares; or [2, c]: sums, sums of products.
  void (*moments)(const BnArgs&, int64_t first, int64_t last, float* part);
  void (*normalise)(const BnArgs&, int64_t first, int64_t last);
  void (*sums)(const BnArgs&, int64_t first, int64_t last, float* part);
  void (*gradient)(const BnArgs&, int64_t first, int64_t last);
  // Channels [c0, c1) of the parts of `rows` pixels, `chunk` in each but the last: their mean and biased variance, or their sums.
  void (*merge_moments)(const float* parts, int64_t rows, int64_t chunk, int64_t c, int64_t c0, int64_t c1, float* mean, float* var);
  void (*merge_sums)(const float* parts, int64_t chunks, int64_t c, int64_t c0, int64_t c1, double* sum, double* product);
};

extern const Isa avx512_bf16, avx512, avx2;

// Static: each file that includes this keeps its own, compiled for its own instructions.

// A tile is 4x2 outputs, over all images; the last of a row or column of tiles may hang over the edge.
static inline int64_t tiles_of(int64_t n, int64_t h, int64_t w) { return n * ((h + 3) / 4) * ((w + 1) / 2); }

// Rows of a transformed input are this far apart, so that rows of 2^i channels do not all fall into one set of L1.
static inline int64_t row_stride(int64_t c) { return c + 16; }

static inline int64_t winograd_scratch(int64_t tiles, int64_t c) { return 24 * tiles * (row_stride(c) + 32); }

// Elements of a row, everything that one output pixel sees of x: filters go through them in the order r, s, c.
static inline int64_t conv_depth(const ConvArgs& a) { return a.r * a.s * a.c; }

// Whether rows are copied: those that do not lie in x one after another, those 2 KB or more apart, which would share one or
// two sets of L1, and those of an odd number of bfloat16, which are multiplied in pairs.
static inline bool conv_gathers(const ConvArgs& a) {
  return a.r * a.s > 1 || a.stride > 1 || a.padding || a.c * (a.bf16 ? 2 : 4) % 2048 == 0 || (a.bf16 && a.c % 2);
}

// Elements from one row to the next as conv reads them: copies lie an odd number of cache lines apart.
static inline int64_t conv_stride(const ConvArgs& a) {
  const int64_t line = a.bf16 ? 32 : 16;
  return conv_gathers(a) ? ((conv_depth(a) + line - 1) / line | 1) * line : a.c;
}

// Floats for the sums of one panel.
static inline int64_t conv_sums(int64_t rows) { return rows * 32; }

static inline int64_t conv_scratch(const ConvArgs& a, int64_t rows) {
  return conv_sums(rows) + (conv_gathers(a) ? rows * conv_stride(a) / (a.bf16 ? 2 : 1) + 16 : 0);  // a line for what the last copy brings too much
}

}  // namespace resnet_fast::cpu
