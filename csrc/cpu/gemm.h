// The product that every CPU kernel stands on: a few rows of activations times one panel of filters, in registers.
//
// R rows of two vectors are 2R accumulators: 14 rows fill AVX-512's 32 registers but for the panel's two vectors and the
// broadcast element. Each step of the sum loads R elements and two vectors for 2R multiply-adds, so the
// multiply-add units are the limit and not the loads.
#pragma once

#include "simd.h"

namespace resnet_fast::cpu::ISA {

// So many products are summed in registers before they join the rest: a sum's rounding errors grow with its length. Over
// 256 channels this takes 0.55 times the error of one long sum and 3 % of the speed, 32 a further 0.8 times and 8 %.
constexpr int64_t run_length = 64;

constexpr int most_rows = LANES == 16 ? 14 : 6;  // AVX2 has 16 registers

// out[i, :] = sum over c of v[i, c] * filters[c, :], for i < R; rows of v are `stride` floats apart, rows of out one panel.
template <int R>
void product(const float* v, int64_t stride, const float* filters, int64_t c, float* out) {
  for (int64_t k = 0; k < c;) {
    Vec sum[R][2];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = Vec{};
    const bool first = k == 0;
    for (const int64_t end = k + run_length < c ? k + run_length : c; k < end; ++k, filters += panel) {
      const Vec left = load(filters), right = load(filters + lanes);
      __builtin_prefetch(filters + c * panel, 0, 2);  // into L2: the next panel, or the next position's
      __builtin_prefetch(filters + c * panel + lanes, 0, 2);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const Vec x = v[i * stride + k] - Vec{};
        sum[i][0] += x * left;
        sum[i][1] += x * right;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      store(out + i * panel, first ? sum[i][0] : load(out + i * panel) + sum[i][0]);
      store(out + i * panel + lanes, first ? sum[i][1] : load(out + i * panel + lanes) + sum[i][1]);
    }
  }
}

// The same for any number of rows, in pieces as even as they go.
inline void product_of(int64_t rows, const float* v, int64_t stride, const float* filters, int64_t c, float* out) {
  for (int64_t pieces = (rows + most_rows - 1) / most_rows; pieces; --pieces) {
    const int64_t r = (rows + pieces - 1) / pieces;
    switch (r) {
#define RF_ROWS(n) \
  case n: \
    product<n>(v, stride, filters, c, out); \
    break;
      RF_ROWS(1) RF_ROWS(2) RF_ROWS(3) RF_ROWS(4) RF_ROWS(5) RF_ROWS(6)
#if LANES == 16
      RF_ROWS(7) RF_ROWS(8) RF_ROWS(9) RF_ROWS(10) RF_ROWS(11) RF_ROWS(12) RF_ROWS(13) RF_ROWS(14)
#endif
#undef RF_ROWS
    }
    rows -= r, v += r * stride, out += r * panel;
  }
}

}  // namespace resnet_fast::cpu::ISA
