// wgmma, emulated. Descriptors and fragments are taken apart here a second time, straight from the PTX ISA ("Matrix
// Descriptor Format", "Register Fragments"), and not by matrix_descriptor.h, which this is to test. A product happens when
// it is waited for: until then accumulators are as they were, and tiles may be overwritten by whoever does not wait.
#pragma once

#include "host_ptx.h"

namespace host_cuda {

struct Product {
  uint64_t a, b;
  int n;
  bool half, add;
  float* d;
  bool same(const Product& o) const { return a == o.a && b == o.b && n == o.n && half == o.half && add == o.add; }
};

struct WarpGroup {
  uint64_t serial = 0;
  std::array<std::vector<std::vector<Product>>, 128> groups;  // by thread; all but a thread's last are committed
  std::array<bool, 128> fenced{};
  unsigned round = 0, arrived = 0;
  int wait = 0;
};

inline std::array<WarpGroup, 8> warp_groups;

inline void check_warp_groups() {
  for (const WarpGroup& group : warp_groups) {
    if (group.serial != block.serial) continue;
    for (const auto& thread : group.groups)
      if (thread.size() != 1 || !thread.front().empty()) fail("the block ended with matrix products in flight");
  }
}

inline WarpGroup& warp_group() {
  WarpGroup& group = warp_groups[size_t(block.current / 128)];
  if (group.serial != block.serial) {
    group = WarpGroup{};
    group.serial = block.serial;
    for (auto& thread : group.groups) thread.resize(1);
    hopper();  // sets the other checks
    block.at_end = [] {
      check_end_of_block();
      check_warp_groups();
    };
  }
  return group;
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

inline float element_as_float(const unsigned char* at, bool half) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  return half ? __half2float(__half{bits}) : __bfloat162float(__nv_bfloat16{bits});
}

__attribute__((optimize("O3"), no_sanitize("undefined"))) inline void multiply(WarpGroup& group, size_t which) {
  const Product first = group.groups[0].front()[which];
  static float a[64][16], b[16][256], d[64][256];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 64; ++i) a[i][k] = element_as_float(matrix_element(first.a, i, k), first.half);
    for (int j = 0; j < first.n; ++j) b[k][j] = element_as_float(matrix_element(first.b, j, k), first.half);
  }
  for (int i = 0; i < 64; ++i) {
    double sum[256] = {};
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < first.n; ++j) sum[j] += double(a[i][k]) * double(b[k][j]);
    for (int j = 0; j < first.n; ++j) d[i][j] = float(sum[j]);
  }
  for (int thread = 0; thread < 128; ++thread) {
    const Product& product = group.groups[size_t(thread)].front()[which];
    if (!product.same(first)) fail("threads of a warp group disagree on a product");
    for (int i = 0; i < first.n / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      product.d[i] = first.add ? product.d[i] + d[row][column] : d[row][column];
    }
  }
}

inline void multiply_all_but(WarpGroup& group, size_t last) {
  for (const auto& thread : group.groups)
    if (thread.size() != group.groups[0].size()) fail("threads of a warp group disagree on their wgmma groups");
  while (group.groups[0].size() > last + 1) {
    for (const auto& thread : group.groups)
      if (thread.front().size() != group.groups[0].front().size()) fail("threads of a warp group disagree on products");
    for (size_t i = 0; i < group.groups[0].front().size(); ++i) multiply(group, i);
    for (auto& thread : group.groups) thread.erase(thread.begin());
  }
}

}  // namespace host_cuda

namespace resnet_fast {

inline void wgmma_fence() { host_cuda::warp_group().fenced[size_t(host_cuda::block.current % 128)] = true; }

// Stricter than PTX, which wants a fence only where registers were touched (that cannot be seen here): one before every
// group of products.
inline void wgmma_commit() {
  host_cuda::WarpGroup& group = host_cuda::warp_group();
  group.groups[size_t(host_cuda::block.current % 128)].emplace_back();
  group.fenced[size_t(host_cuda::block.current % 128)] = false;
}

template <class T, int N>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(N >= 8 && N <= 256 && N % 8 == 0);
  host_cuda::WarpGroup& group = host_cuda::warp_group();
  const size_t thread = size_t(host_cuda::block.current % 128);
  if (!group.fenced[thread]) host_cuda::fail("wgmma without wgmma.fence before it");
  group.groups[thread].back().push_back({a, b, N, std::is_same_v<T, __half>, add, d});
}

template <int N>
void wgmma_wait() {
  host_cuda::WarpGroup& group = host_cuda::warp_group();
  if (group.arrived != 0 && group.wait != N) host_cuda::fail("threads of a warp group wait for different products");
  group.wait = N;
  if (++group.arrived == 128) {
    group.arrived = 0;
    host_cuda::multiply_all_but(group, N);
    ++group.round;
  } else {
    host_cuda::wait_for(group.round);
  }
}

}  // namespace resnet_fast
