// Convolution: out = act(conv(x, weight) + bias [+ residual]), a product of rows and filters.
//
// A row is what one output pixel sees of x. For 1x1 filters it is a pixel, read where it lies; others are copied together.
// A block of rows stays in L2 while panel after panel of filters goes by: filters come from memory once a block,
// the next panel while this one is used. Bias, residual and ReLU meet the sums in registers. The residual may be out
// itself: an element is read and then written by the same thread.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace resnet_fast::cpu::ISA {

// One row: r runs of s * c elements, each of which lies in x together, with zeros for what hangs over the border.
// Runs are copied in whole cache lines: what that brings too much the next run overwrites, or the next row, or nobody reads.
template <class T>
void gather_row(const ConvArgs& a, int64_t image, int64_t top, int64_t left, T* to) {
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t run = a.s * a.c, step = a.w * a.c, at = (image * a.h + top) * step + left * a.c;
  const int64_t end = at + (a.r - 1) * step + (run + line - 1) / line * line;  // of what whole lines read
  const T* from = static_cast<const T*>(a.x) + at;
  if (top >= 0 && left >= 0 && top + a.r <= a.h && left + a.s <= a.w && end <= a.n * a.h * step) {
    for (int64_t i = 0; i < a.r; ++i, from += step, to += run)
      for (int64_t j = 0; j < run; j += line) std::memcpy(to + j, from + j, sizeof(T) * line);
    return;
  }
  const int64_t before = left < 0 ? -left : 0, after = left + a.s > a.w ? left + a.s - a.w : 0;  // columns over the border
  for (int64_t i = 0; i < a.r; ++i, from += step, to += run) {
    const bool there = uint64_t(top + i) < uint64_t(a.h) && before + after < a.s;
    if (!there || before || after) std::memset(to, 0, sizeof(T) * run);
    if (there) std::memcpy(to + before * a.c, from + before * a.c, sizeof(T) * (a.s - before - after) * a.c);
  }
}

// Rows [first, last), one after another and conv_stride(a) apart: `x` itself if they lie so already.
template <class T>
const T* gathered(const ConvArgs& a, int64_t first, int64_t last, T* scratch) {
  if (!conv_gathers(a)) return static_cast<const T*>(a.x) + first * a.c;
  const int64_t stride = conv_stride(a), depth = conv_depth(a);
  int64_t column = first % a.width, row = first / a.width % a.height, image = first / a.width / a.height;
  for (T* to = scratch; first < last; ++first, to += stride) {
    gather_row(a, image, row * a.stride - a.padding, column * a.stride - a.padding, to);
    if (sizeof(T) == 2 && depth % 2) to[depth] = 0;  // the filters' zero there would make NaN of an infinity
    if (++column < a.width) continue;
    column = 0;
    if (++row == a.height) row = 0, ++image;
  }
  return scratch;
}

// The end of the last product: what the others summed up, bias, residual and ReLU, into out's rows of k.
template <class T>
struct Finish {
  const float* sums;  // [rows, panel], or null
  const float* bias;
  const T* residual;
  T* out;
  int64_t k;
  Vec least;  // zero for ReLU; a NaN is not less

  void begin(int64_t first, int rows) const {
    for (int i = 0; i < rows; ++i)
      for (int half = 0; half < panel; half += 64 / sizeof(T)) {
        const int64_t at = (first + i) * k + half;
        if (residual && residual != out) __builtin_prefetch(residual + at);
        __builtin_prefetch(out + at, 1);
      }
  }

  template <int R>
  void take(int64_t first, Vec (&sum)[R][2]) const {
    if (sums) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) sum[i][j] += load(sums + (first + i) * panel + j * lanes);
    }
    const Vec b[2]{load(bias), load(bias + lanes)};
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) sum[i][j] += b[j];
    if (residual) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) sum[i][j] += load(residual + (first + i) * k + j * lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) store(out + (first + i) * k + j * lanes, sum[i][j] < least ? least : sum[i][j]);
  }
};

// At most so many elements are summed in registers before they join the rest: a run of filters then stays in L2 beside the rows,
// and a sum's rounding errors, which grow with its length, stay below twice those of oneDNN's blocked convolution.
constexpr int64_t longest_run = 512;

template <class T, class Element>
void conv_block(const ConvArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
  constexpr int64_t per = sizeof(Element) / sizeof(T);
  const T* residual = static_cast<const T*>(a.residual);
  const Element* rows = reinterpret_cast<const Element*>(gathered(a, first, last, reinterpret_cast<T*>(scratch + conv_sums(last - first))));
  const int64_t depth = (conv_depth(a) + per - 1) / per, stride = conv_stride(a) / per;
  const int64_t runs = (depth + longest_run - 1) / longest_run, run = (depth + runs - 1) / runs;
  const Vec least = (a.relu ? 0.f : -__builtin_inff()) - Vec{};
  for (int64_t k = k0; k < k1; k += panel) {
    const Element* filters = static_cast<const Element*>(a.filters) + k * depth;
    int64_t done = 0;
    for (; done + run < depth; done += run, filters += run * panel)
      product_of(last - first, rows + done, stride, filters, run, filters + run * panel, run * panel, Sum{scratch, done > 0});
    const int64_t left = depth - done;
    const Element* ahead = filters + left * panel;
    int64_t count = run * panel;
    if (k + panel == k1 && a.r * a.s * a.stride == 1 && last < a.n * a.h * a.w) {  // the next block
      ahead = reinterpret_cast<const Element*>(static_cast<const T*>(a.x) + last * a.c);
      count = depth * (last - first);
    }
    const int64_t at = first * a.k + k;
    product_of(last - first, rows + done, stride, filters, left, ahead, count,
               Finish<T>{runs > 1 ? scratch : nullptr, a.bias + k, residual ? residual + at : nullptr, static_cast<T*>(a.out) + at, a.k, least});
  }
}

inline void conv(const ConvArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
#ifdef BF16_PAIRS
  if (a.bf16) return conv_block<uint16_t, Pair>(a, first, last, k0, k1, scratch);
#endif
  conv_block<float, float>(a, first, last, k0, k1, scratch);
}

}  // namespace resnet_fast::cpu::ISA
