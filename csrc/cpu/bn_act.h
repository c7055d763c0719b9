// Training batch norm, residual and ReLU over rows of c channels, a row a pixel: forward and backward, two passes over memory each.
//
//   forward    moments    pivot, sum and sum of squares of x - pivot of one chunk of rows: read x
//              normalise  y = act((x - mean) * scale + shift [+ residual]): read x [and residual], write y
//   backward   sums       of g and of g * (x - mean) of one chunk, g = dy where y > 0 or is NaN: read dy, y and x
//              gradient   dx = scale * (g - level - (x - mean) * slope): read dy, y and x, write dx
// For a residual sums leaves g where its gradient belongs, and gradient reads it there instead of dy and y.
//
// One row after the other, sums in L1: every tensor is read in order, at the speed of memory (several rows at once, to load what belongs
// to a channel once for all, were up to 2.5 times slower). Chunks are cut by the number of rows alone and merged in double in their
// order, so threads change no bit. The pivot is the mean of a chunk's first 8 rows: an outlier among them is in the chunk's variance
// too, so of n rows the shifted sums lose no more than a factor n / 64 to cancellation.
// Source: Ioffe and Szegedy 2015; shifted and merged moments: Chan, Golub and LeVeque 1983.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace resnet_fast::cpu::ISA {

using Yes = std::true_type;
using No = std::false_type;

// A vector of channels, or what is left of them at the end of a row.
struct Whole {
  template <class T>
  Vec load(const T* p) const { return ISA::load(p); }
  template <class T>
  void store(T* p, Vec v) const { ISA::store(p, v); }
};

struct Part {
  int64_t channels;
  template <class T>
  Vec load(const T* p) const {
    T some[lanes] = {};
    std::memcpy(some, p, sizeof(T) * channels);
    return ISA::load(some);
  }
  template <class T>
  void store(T* p, Vec v) const {
    T some[lanes];
    ISA::store(some, v);
    std::memcpy(p, some, sizeof(T) * channels);
  }
};

// step(width, element, channel) for every vector of rows [first, last).
template <class Step>
inline void every(int64_t first, int64_t last, int64_t c, const Step& step) {
  for (int64_t at = first * c; at < last * c; at += c) {
    int64_t i = 0;
    for (; i + lanes <= c; i += lanes) step(Whole{}, at + i, i);
    if (i < c) step(Part{c - i}, at + i, i);
  }
}

// ---------------------------------------------------------------- forward

template <class T>
void moments_of(const BnArgs& a, int64_t first, int64_t last, float* part) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t c = a.c, ahead = last - first < 8 ? last - first : 8;
  float *pivot = part, *sum = part + c, *squares = part + 2 * c;
  std::memset(part, 0, sizeof(float) * 3 * c);
  every(first, first + ahead, c, [&](auto width, int64_t at, int64_t i) {
    width.store(pivot + i, width.load(pivot + i) + width.load(x + at) * (1.f / ahead));
  });
  every(first, last, c, [&](auto width, int64_t at, int64_t i) {
    const Vec away = width.load(x + at) - width.load(pivot + i);
    width.store(sum + i, width.load(sum + i) + away);
    width.store(squares + i, width.load(squares + i) + away * away);
  });
}

template <class T>
void normalise_of(const BnArgs& a, int64_t first, int64_t last) {
  const T *x = static_cast<const T*>(a.x), *residual = static_cast<const T*>(a.residual);
  T* y = static_cast<T*>(a.out);
  const auto all = [&](auto relu, auto add) {
    every(first, last, a.c, [&](auto width, int64_t at, int64_t i) {
      // x * scale - mean * scale would cancel where |mean| is large
      Vec v = (width.load(x + at) - width.load(a.mean + i)) * width.load(a.scale + i) + width.load(a.shift + i);
      if constexpr (add) v += width.load(residual + at);
      width.store(y + at, relu ? ISA::relu(v) : v);
    });
  };
  if (residual) a.relu ? all(Yes(), Yes()) : all(No(), Yes());
  else a.relu ? all(Yes(), No()) : all(No(), No());
}

// ---------------------------------------------------------------- backward

// dy where its output passed the ReLU: where `y` is greater than zero, or NaN.
inline Vec passed(Vec dy, Vec y) { return y <= 0.f ? Vec{} : dy; }

template <class T>
void sums_of(const BnArgs& a, int64_t first, int64_t last, float* part) {
  const T *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y), *dy = static_cast<const T*>(a.dy);
  T* dresidual = static_cast<T*>(a.dresidual);
  float *sum = part, *product = part + a.c;
  std::memset(part, 0, sizeof(float) * 2 * a.c);
  const auto all = [&](auto relu, auto keep) {
    every(first, last, a.c, [&](auto width, int64_t at, int64_t i) {
      Vec g = width.load(dy + at);
      if constexpr (relu) g = passed(g, width.load(y + at));
      if constexpr (keep) width.store(dresidual + at, g);
      width.store(sum + i, width.load(sum + i) + g);
      width.store(product + i, width.load(product + i) + g * (width.load(x + at) - width.load(a.mean + i)));
    });
  };
  if (dresidual) a.relu ? all(Yes(), Yes()) : all(No(), Yes());
  else a.relu ? all(Yes(), No()) : all(No(), No());
}

template <class T>
void gradient_of(const BnArgs& a, int64_t first, int64_t last) {
  const T *x = static_cast<const T*>(a.x), *y = static_cast<const T*>(a.y), *g = static_cast<const T*>(a.dresidual ? a.dresidual : a.dy);
  T* dx = static_cast<T*>(a.out);
  const auto all = [&](auto relu) {
    every(first, last, a.c, [&](auto width, int64_t at, int64_t i) {
      Vec d = width.load(g + at);
      if constexpr (relu) d = passed(d, width.load(y + at));
      const Vec away = width.load(x + at) - width.load(a.mean + i);
      width.store(dx + at, width.load(a.scale + i) * (d - width.load(a.level + i) - away * width.load(a.slope + i)));
    });
  };
  a.relu && !a.dresidual ? all(Yes()) : all(No());
}

// ---------------------------------------------------------------- merging chunks, in double

// Of channels [c0, c1): their mean and biased variance.
inline void merge_moments(const float* parts, int64_t rows, int64_t chunk, int64_t c, int64_t c0, int64_t c1, float* mean, float* var) {
  constexpr int64_t block = 64;
  for (; c0 < c1; c0 += block) {
    const int64_t width = c1 - c0 < block ? c1 - c0 : block;
    double middle[block] = {}, spread[block] = {};
    for (int64_t row = 0; row < rows; row += chunk) {
      const float *pivot = parts + row / chunk * 3 * c + c0, *sum = pivot + c;
      const double n = double(row + chunk < rows ? chunk : rows - row);
      for (int64_t i = 0; i < width; ++i) middle[i] += n * pivot[i] + sum[i];
    }
    for (int64_t i = 0; i < width; ++i) middle[i] /= double(rows);
    for (int64_t row = 0; row < rows; row += chunk) {
      const float *pivot = parts + row / chunk * 3 * c + c0, *sum = pivot + c, *squares = sum + c;
      const double n = double(row + chunk < rows ? chunk : rows - row), inverse = 1. / n;
      for (int64_t i = 0; i < width; ++i) {
        const double s = sum[i], away = pivot[i] + s * inverse - middle[i];
        spread[i] += (squares[i] - s * s * inverse) + n * away * away;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      mean[c0 + i] = float(middle[i]);
      var[c0 + i] = spread[i] < 0 ? 0.f : float(spread[i] / double(rows));  // NaN stays
    }
  }
}

// Of channels [c0, c1): the sums over all chunks.
inline void merge_sums(const float* parts, int64_t chunks, int64_t c, int64_t c0, int64_t c1, double* sum, double* product) {
  for (int64_t i = c0; i < c1; ++i) sum[i] = product[i] = 0;
  for (int64_t k = 0; k < chunks; ++k, parts += 2 * c)
    for (int64_t i = c0; i < c1; ++i) sum[i] += parts[i], product[i] += parts[c + i];
}

inline void moments(const BnArgs& a, int64_t first, int64_t last, float* part) {
  a.bf16 ? moments_of<uint16_t>(a, first, last, part) : moments_of<float>(a, first, last, part);
}

inline void normalise(const BnArgs& a, int64_t first, int64_t last) {
  a.bf16 ? normalise_of<uint16_t>(a, first, last) : normalise_of<float>(a, first, last);
}

inline void sums(const BnArgs& a, int64_t first, int64_t last, float* part) {
  a.bf16 ? sums_of<uint16_t>(a, first, last, part) : sums_of<float>(a, first, last, part);
}

inline void gradient(const BnArgs& a, int64_t first, int64_t last) {
  a.bf16 ? gradient_of<uint16_t>(a, first, last) : gradient_of<float>(a, first, last);
}

}  // namespace resnet_fast::cpu::ISA
