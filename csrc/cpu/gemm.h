// The product that every CPU kernel stands on: a few rows of activations times one panel of filters, in registers.
//
// R rows of two vectors are 2R accumulators: 14 rows fill AVX-512's 32 registers but for the panel's two vectors and the
// broadcast element. Each step of the sum loads R elements and two vectors for 2R multiply-adds, so the
// multiply-add units are the limit and not the loads. An element is a float, or a Pair of bfloat16.
#pragma once

#include "simd.h"

namespace resnet_fast::cpu::ISA {

constexpr int most_rows = LANES == 16 ? 14 : 6;  // AVX2 has 16 registers

// sum[i, :] = sum over c of v[i, c] * filters[c, :], for i < R; rows of v are `stride` elements apart. `end`
// is told before which rows it will get, to prefetch what it needs, and then takes their sums. Each step also prefetches
// two lines at `ahead`, which moves on by `pace` elements.
template <int R, class Element, class End>
void product(const Element* v, int64_t stride, const Element* filters, int64_t c, const Element* ahead, int64_t pace, int64_t first,
             const End& end) {
  end.begin(first, R);
  Vec sum[R][2];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = Vec{};
  const Element* row[(R + 2) / 3];  // every third: of the rest, x86 adds one or two strides in the load
#pragma GCC unroll 16
  for (int i = 0; i < R; i += 3) row[i / 3] = v + i * stride;
  for (int64_t k = 0; k < c; ++k, filters += panel, ahead += pace) {
    const auto left = load(filters), right = load(filters + lanes);
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + lanes);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const auto x = broadcast(row[i / 3][i % 3 * stride]);
      add_product(sum[i][0], x, left);
      add_product(sum[i][1], x, right);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i += 3) {
      ++row[i / 3];
      asm("" : "+r"(row[i / 3]));  // or the compiler keeps a pointer for each row, more than it has registers (4 % slower)
    }
  }
  end.take(first, sum);
}

// The same for any number of rows, in pieces as even as they go. Each prefetches its share of the `count` elements at
// `ahead`, which are needed next, so that memory is read at one pace all the time.
template <class Element, class End>
void product_of(int64_t rows, const Element* v, int64_t stride, const Element* filters, int64_t c, const Element* ahead, int64_t count,
                const End& end) {
  if (!rows) return;
  const int64_t all = (rows + most_rows - 1) / most_rows, a_step = (count + c - 1) / c;
  const int64_t shares = 4 * all < a_step ? all : (a_step + 3) / 4;  // a pace of 4 elements or more
  const int64_t pace = (a_step + shares - 1) / shares;
  const Element* next = ahead;
  for (int64_t done = 0, pieces = all; pieces; --pieces, next += c * pace) {
    if (next >= ahead + count) next = ahead;
    const int64_t r = (rows - done + pieces - 1) / pieces;
    switch (r) {
#define RF_ROWS(n) \
  case n: \
    product<n>(v + done * stride, stride, filters, c, next, pace, done, end); \
    break;
      RF_ROWS(1) RF_ROWS(2) RF_ROWS(3) RF_ROWS(4) RF_ROWS(5) RF_ROWS(6)
#if LANES == 16
      RF_ROWS(7) RF_ROWS(8) RF_ROWS(9) RF_ROWS(10) RF_ROWS(11) RF_ROWS(12) RF_ROWS(13) RF_ROWS(14)
#endif
#undef RF_ROWS
    }
    done += r;
  }
}

// An end: the sums themselves, [rows, panel], added to those that are there if `more`.
struct Sum {
  float* out;
  bool more;
  void begin(int64_t, int) const {}
  template <int R>
  void take(int64_t first, Vec (&sum)[R][2]) const {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      float* at = out + (first + i) * panel;
      store(at, more ? load(at) + sum[i][0] : sum[i][0]);
      store(at + lanes, more ? load(at + lanes) + sum[i][1] : sum[i][1]);
    }
  }
};

}  // namespace resnet_fast::cpu::ISA
