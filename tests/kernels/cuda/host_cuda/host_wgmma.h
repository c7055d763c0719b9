// wgmma, emulated. Descriptors and fragments are taken apart here a second time, straight from the PTX ISA ("Matrix
// Descriptor Format", "Register Fragments"), and not by matrix_descriptor.h, which this is to test. A product happens when
// it is waited for: until then accumulators are as they were, and tiles may be overwritten by whoever does not wait.
#pragma once

#include <algorithm>

#include "host_ptx.h"

namespace host_cuda {

struct Product {
  uint64_t a, b;
  int n;
  bool half, add;
  float* d;
  const uint32_t* rows = nullptr;  // where a lane holds its part of A, instead of descriptor a: looked at when taken
  bool same(const Product& o) const {
    return a == o.a && b == o.b && n == o.n && half == o.half && add == o.add && (rows == nullptr) == (o.rows == nullptr);
  }
};

// Warps are on their own: a warp's quarter of a product is taken when that warp waits for it, whatever the group's other
// three have come to. So a product is no barrier between warps.
struct WgmmaWarp {
  uint64_t serial = 0;                                       // of the block this is the state of
  std::array<std::vector<std::vector<Product>>, 32> groups;  // by lane; all but a lane's last are committed
  std::array<bool, 32> fenced{};
  std::vector<Product> taken;  // what lane 0 has multiplied
  unsigned round = 0, arrived = 0;
  int wait = 0;
};

inline std::array<WgmmaWarp, 32> wgmma_warps;

inline void check_wgmma_warps() {
  for (size_t i = 0; i < wgmma_warps.size(); ++i) {
    const WgmmaWarp& warp = wgmma_warps[i];
    if (warp.serial != block.serial) continue;
    for (const auto& lane : warp.groups)
      if (lane.size() != 1 || !lane.front().empty()) fail("the block ended with matrix products in flight");
    for (size_t other = i / 4 * 4; other < i / 4 * 4 + 4; ++other) {
      const auto& theirs = wgmma_warps[other].taken;
      if (wgmma_warps[other].serial != block.serial || theirs.size() != warp.taken.size() ||
          !std::equal(theirs.begin(), theirs.end(), warp.taken.begin(), [](const auto& x, const auto& y) { return x.same(y); }))
        fail("warps of a warp group disagree on their products");
    }
  }
}

inline WgmmaWarp& wgmma_warp() {
  WgmmaWarp& warp = wgmma_warps[size_t(block.current / 32)];
  if (warp.serial != block.serial) {
    warp = WgmmaWarp{};
    warp.serial = block.serial;
    for (auto& lane : warp.groups) lane.resize(1);
    hopper();  // sets the other checks
    block.at_end = [] {
      check_end_of_block();
      check_wgmma_warps();
    };
  }
  return warp;
}

// Element (row, k) of a K-major matrix of 16-bit elements: rows of 128 bytes in patterns of eight.
inline const unsigned char* matrix_element(uint64_t descriptor, int row, int k) {
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint64_t base = descriptor >> 49 & 7, mode = descriptor >> 62;
  if (mode != 1) fail("wgmma without 128-byte swizzle: not emulated");
  if (start % 128 + 32 > 128) fail("wgmma whose 16 columns leave their row of 128 bytes");
  const uint64_t address = start + uint64_t(row / 8) * stride + uint64_t(row % 8) * 128 + uint64_t(k) * 2;
  if (address + 2 > shared_bytes) fail("wgmma outside shared memory");
  return shared_memory + (address ^ (((address >> 7) - base) & 7) << 4);
}

// Element (row, k) of a warp's 16 x 16 of A in its lanes' registers.
inline const unsigned char* row_element(const WgmmaWarp& warp, size_t which, int row, int k) {
  const uint32_t* held = warp.groups[size_t(row % 8 * 4 + k % 8 / 2)].front()[which].rows;
  if (held == nullptr) fail("lanes of a warp disagree on a product");
  return reinterpret_cast<const unsigned char*>(held + k / 8 * 2 + row / 8) + k % 2 * 2;
}

inline float element_as_float(const unsigned char* at, bool half) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return half ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

__attribute__((optimize("O3"), no_sanitize("undefined"))) inline void multiply(WgmmaWarp& warp, int quarter, size_t which) {
  const Product first = warp.groups[0].front()[which];
  static float a[16][16], b[16][256], d[16][256];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i)
      a[i][k] = element_as_float(first.rows != nullptr ? row_element(warp, which, i, k)
                                                       : matrix_element(first.a, 16 * quarter + i, k), first.half);
    for (int j = 0; j < first.n; ++j) b[k][j] = element_as_float(matrix_element(first.b, j, k), first.half);
  }
  for (int i = 0; i < 16; ++i) {
    double sum[256] = {};
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < first.n; ++j) sum[j] += double(a[i][k]) * double(b[k][j]);
    for (int j = 0; j < first.n; ++j) d[i][j] = float(sum[j]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& product = warp.groups[size_t(lane)].front()[which];
    if (!product.same(first)) fail("lanes of a warp disagree on a product");
    for (int i = 0; i < first.n / 2; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      product.d[i] = first.add ? product.d[i] + d[row][column] : d[row][column];
    }
  }
  warp.taken.push_back(first);
}

inline void multiply_all_but(WgmmaWarp& warp, int quarter, size_t last) {
  for (const auto& lane : warp.groups)
    if (lane.size() != warp.groups[0].size()) fail("lanes of a warp disagree on their wgmma groups");
  while (warp.groups[0].size() > last + 1) {
    for (const auto& lane : warp.groups)
      if (lane.front().size() != warp.groups[0].front().size()) fail("lanes of a warp disagree on their products");
    for (size_t i = 0; i < warp.groups[0].front().size(); ++i) multiply(warp, quarter, i);
    for (auto& lane : warp.groups) lane.erase(lane.begin());
  }
}

}  // namespace host_cuda

namespace resnet_fast {

inline void wgmma_fence() { host_cuda::wgmma_warp().fenced[size_t(host_cuda::block.current % 32)] = true; }

// Stricter than PTX, which wants a fence only where registers were touched (that cannot be seen here): one before every
// group of products.
inline void wgmma_commit() {
  host_cuda::WgmmaWarp& warp = host_cuda::wgmma_warp();
  warp.groups[size_t(host_cuda::block.current % 32)].emplace_back();
  warp.fenced[size_t(host_cuda::block.current % 32)] = false;
}

inline void start(const host_cuda::Product& product) {
  host_cuda::WgmmaWarp& warp = host_cuda::wgmma_warp();
  const size_t lane = size_t(host_cuda::block.current % 32);
  if (!warp.fenced[lane]) host_cuda::fail("wgmma without wgmma.fence before it");
  warp.groups[lane].back().push_back(product);
}

template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0);
  start({a, b, N, std::is_same_v<T, __half>, add, d});
}

template <class T, int N>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0);
  start({0, b, N, std::is_same_v<T, __half>, add, d, a});
}

template <int N>
void wgmma_wait() {
  host_cuda::WgmmaWarp& warp = host_cuda::wgmma_warp();
  if (warp.arrived != 0 && warp.wait != N) host_cuda::fail("lanes of a warp wait for different products");
  warp.wait = N;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    host_cuda::multiply_all_but(warp, host_cuda::block.current / 32 % 4, N);
    ++warp.round;
  } else {
    host_cuda::wait_for(warp.round);
  }
}

template <int N, class Sums>
void wgmma_wait(Sums&) {
  wgmma_wait<N>();
}

}  // namespace resnet_fast
