// Vectors of LANES floats in the compiler's own notation, which it turns into the instructions of the file that includes
// this: avx512.cpp and avx2.cpp define LANES and ISA, a namespace, so that neither can end up with the other's code.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace resnet_fast::cpu::ISA {

constexpr int lanes = LANES, panel = 2 * LANES;

using Vec __attribute__((vector_size(LANES * 4))) = float;
using Bits __attribute__((vector_size(LANES * 4))) = int32_t;
using Words __attribute__((vector_size(LANES * 4))) = uint32_t;
using Halves __attribute__((vector_size(LANES * 2))) = uint16_t;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec broadcast(float x) { return x - Vec{}; }

inline void add_product(Vec& sum, Vec x, Vec filter) { sum += x * filter; }

// bfloat16 is the upper half of a float.
inline Vec load(const uint16_t* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Words) << 16);
}

#ifdef BF16_PAIRS

// Two neighbouring channels, whose products the processor adds up in one instruction.
struct Pair {
  uint16_t channels[2];
};

inline Bits load(const Pair* p) {
  Bits v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Bits broadcast(Pair x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits - Bits{};
}

inline void add_product(Vec& sum, Bits x, Bits filter) { sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)filter); }

inline void store(uint16_t* p, Vec v) {
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof h);
}

#else

// To nearest even; what is NaN stays NaN (rounding could carry its payload into infinity).
inline void store(uint16_t* p, Vec v) {
  const Words bits = (Words)v, nan = (Words)(v != v);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Halves h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), Halves);
  std::memcpy(p, &h, sizeof h);
}

#endif

// max(v, 0), but NaN stays NaN, as in torch.
inline Vec relu(Vec v) { return v < 0.f ? Vec{} : v; }

}  // namespace resnet_fast::cpu::ISA
