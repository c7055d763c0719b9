// Hopper's primitives against naive loops, and what the emulation must notice. Prints the first thing that is wrong.
#include <string>

#include "cuda/hopper.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile.h"
#include "expect.h"

using namespace resnet_fast;

namespace {

// One block; what the emulation says of it ("" if nothing is wrong).
template <class F>
std::string run(int threads, F&& body, unsigned seed = 1, bool late = true, unsigned cluster = 1) {
  host_cuda::settings = {seed, 1, late, 0, host_cuda::kHopperShared};
  const cudaError_t error = host_cuda::run_grid(dim3(cluster), dim3(unsigned(threads)), host_cuda::kHopperShared, body,
                                                cluster);
  EXPECT((error == cudaSuccess) == (host_cuda::message[0] == 0), "error %d", int(error));
  return host_cuda::message;
}

void expect_said(const char* expected, const std::string& said) {
  EXPECT(expected[0] == 0 ? said.empty() : said.find(expected) != std::string::npos, "\"%s\", not \"%s\"", said.c_str(),
         expected);
}

uint64_t* barriers() { return reinterpret_cast<uint64_t*>(hopper_shared() + 200 * 1024); }

void init_barriers(int count, unsigned arrivals) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) mbarrier_init(barriers() + i, arrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
}

std::vector<__half> numbers(size_t count) {
  std::vector<__half> all(count);
  std::mt19937 random(7);
  for (auto& value : all) value = __float2half_rn(float(random() % 4096) / 1024.f - 2.f);
  return all;
}

void check_descriptor() {
  // By the table of PTX ISA: 0-13 start, 16-29 leading offset, 32-45 stride (all >> 4), 49-51 base offset, 62-63 mode.
  for (uint32_t start : {0u, 1024u, 32u, 128u * 57 + 96, 227u * 1024 - 1024})
    for (int stride : {1024, 2048, 7296}) {
      const uint64_t d = matrix_descriptor(start, stride);
      EXPECT((d & 0x3fff) * 16 == start && (d >> 14 & 3) == 0, "start %u", start);
      EXPECT((d >> 32 & 0x3fff) * 16 == uint64_t(stride) && (d >> 46 & 7) == 0, "stride %d", stride);
      EXPECT(d >> 62 == 1 && (d >> 49 & 0x1fff) == 0, "128-byte swizzle, no base offset");
      for (int bytes : {32, 64, 96, 128, 8192})
        EXPECT(further_descriptor(d, bytes) == matrix_descriptor(start + bytes, stride), "%d bytes from %u", bytes, start);
    }
}

void check_map_limits() {
  alignas(64) CUtensorMap map;
  auto data = numbers(64);
  void* at = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(data.data()) + 15) / 16 * 16);
  const auto encode = [&](const void* p, uint64_t rows, uint64_t stride, uint32_t columns_box, uint32_t rows_box) {
    return encode_tensor_map(map, DType::f16, p, {8, rows}, {stride}, {columns_box, rows_box}) == cudaSuccess;
  };
  EXPECT(encode(at, 4, 16, 64, 256), "a small tensor and the largest box");
  EXPECT(!encode(static_cast<char*>(at) + 8, 4, 16, 64, 64), "an unaligned address");
  EXPECT(!encode(at, 4, 24, 64, 64), "a stride that is no multiple of 16");
  EXPECT(!encode(at, 4, uint64_t(1) << 40, 64, 64), "a stride too large");
  EXPECT(!encode(at, 4, 16, 128, 64), "a box wider than the swizzle");
  EXPECT(!encode(at, 4, 16, 64, 257), "a box too high");
  EXPECT(!encode(at, 4, 16, 12, 64), "rows of a box that are no multiple of 16 bytes");
  EXPECT(!encode(at, 0, 16, 64, 64), "an empty tensor");
}

// A box of a 4-D tensor, partly outside on every side, lands where swizzled() says; stored again, it is clipped.
void check_copies(bool late) {
  constexpr int kC = 72, kW = 5, kH = 7, kN = 3, kBox[4] = {64, 4, 3, 2}, kRows = 24;
  const auto x = numbers(size_t(kC) * kW * kH * kN + 8);
  const auto* from = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(x.data()) + 15) / 16 * 16);
  std::vector<__half> out(x.size());
  auto* to = reinterpret_cast<__half*>((reinterpret_cast<uintptr_t>(out.data()) + 15) / 16 * 16);
  CUtensorMap read, write;
  const uint64_t size[4] = {kC, kW, kH, kN}, stride[3] = {kC * 2, kC * kW * 2, kC * kW * kH * 2};
  EXPECT(encode_tensor_map(read, DType::f16, from, size, stride, {64, 4, 3, 2}) == cudaSuccess, "read");
  EXPECT(encode_tensor_map(write, DType::f16, to, size, stride, {64, 4, 3, 2}) == cudaSuccess, "write");
  for (const auto& at : {std::array<int, 4>{0, 0, 0, 0}, {64, -1, -2, 1}, {-8, 3, 5, 2}, {80, 0, 0, 0}, {0, 5, 0, -1}}) {
    for (auto& value : out) value = __float2half_rn(9.f);
    const auto said = run(32, [&] {
      init_barriers(1, 1);
      if (threadIdx.x == 0) {
        mbarrier_expect(barriers(), kRows * 128);
        tma_load(hopper_shared() + 1024, &read, barriers(), {at[0], at[1], at[2], at[3]});
      }
      mbarrier_wait(barriers(), 0);
      if (threadIdx.x == 1) {
        tma_store(&write, hopper_shared() + 1024, {at[0], at[1], at[2], at[3]});
        tma_store_commit();
        tma_store_wait<0>();
      }
    }, 1, late);
    expect_said("", said);
    for (int i = 0; i < kRows * kBox[0]; ++i) {
      const int c = at[0] + i % 64, w = at[1] + i / 64 % kBox[1], h = at[2] + i / 64 / kBox[1] % kBox[2];
      const int n = at[3] + i / 64 / kBox[1] / kBox[2];
      const bool inside = c >= 0 && c < kC && w >= 0 && w < kW && h >= 0 && h < kH && n >= 0 && n < kN;
      const auto* landed = reinterpret_cast<const __half*>(hopper_shared() + 1024 + swizzled(i / 64, i % 64 / 8));
      const float expected = inside ? __half2float(from[((n * kH + h) * kW + w) * kC + c]) : 0.f;
      EXPECT(__half2float(landed[i % 8]) == expected, "channel %d of row %d", i % 64, i / 64);
    }
    for (int i = 0; i < kC * kW * kH * kN; ++i) {
      const int c = i % kC - at[0], w = i / kC % kW - at[1], h = i / kC / kW % kH - at[2], n = i / kC / kW / kH - at[3];
      const bool boxed = c >= 0 && c < 64 && w >= 0 && w < kBox[1] && h >= 0 && h < kBox[2] && n >= 0 && n < kBox[3];
      EXPECT(__half2float(to[i]) == (boxed ? __half2float(from[i]) : 9.f), "element %d written back", i);
    }
  }
}

// Rows of an im2col map, from a pixel that the stride takes on, over the ends of lines and images and past the last.
void check_im2col(int stride_h, int stride_w, bool late) {
  constexpr int kC = 72, kW = 9, kH = 6, kN = 3, kRows = 24;
  const auto x = numbers(size_t(kC) * kW * kH * kN + 8);
  const auto* from = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(x.data()) + 15) / 16 * 16);
  CUtensorMap map;
  EXPECT(encode_im2col_map(map, DType::f16, from, kN, kH, kW, kC, stride_h, stride_w, kRows) == cudaSuccess, "map");
  std::vector<int> taken;  // pixels, as they lie in memory
  for (int pixel = 0; pixel < kN * kH * kW; ++pixel)
    if (pixel % kW % stride_w == 0 && pixel / kW % kH % stride_h == 0) taken.push_back(pixel);
  EXPECT(int(taken.size()) == kN * int(ceil_div(kH, stride_h) * ceil_div(kW, stride_w)), "as many as the header says");
  for (int first = 0; first <= int(taken.size()); ++first)
    for (int channel : {0, 64}) {
      const int pixel = first < int(taken.size()) ? taken[first] : kN * kH * kW;  // the image behind the last
      expect_said("", run(32, [&] {
        init_barriers(1, 1);
        if (threadIdx.x == 0) {
          mbarrier_expect(barriers(), kRows * 128);
          tma_load_im2col(hopper_shared() + 1024, &map, barriers(), {channel, pixel % kW, pixel / kW % kH, pixel / kW / kH});
        }
        mbarrier_wait(barriers(), 0);
      }, 1, late));
      for (int i = 0; i < kRows * 64; ++i) {
        const int row = first + i / 64, c = channel + i % 64;
        const auto* landed = reinterpret_cast<const __half*>(hopper_shared() + 1024 + swizzled(i / 64, i % 64 / 8));
        const float expected = row < int(taken.size()) && c < kC ? __half2float(from[taken[row] * kC + c]) : 0.f;
        EXPECT(__half2float(landed[i % 8]) == expected, "channel %d of row %d, strides %d and %d", c, row, stride_h, stride_w);
      }
    }
}

// Products of tiles as TMA lays them down, from any row and any multiple of 16 columns, with rows of A in groups of
// eight that need not follow each other (a halo's lines).
template <int N>
void check_product(int first_row, int first_k, int stride_rows) {
  const auto a = numbers(256 * 64 + 8), b = numbers(N * 64 + 8);
  const auto* pa = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(a.data()) + 15) / 16 * 16);
  const auto* pb = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(b.data()) + 15) / 16 * 16);
  CUtensorMap map_a, map_b;
  EXPECT(encode_tensor_map(map_a, DType::f16, pa, {64, 256}, {128}, {64, 256}) == cudaSuccess, "a");
  EXPECT(encode_tensor_map(map_b, DType::f16, pb, {64, N}, {128}, {64, N}) == cudaSuccess, "b");
  std::vector<float> d(64 * N, -1.f);
  const auto said = run(128, [&] {
    unsigned char *tile_a = hopper_shared(), *tile_b = tile_a + 256 * 128;
    init_barriers(1, 1);
    if (threadIdx.x == 0) {
      mbarrier_expect(barriers(), (256 + N) * 128);
      tma_load(tile_a, &map_a, barriers(), {0, 0});
      tma_load(tile_b, &map_b, barriers(), {0, 0});
    }
    mbarrier_wait(barriers(), 0);
    float sum[N / 2];
    for (float& value : sum) value = 100.f;
    wgmma_fence();
    for (int k = first_k; k < 64; k += 16)
      wgmma<__half, N>(sum, matrix_descriptor(shared_address(tile_a) + first_row * 128 + k * 2, stride_rows * 128),
                       matrix_descriptor(shared_address(tile_b) + k * 2), k != first_k);
    wgmma_commit();
    EXPECT(sum[0] == 100.f, "a product before it was waited for");
    wgmma_wait<0>();
    for (int pair = 0; pair < N / 4; ++pair) {  // as hopper.cuh says
      const int t = threadIdx.x, row = 16 * (t / 32) + t % 32 / 4 + pair % 2 * 8, column = pair / 2 * 8 + 2 * (t % 4);
      for (int i = 0; i < 2; ++i) d[row * N + column + i] = sum[2 * pair + i];
    }
  });
  expect_said("", said);
  for (int i = 0; i < 64; ++i)
    for (int j = 0; j < N; ++j) {
      double expected = 0;
      const __half* row = pa + (first_row + i / 8 * stride_rows + i % 8) * 64;
      for (int k = first_k; k < 64; ++k) expected += double(__half2float(row[k])) * double(__half2float(pb[j * 64 + k]));
      EXPECT(std::abs(d[i * N + j] - expected) < 1e-4, "%d, %d of n%d from row %d", i, j, N, first_row);
    }
}

// Each block of a cluster loads one half of a tile into both; the other says when it has seen it.
void check_cluster() {
  const auto x = numbers(64 * 64 + 8);
  const auto* from = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(x.data()) + 15) / 16 * 16);
  CUtensorMap map;
  EXPECT(encode_tensor_map(map, DType::f16, from, {64, 64}, {128}, {64, 32}) == cudaSuccess, "map");
  const auto kernel = [&](bool wait) {
    return [&map, from, wait] {
      const unsigned rank = cluster_rank();
      if (threadIdx.x == 0) {
        mbarrier_init(barriers(), 1);
        mbarrier_init(barriers() + 1, 2);
        mbarrier_init_fence();
      }
      cluster_sync();
      if (threadIdx.x == 0) {
        mbarrier_expect(barriers(), 64 * 128);
        tma_load_multicast(hopper_shared() + rank * 4096, &map, barriers(), {0, int(rank) * 32}, 3);
      }
      mbarrier_wait(barriers(), 0);
      for (int row : {int(threadIdx.x), int(threadIdx.x) + 32}) {
        const auto* landed = reinterpret_cast<const __half*>(hopper_shared() + swizzled(row, 7));
        EXPECT(__half2float(*landed) == __half2float(from[row * 64 + 56]), "block %u, row %d", rank, row);
      }
      if (threadIdx.x < 2) mbarrier_arrive_at(barriers() + 1, threadIdx.x);
      mbarrier_wait(barriers() + 1, 0);
      if (wait) cluster_sync();
      if (!wait && rank == 0 && threadIdx.x == 0) mbarrier_arrive_at(barriers() + 1, 1);
    };
  };
  for (const bool late : {true, false}) expect_said("", run(32, kernel(true), 1, late, 2));
  bool noticed = false;  // in some order the other block has ended before
  for (unsigned seed = 0; seed < 16; ++seed)
    noticed = noticed || run(32, kernel(false), seed, true, 2).find("of a block that has ended") != std::string::npos;
  EXPECT(noticed, "a block that ends before the other is done with it");
}

// A block reads what the other had written before a barrier that publishes it, and only that.
void check_it_sees_what_is_published() {
  const auto read = [](bool publish, bool write_again) {
    return run(32, [publish, write_again] {
      auto* mine = reinterpret_cast<float*>(hopper_shared()) + 4 * threadIdx.x;
      for (int i = 0; i < 4; ++i) mine[i] = float(4 * threadIdx.x + i + 1000 * cluster_rank());
      publish ? cluster_sync() : cluster_sync_relaxed();
      if (write_again) {
        mine[0] = -1.f;
        cluster_sync_relaxed();
      }
      const unsigned other = 1 - cluster_rank();
      EXPECT(load_from_block(reinterpret_cast<const float4*>(mine), other).w == float(4 * threadIdx.x + 3 + 1000 * other), "%u", other);
      cluster_sync_relaxed();
    }, 1, true, 2);
  };
  expect_said("", read(true, false));
  expect_said("has not published", read(false, false));
  expect_said("has not published", read(true, true));
}

// What a kernel can get wrong, and how the emulation says so.
void check_it_notices() {
  const auto data = numbers(64 * 64 + 8);
  const auto* from = reinterpret_cast<const __half*>((reinterpret_cast<uintptr_t>(data.data()) + 15) / 16 * 16);
  CUtensorMap map;
  EXPECT(encode_tensor_map(map, DType::f16, from, {64, 64}, {128}, {64, 64}) == cudaSuccess, "map");
  const auto load = [&](unsigned char* to, unsigned bytes, int parity) {
    return run(32, [&map, to, bytes, parity] {
      init_barriers(1, 1);
      if (threadIdx.x == 0) {
        mbarrier_expect(barriers(), bytes);
        tma_load(to, &map, barriers(), {0, 0});
      }
      mbarrier_wait(barriers(), unsigned(parity));
    });
  };
  CUtensorMap images, none;  // of 8x8 pixels
  EXPECT(encode_im2col_map(images, DType::f16, from, 1, 8, 8, 64, 2, 2, 64) == cudaSuccess, "map");
  EXPECT(encode_im2col_map(none, DType::f16, from, 1, 8, 8, 64, 2, 9, 64) != cudaSuccess, "a stride too large");
  EXPECT(encode_im2col_map(none, DType::f16, from, 1, 8, 8, 64, 2, 2, 1025) != cudaSuccess, "too many rows");
  EXPECT(encode_im2col_map(none, DType::f16, from, 1, 8, 8, 60, 2, 2, 64) != cudaSuccess, "pixels that end amid 16 bytes");
  const auto load_pixels = [&](const CUtensorMap& by, int w) {
    return run(32, [&by, w] {
      init_barriers(1, 1);
      if (threadIdx.x == 0) tma_load_im2col(hopper_shared(), &by, barriers(), {0, w, 0, 0});
    }, 1, false);
  };
  expect_said("outside of its bounding box", load_pixels(images, 8));
  expect_said("a map of the other", load_pixels(map, 0));
  expect_said("a map of the other", run(32, [&images] { tma_store(&images, hopper_shared(), {0, 0, 0, 0}); }));
  expect_said("", load(hopper_shared(), 8192, 0));
  expect_said("deadlock", load(hopper_shared(), 8190, 0));
  expect_said("deadlock", load(hopper_shared(), 8194, 0));
  expect_said("before its copies had landed", load(hopper_shared(), 8192, 1));  // passes at once
  expect_said("no multiple of 1024", load(hopper_shared() + 128, 8192, 0));
  expect_said("outside shared", load(hopper_shared() + 224 * 1024, 8192, 0));
  expect_said("before the fence", run(32, [] {
    if (threadIdx.x == 0) mbarrier_init(barriers(), 1);
    __syncthreads();
    mbarrier_wait(barriers(), 1);
  }));
  expect_said("not initialised", run(32, [] { mbarrier_wait(barriers(), 0); }));
  expect_said("deadlock", run(32, [] {  // two arrivals wanted, one comes
    init_barriers(1, 2);
    if (threadIdx.x == 0) mbarrier_arrive(barriers());
    mbarrier_wait(barriers(), 0);
  }));
  expect_said("deadlock", run(64, [] {
    if (threadIdx.x != 5) named_barrier(1, 64);
  }));
  expect_said("without fence.proxy.async", run(32, [] { store_for_async(hopper_shared() + 4 * threadIdx.x, 1); }));
  const auto store = [&](bool wait) {
    return run(32, [&map, wait] {
      if (threadIdx.x != 0) return;
      tma_store(&map, hopper_shared(), {64, 0});
      tma_store_commit();
      if (wait) tma_store_wait_read<0>();
    });
  };
  expect_said("", store(true));
  expect_said("before a store had read", store(false));
  const auto product = [&](bool fence, bool commit, bool wait) {
    return run(128, [fence, commit, wait] {
      std::memset(hopper_shared(), 0, 8192);
      float sum[32];
      if (fence) wgmma_fence();
      wgmma<__half, 64>(sum, matrix_descriptor(0), matrix_descriptor(0), false);
      if (commit) wgmma_commit();
      if (wait) wgmma_wait<0>();
    });
  };
  expect_said("", product(true, true, true));
  expect_said("without wgmma.fence", product(false, true, true));
  expect_said("in flight", product(true, false, true));
  expect_said("in flight", product(true, true, false));
  expect_said("warps of a warp group disagree", run(128, [] {
    std::memset(hopper_shared(), 0, 8192);
    float sum[32];
    wgmma_fence();
    wgmma<__half, 64>(sum, matrix_descriptor(threadIdx.x < 64 ? 0 : 32), matrix_descriptor(0), false);
    wgmma_commit();
    wgmma_wait<0>();
  }));
  const auto registers = [](auto down, auto up) {
    return run(384, [down, up] {
      if (threadIdx.x < 128) {
        registers_down<decltype(down)::value>();
      } else {
        registers_up<decltype(up)::value>();
      }
    });
  };
  expect_said("", registers(std::integral_constant<int, 40>{}, std::integral_constant<int, 232>{}));
  expect_said("deadlock", registers(std::integral_constant<int, 40>{}, std::integral_constant<int, 240>{}));
  expect_said("some warps", run(384, [] {
    if (threadIdx.x < 96) registers_down<40>();
  }));
}

}  // namespace

int main() {
  cudaSetDevice(0);
  check_descriptor();
  check_map_limits();
  check_copies(true), check_copies(false);
  for (int stride_h : {1, 2, 8})
    for (int stride_w : {1, 2, 5}) check_im2col(stride_h, stride_w, stride_h != 2);
  check_product<64>(0, 0, 8), check_product<128>(0, 0, 8), check_product<256>(0, 0, 8);
  for (int row : {1, 7, 8, 30, 59}) check_product<64>(row, row % 4 * 16, 8);
  check_product<128>(3, 16, 10), check_product<64>(13, 32, 30);
  check_cluster();
  check_it_sees_what_is_published();
  check_it_notices();
  return 0;
}
