// 1x1 convolution: out = act(conv(x, weight) + bias [+ residual]), a product of pixels and filters.
//
// A block of rows (pixels) stays in L2 while panel after panel of filters goes by: filters come from memory once a block,
// the next panel while this one is used. Bias, residual and ReLU meet the sums in registers. The residual may be out
// itself: an element is read and then written by the same thread.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace resnet_fast::cpu::ISA {

// Rows [first, last), one after another and pointwise_stride(a) apart. `x` itself if it lies so already.
template <class T>
const T* gathered(const PointwiseArgs& a, int64_t first, int64_t last, T* scratch) {
  const T* x = static_cast<const T*>(a.x);
  if (!pointwise_gathers(a)) return x + first * a.c;
  const int64_t height = (a.h - 1) / a.stride + 1, width = (a.w - 1) / a.stride + 1, stride = pointwise_stride(a);
  int64_t column = first % width, row = first / width % height, image = first / width / height;
  for (int64_t i = 0; i < last - first; ++i) {
    std::memcpy(scratch + i * stride, x + ((image * a.h + row * a.stride) * a.w + column * a.stride) * a.c, a.c * sizeof(T));
    if (++column < width) continue;
    column = 0;
    if (++row == height) row = 0, ++image;
  }
  return scratch;
}

// The end of a product: bias, residual and ReLU, into out's rows of k.
template <class T>
struct Finish {
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

template <class T, class Element>
void pointwise_block(const PointwiseArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
  constexpr int64_t per = sizeof(Element) / sizeof(T);
  const T *rows = gathered(a, first, last, reinterpret_cast<T*>(scratch)), *residual = static_cast<const T*>(a.residual);
  const int64_t c = a.c / per, stride = pointwise_stride(a) / per;
  const Vec least = (a.relu ? 0.f : -__builtin_inff()) - Vec{};
  for (int64_t k = k0; k < k1; k += panel) {
    const Element *filters = static_cast<const Element*>(a.filters) + k * c, *ahead = filters + c * panel;
    int64_t count = c * panel;
    if (k + panel == k1 && a.stride == 1 && last < a.n * a.h * a.w) {  // the next block
      ahead = reinterpret_cast<const Element*>(static_cast<const T*>(a.x) + last * a.c);
      count = c * (last - first);
    }
    const int64_t at = first * a.k + k;
    product_of(last - first, reinterpret_cast<const Element*>(rows), stride, filters, c, ahead, count,
               Finish<T>{a.bias + k, residual ? residual + at : nullptr, static_cast<T*>(a.out) + at, a.k, least});
  }
}

inline void pointwise(const PointwiseArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
#ifdef BF16_PAIRS
  if (a.bf16) return pointwise_block<uint16_t, Pair>(a, first, last, k0, k1, scratch);
#endif
  pointwise_block<float, float>(a, first, last, k0, k1, scratch);
}

}  // namespace resnet_fast::cpu::ISA
