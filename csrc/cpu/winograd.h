// 3x3 convolution, stride 1, padding 1, by Winograd's minimal filtering: out = act(conv(x, weight) + bias [+ residual]).
//
// A tile of 4x2 outputs takes 6x4 products where the sum itself takes 72, a third: F(4,3) down a column of the tile with
// the points 0, 2/3, -2/3, 3/2, -3/2 and infinity, F(2,3) along its rows with 0, 1, -1 and infinity (Lavin and Gray 2015;
// how points make errors: Barabasz et al. 2018). These have 0.85 times the error of 0, 1, -1, 1/2, -2, and their symmetry
// halves the work. F(4,3) both ways would take a quarter of the products, with twice the error: more than the rule allows.
//
// For one block of tiles: every channel's 6x4 inputs are transformed into 24 matrices [tiles, c] that stay in L2; then
// for each panel of filters 24 products, transformed back with bias, residual and ReLU. Floor: 2*72/3 FLOPs a
// tile, input and output channel; a third of that again would be saved by nothing known at this error.
//
// The transforms add up what lies within a tile, so a NaN or an infinity would spread over it: the kernel tells the
// largest magnitude it met, and the caller computes such an input otherwise.
#pragma once

#include "gemm.h"
#include "kernels.h"

namespace resnet_fast::cpu::ISA {

constexpr double p = 2. / 3, q = 3. / 2;  // the points of F(4,3) beside 0 and infinity, and their negatives
constexpr float p1 = p, p2 = p * p, p3 = p * p * p, q1 = q, q2 = q * q, q3 = q * q * q;

// B^T: row j holds the coefficients of the product of (x - point) over all points but the j-th.
template <class V>
inline void column_in(const V d[6], V t[6]) {
  constexpr float middle = p * p + q * q;
  t[0] = d[0] - middle * d[2] + d[4];
  const V even_p = d[4] - q2 * d[2], odd_p = p1 * (d[3] - q2 * d[1]);
  t[1] = even_p + odd_p, t[2] = even_p - odd_p;
  const V even_q = d[4] - p2 * d[2], odd_q = q1 * (d[3] - p2 * d[1]);
  t[3] = even_q + odd_q, t[4] = even_q - odd_q;
  t[5] = d[1] - middle * d[3] + d[5];
}

template <class V>
inline void row_in(const V d[4], V t[4]) {
  t[0] = d[2] - d[0], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[3] - d[1];
}

// A^T: powers of the points.
template <class V>
inline void column_out(const V m[6], V y[4]) {
  const V even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
  y[0] = m[0] + even_p + even_q;
  y[1] = p1 * odd_p + q1 * odd_q;
  y[2] = p2 * even_p + q2 * even_q;
  y[3] = p3 * odd_p + q3 * odd_q + m[5];
}

template <class V>
inline void row_out(const V m[4], V y[2]) {
  y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3];
}

// G: powers of the points over the product of their distances to all others.
constexpr double at_p = 1 / (2 * p * p * (p * p - q * q)), at_q = 1 / (2 * q * q * (q * q - p * p));
constexpr double column_filter[6][3] = {{1, 0, 0},  // p q = 1
                                        {at_p, at_p * p, at_p * p * p},
                                        {at_p, -at_p * p, at_p * p * p},
                                        {at_q, at_q * q, at_q * q * q},
                                        {at_q, -at_q * q, at_q * q * q},
                                        {0, 0, 1}};
constexpr double row_filter[4][3] = {{-1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};

inline void winograd_filters(const float* weight, const int64_t stride[4], int64_t c, float* filters, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) {
    for (int64_t i = 0; i < c; ++i) {
      double half[6][3][panel];  // G of the columns times the filter
      const float* w = weight + at * panel * stride[0] + i * stride[1];
      for (int a = 0; a < 6; ++a)
        for (int s = 0; s < 3; ++s)
          for (int k = 0; k < panel; ++k) {
            half[a][s][k] = 0;
            for (int r = 0; r < 3; ++r) half[a][s][k] += column_filter[a][r] * w[k * stride[0] + r * stride[2] + s * stride[3]];
          }
      for (int a = 0; a < 6; ++a)
        for (int b = 0; b < 4; ++b) {
          float* u = filters + ((at * 24 + a * 4 + b) * c + i) * panel;
          for (int k = 0; k < panel; ++k)
            u[k] = float(row_filter[b][0] * half[a][0][k] + row_filter[b][1] * half[a][1][k] + row_filter[b][2] * half[a][2][k]);
        }
    }
  }
}

// So many channels are summed in registers before they join the rest: a sum's rounding errors grow with its length. Over
// 256 channels this takes 0.55 times the error of one long sum and 3 % of the speed, 32 a further 0.8 times and 8 %.
constexpr int64_t run_length = 64;

// The upper left output of a tile.
struct Corner {
  int64_t image, row, column;
  Corner(const WinogradArgs& a, int64_t tile) {
    const int64_t down = (a.h + 3) / 4, across = (a.w + 1) / 2;
    image = tile / (down * across), row = tile / across % down * 4, column = tile % across * 2;
  }
};

// v[24][tiles][row_stride(c)] of tiles [first, last); returns the bits of the largest magnitude.
template <class T>
int32_t transform_in(const WinogradArgs& a, int64_t first, int64_t last, float* v) {
  const int64_t stride = row_stride(a.c), matrix = (last - first) * stride;
  Bits largest{};
  for (int64_t tile = first; tile < last; ++tile, v += stride) {
    const Corner at(a, tile);
    const int64_t top = at.row - 1, left = at.column - 1;
    const T* x = static_cast<const T*>(a.x) + ((at.image * a.h + top) * a.w + left) * a.c;
    const bool inside = top >= 0 && left >= 0 && top + 6 <= a.h && left + 4 <= a.w;
    for (int64_t c = 0; c < a.c; c += lanes) {
      Vec columns[4][6];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
        Vec pixels[4], row[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const bool there = inside || (uint64_t(top + i) < uint64_t(a.h) && uint64_t(left + j) < uint64_t(a.w));
          pixels[j] = there ? load(x + (i * a.w + j) * a.c + c) : Vec{};
          const Bits magnitude = (Bits)pixels[j] & 0x7fffffff;
          largest = magnitude > largest ? magnitude : largest;
        }
        row_in(pixels, row);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) columns[j][i] = row[j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec column[6];
        column_in(columns[j], column);
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) store(v + (i * 4 + j) * matrix + c, column[i]);
      }
    }
  }
  int32_t bits = 0;
  for (int i = 0; i < lanes; ++i) bits = largest[i] > bits ? largest[i] : bits;
  return bits;
}

// One panel's products m[24][tiles][panel] into outputs, from output channel k on.
template <class T>
void transform_out(const WinogradArgs& a, int64_t first, int64_t last, int64_t k, const float* m) {
  const int64_t matrix = (last - first) * panel;
  const T* residual = static_cast<const T*>(a.residual);
  T* out = static_cast<T*>(a.out);
  for (int64_t tile = first; tile < last; ++tile, m += panel) {
    const Corner at(a, tile);
    for (int half = 0; half < panel; half += lanes) {
      Vec rows[4][4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Vec column[6], y[4];
#pragma GCC unroll 6
        for (int i = 0; i < 6; ++i) column[i] = load(m + (i * 4 + j) * matrix + half);
        column_out(column, y);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) rows[i][j] = y[i];
      }
      const Vec bias = load(a.bias + k + half);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Vec y[2];
        row_out(rows[i], y);
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          if (at.row + i >= a.h || at.column + j >= a.w) continue;
          const int64_t place = ((at.image * a.h + at.row + i) * a.w + at.column + j) * a.k + k + half;
          Vec value = y[j] + bias;
          if (residual) value += load(residual + place);
          store(out + place, a.relu ? relu(value) : value);
        }
      }
    }
  }
}

template <class T>
int32_t winograd_block(const WinogradArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
  const int64_t tiles = last - first, stride = row_stride(a.c);
  float* m = scratch + 24 * tiles * stride;
  const int32_t largest = transform_in<T>(a, first, last, scratch);
  for (int64_t k = k0; k < k1; k += panel) {
    for (int i = 0; i < 24; ++i)
      for (int64_t c = 0; c < a.c; c += run_length) {
        const int64_t run = a.c - c < run_length ? a.c - c : run_length;
        const float* filters = a.filters + ((k / panel * 24 + i) * a.c + c) * panel;
        product_of(tiles, scratch + i * tiles * stride + c, stride, filters, run, filters + run * panel, run * panel,
                   Sum{m + i * tiles * panel, c > 0});
      }
    transform_out<T>(a, first, last, k, m);
  }
  return largest;
}

inline int32_t winograd(const WinogradArgs& a, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
  return (a.bf16 ? winograd_block<uint16_t> : winograd_block<float>)(a, first, last, k0, k1, scratch);
}

}  // namespace resnet_fast::cpu::ISA
