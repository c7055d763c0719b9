// A bottleneck from its 3x3 on, and the next one's first 1x1, over NHWC on Hopper; batch norm is folded, all ReLU:
//
//   m[p, j] = relu(sum_{r, s, c} x[p + (r - 1, s - 1), c] * two[j, r, s, c] + bias2[j]),   x = 0 outside the image
//   y[p, k] = relu(sum_j m[p, j] * three[k, j] + bias3[k] + residual[p, k])    projected: + sum_c residual[p, c] * projection[k, c]
//   z[p, l] = relu(sum_k y[p, k] * one[l, k] + bias1[l])
//
// Layout: activations NHWC, filters KRSC, dense, 16-byte aligned, channels multiples of 8: up to 64 of x, m and a projected
// residual, 256 of y, 128 of z (64 of a projected one's); float16 or bfloat16, biases float32; float32 accumulation and
// epilogues; m, y and z are rounded once. sm_90a only.
//
// m never leaves registers, and y is written but not read again: of a ResNet's first stage that is 3/8 of all bytes. All
// filters stay in shared memory (136 or 168 kB of 227), so a block is persistent. A multiplying warp group has a tile of
// 8 x 8 pixels, rows of its products: the 3x3 comes first, so only x needs a halo, which TMA brings once (10 x 10 pixels);
// a tap is a shift of the matrix descriptor by pixels, eight rows of a product are a row of the tile. Sums, rounded, are in
// the registers where the next product takes its rows from: m is multiplied by 64 filters of y at a time, and these 64
// channels of y, rounded and on their way out, by `one` into sums that are kept until z is finished. Beside each group a
// warp moves its data: the next tile's pixels once the 3x3 has read the present ones, residuals ahead into slots of 64
// channels, in which y and z replace them and leave. So a group waits for nothing but what is late, and no two groups,
// nor the warps of one, wait for each other.
//
// For the DOUBT about matrices that begin inside a pattern of eight rows see conv_hopper.cu: here every eight rows do.
//
// Floor, for P pixels: max(2 P (C + residual's + K + L) bytes + filters / DRAM, 2 P (9 C J + J K + K L [+ C' K]) / matrix
// units). PREDICTED, nothing of it measured, for the first stage of ResNet-50 at 224^2, batch 256, on an H200 (roofline.py:
// 4.3 TB/s, 790 TFLOP/s), in microseconds. "shared": bytes that products, copies and epilogues move in shared memory, at 128
// a clock and 1.755 GHz, which must stay below the rest; "three": floors of the three kernels it stands for, which the plan
// would run otherwise; last, what triton.conv_tail's own model gives it:
//
//   block   C, J -> K -> L             floor        shared   three   conv_tail
//   first   64, 64 -> 256 -> 64, proj.   175 matrix   151      338     417
//   second  64, 64 -> 256 -> 64          239 DRAM     158      409     401
//   third   64, 64 -> 256 -> 128         263 DRAM     179      433     554
//
// Source: back-to-back GEMM fusion (CUTLASS, example 13); schedules of CUTLASS 3 and FlashAttention-3, whose second product
// too takes the first one's sums as rows from registers (Shah et al. 2024); PTX ISA.
#include "epilogue.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "tensor_map.h"
#include "tile.h"

namespace resnet_fast {
namespace {

constexpr int kGroup = 128, kGroups = 2;                  // threads of a multiplying warp group; groups of a block
constexpr int kTailThreads = kGroups * (kGroup + 32);     // and for each a warp that moves its data
constexpr int kSide = 8, kHaloSide = kSide + 2, kTaps = 9;
constexpr int kSteps = kSlice / 16;                       // of 16 channels, which a product takes
constexpr int kMatrixBytes = kSlice * kRowBytes;          // 64 pixels or filters of 64 channels
constexpr int kBoxCopied = kHaloSide * kHaloSide * kRowBytes;
constexpr int kBoxBytes = (kBoxCopied + kPatternBytes - 1) / kPatternBytes * kPatternBytes;
constexpr int kMostSlices = 4;                            // of y's channels

struct TailBarriers {
  struct Group {
    uint64_t box_full, box_free, full[4], written[4];  // by slot
  } group[kGroups];
  uint64_t filters;
};

// z's channels, and whether the residual is projected. Filters lie in shared memory in the order of their use.
template <class T_, int kNext_, bool kProjected_>
struct TailTile {
  using T = T_;
  static constexpr int kNext = kNext_;
  static constexpr bool kProjected = kProjected_;
  static constexpr int kThreeAt = kTaps * kMatrixBytes, kProjectionAt = kThreeAt + kMostSlices * kMatrixBytes;
  static constexpr int kOneAt = kProjectionAt + (kProjected ? kMostSlices * kMatrixBytes : 0);
  static constexpr int kOneBytes = kNext * kRowBytes;  // of one slice of its depth
  static constexpr int kGroupsAt = kOneAt + kMostSlices * kOneBytes;
  static constexpr int kSlots = kNext == 64 && !kProjected ? 4 : 2;  // 64 channels of a tile, on their way in or out
  static constexpr int kGroupBytes = kBoxBytes + kSlots * kMatrixBytes;
  static constexpr int kBarriersAt = kGroupsAt + kGroups * kGroupBytes;
  static constexpr int kSharedBytes = kBarriersAt + int(sizeof(TailBarriers));
  static_assert(kSharedBytes <= 227 * 1024);
};

struct TailWork {
  CUtensorMap x, two, three, residual, projection, one, y, z;
  const float *bias2, *bias3, *bias1;
  int tiles, tiles_h, tiles_w, slices;  // slices of y's channels
  int middle, wide, next;
};

struct TilePlace {
  int image, h, w;
};

__device__ __forceinline__ TilePlace place_of(const TailWork& p, int tile) {
  const int row = tile / p.tiles_w;
  return {row / p.tiles_h, row % p.tiles_h * kSide, tile % p.tiles_w * kSide};
}

// A group's own part of shared memory, and the filters of all.
template <class Tile>
struct TailShared {
  unsigned char* const filters;
  unsigned char *const box, *const slots;
  TailBarriers& all;
  TailBarriers::Group& barriers;

  __device__ TailShared(unsigned char* shared, int group)
      : filters(shared), box(shared + Tile::kGroupsAt + group * Tile::kGroupBytes), slots(box + kBoxBytes),
        all(*reinterpret_cast<TailBarriers*>(shared + Tile::kBarriersAt)), barriers(all.group[group]) {}
  __device__ unsigned char* slot(int i) const { return slots + i * kMatrixBytes; }
};

template <class Tile>
__device__ __forceinline__ void load_filters(const TailWork& p, const TailShared<Tile>& shared) {
  uint64_t* const filled = &shared.all.filters;
  const int slice_bytes = kMatrixBytes + (Tile::kProjected ? kMatrixBytes : 0) + Tile::kOneBytes;
  mbarrier_expect(filled, kTaps * kMatrixBytes + p.slices * slice_bytes);
  for (int tap = 0; tap < kTaps; ++tap)
    tma_load(shared.filters + tap * kMatrixBytes, &p.two, filled, {0, tap % 3, tap / 3, 0});
  for (int slice = 0; slice < p.slices; ++slice) {
    const int k = slice * kSlice;
    tma_load(shared.filters + Tile::kThreeAt + slice * kMatrixBytes, &p.three, filled, {0, k});
    if constexpr (Tile::kProjected)
      tma_load(shared.filters + Tile::kProjectionAt + slice * kMatrixBytes, &p.projection, filled, {0, k});
    tma_load(shared.filters + Tile::kOneAt + slice * Tile::kOneBytes, &p.one, filled, {k, 0});
  }
}

// What passes through the slots for a tile, in this order: the residual's pixels if they are to be projected, the slices of
// y, those of z. One thread fills slots, with what is to be added or with nothing, and empties those that are written.
template <class Tile>
struct Mover {
  static constexpr int kBefore = Tile::kProjected ? 1 : 0;
  const TailWork& p;
  const TailShared<Tile>& shared;
  int tile, position = 0;  // what is filled next
  Ring filling{0};

  __device__ int positions() const { return kBefore + p.slices + Tile::kNext / kSlice; }

  __device__ void fill() {
    if (tile >= p.tiles) return;
    uint64_t* const full = &shared.barriers.full[filling.slot];
    if (Tile::kProjected ? position == 0 : position < p.slices) {
      const TilePlace at = place_of(p, tile);
      mbarrier_expect(full, kMatrixBytes);
      tma_load(shared.slot(filling.slot), &p.residual, full, {position * kSlice, at.w, at.h, at.image});
    } else {
      mbarrier_arrive(full);
    }
    filling.step(1, Tile::kSlots);
    if (++position == positions()) position = 0, tile += kGroups * int(gridDim.x);
  }

  __device__ void fill_box(int t) const {
    if (t >= p.tiles) return;
    const TilePlace at = place_of(p, t);
    mbarrier_expect(&shared.barriers.box_full, kBoxCopied);
    tma_load(shared.box, &p.x, &shared.barriers.box_full, {0, at.w - 1, at.h - 1, at.image});
  }

  __device__ void run() {
    const int step = kGroups * int(gridDim.x);
    unsigned box_parity = 0;
    Ring emptying{0};
    fill_box(tile);
    int t = tile;
    for (int i = 0; i < Tile::kSlots; ++i) fill();
    for (; t < p.tiles; t += step, box_parity ^= 1) {
      const TilePlace at = place_of(p, t);
      mbarrier_wait(&shared.barriers.box_free, box_parity);
      fill_box(t + step);
      for (int i = 0; i < positions(); ++i, emptying.step(1, Tile::kSlots)) {
        const int slice = i - kBefore, after = slice - p.slices;
        mbarrier_wait(&shared.barriers.written[emptying.slot], emptying.parity);
        if (slice >= 0) {
          tma_store(after < 0 ? &p.y : &p.z, shared.slot(emptying.slot),
                    {(after < 0 ? slice : after) * kSlice, at.w, at.h, at.image});
          tma_store_commit();
          tma_store_wait_read<0>();
        }
        fill();
      }
    }
    tma_store_wait<0>();
  }
};

// relu(sum + bias [+ what lies in the slot]) of a group's 64 pixels and 64 channels from `first` on, zero beyond the last:
// rounded, as rows of the next product and, if there is one, in the slot. Eight rows of four lanes touch all 32 banks once.
template <class T, bool kResidual, int kAt, int kSums>
__device__ __forceinline__ void finish(uint32_t (&made)[kSteps][4], const float (&sum)[kSums], const float* bias, int first,
                                       int channels, unsigned char* slot) {
  constexpr int kTogether = 4;  // chunks read before the first is replaced: one by one, each read would wait for the write before
  const int lane = threadIdx.x % 32, row = threadIdx.x % kGroup / 32 * 16 + lane / 4;
  const auto place = [&](int j, int half) { return slot + swizzled(row + 8 * half, j) + 4 * (lane % 4); };
  Pack<T, 2> old[kTogether][2] = {};
#pragma unroll
  for (int j = 0; j < kChunks; ++j) {
    if constexpr (kResidual)
      if (j % kTogether == 0)
#pragma unroll
        for (int i = 0; i < 2 * kTogether; ++i)
          old[i / 2][i % 2] = *reinterpret_cast<const Pack<T, 2>*>(place(j + i / 2, i % 2));
    const int channel = first + 8 * j + 2 * (lane % 4);
    const bool there = channel < channels;  // or an infinity, times a filter's zeros, would be NaN in all of the next sums
    const float2 b = there ? *reinterpret_cast<const float2*>(bias + channel) : float2{0.f, 0.f};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* const s = &sum[kAt + 4 * j + 2 * half];
      const Pack<T, 2>& add = old[j % kTogether][half];
      const Pack<T, 2> pack{from_float<T>(there ? activate(s[0] + b.x + to_float(add.v[0]), Act::relu) : 0.f),
                            from_float<T>(there ? activate(s[1] + b.y + to_float(add.v[1]), Act::relu) : 0.f)};
      uint32_t& pair = made[j / 2][j % 2 * 2 + half];
      pair = reinterpret_cast<const uint32_t&>(pack);
      if (slot != nullptr) store_for_async(place(j, half), pair);
    }
  }
}

// A slot's 64 pixels of 64 channels as rows of a product.
__device__ __forceinline__ void read_rows(uint32_t (&rows)[kSteps][4], const unsigned char* slot) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % kGroup / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < kChunks; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      rows[j / 2][j % 2 * 2 + half] =
          *reinterpret_cast<const uint32_t*>(slot + swizzled(row + 8 * half, j) + 4 * (lane % 4));
}

// sum += rows[64 x 64] * filters[N x 64]^T.
template <class T, int N>
__device__ __forceinline__ void multiply(float (&sum)[N / 2], const uint32_t (&rows)[kSteps][4], uint64_t filters, bool add) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    wgmma<T, N>(sum, rows[step], further_descriptor(filters, 32 * step), add || step > 0);
}

// sum = the 3x3 at a group's pixels.
template <class T>
__device__ __forceinline__ void multiply_taps(float (&sum)[kSlice / 2], uint64_t box, uint64_t filters) {
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma<T, kSlice>(sum, further_descriptor(box, (tap / 3 * kHaloSide + tap % 3) * kRowBytes + 32 * step),
                       further_descriptor(filters, tap * kMatrixBytes + 32 * step), tap + step > 0);
}

// A multiplying group's tiles.
template <class Tile>
__device__ __forceinline__ void make_tiles(const TailWork& p, const TailShared<Tile>& shared, int first) {
  using T = typename Tile::T;
  constexpr int kNext = Tile::kNext;
  TailBarriers::Group& barriers = shared.barriers;
  const uint64_t box = matrix_descriptor(shared_address(shared.box), kHaloSide * kRowBytes);
  const uint64_t filters = matrix_descriptor(shared_address(shared.filters));
  const auto arrive = [](uint64_t* barrier) {  // for the warp
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
  };
  Ring ring{0};
  const auto wait = [&] { mbarrier_wait(&barriers.full[ring.slot], ring.parity); };
  const auto give = [&] {
    fence_proxy_async();
    arrive(&barriers.written[ring.slot]);
    ring.step(1, Tile::kSlots);
  };
  unsigned box_parity = 0;
  mbarrier_wait(&shared.all.filters, 0);
  for (int tile = first; tile < p.tiles; tile += kGroups * int(gridDim.x), box_parity ^= 1) {
    float sum[kSlice / 2], after[kNext / 2];
    uint32_t middle[kSteps][4], entry[kSteps][4], made[kSteps][4];
    mbarrier_wait(&barriers.box_full, box_parity);
    wgmma_fence();
    multiply_taps<T>(sum, box, filters);
    wgmma_commit();
    wgmma_wait<0>(sum);
    arrive(&barriers.box_free);
    finish<T, false, 0>(middle, sum, p.bias2, 0, p.middle, nullptr);
    if constexpr (Tile::kProjected) {
      wait();
      read_rows(entry, shared.slot(ring.slot));
      give();
    }
#pragma unroll 1
    for (int slice = 0; slice < p.slices; ++slice) {
      wgmma_fence();
      multiply<T, kSlice>(sum, middle, further_descriptor(filters, Tile::kThreeAt + slice * kMatrixBytes), false);
      if constexpr (Tile::kProjected)
        multiply<T, kSlice>(sum, entry, further_descriptor(filters, Tile::kProjectionAt + slice * kMatrixBytes), true);
      wgmma_commit();
      wgmma_wait<0>(sum);  // and for what multiplies the last slice's `made`
      wait();
      finish<T, !Tile::kProjected, 0>(made, sum, p.bias3, slice * kSlice, p.wide, shared.slot(ring.slot));
      give();
      wgmma_fence();
      multiply<T, kNext>(after, made, further_descriptor(filters, Tile::kOneAt + slice * Tile::kOneBytes), slice > 0);
      wgmma_commit();
    }
    wgmma_wait<0>(after);
    wait();
    finish<T, false, 0>(made, after, p.bias1, 0, p.next, shared.slot(ring.slot));
    give();
    if constexpr (kNext > kSlice) {
      wait();
      finish<T, false, kSlice / 2>(made, after, p.bias1, kSlice, p.next, shared.slot(ring.slot));
      give();
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(kTailThreads, 1) conv_tail_hopper_kernel(const __grid_constant__ TailWork p) {
  if constexpr (kHopper) {
    const int warp = int(threadIdx.x) / 32, first_mover = kGroups * kGroup / 32;
    const int group = warp < first_mover ? warp / (kGroup / 32) : warp - first_mover;
    const TailShared<Tile> shared(hopper_shared(), group);
    if (threadIdx.x == 0) {
      for (TailBarriers::Group& each : shared.all.group) {
        mbarrier_init(&each.box_full, 1);
        mbarrier_init(&each.box_free, kGroup / 32);
        for (int i = 0; i < Tile::kSlots; ++i) {
          mbarrier_init(&each.full[i], 1);
          mbarrier_init(&each.written[i], kGroup / 32);
        }
      }
      mbarrier_init(&shared.all.filters, 1);
      mbarrier_init_fence();
      tma_prefetch(&p.x), tma_prefetch(&p.residual), tma_prefetch(&p.y), tma_prefetch(&p.z);
    }
    wait_for_kernels_before();
    __syncthreads();
    const int first = group * int(gridDim.x) + int(blockIdx.x);
    if (warp < first_mover) {
      make_tiles<Tile>(p, shared, first);
    } else if (threadIdx.x % 32 == 0) {
      if (group == 0) load_filters<Tile>(p, shared);
      Mover<Tile>{p, shared, first}.run();
    }
  } else {
    trap();  // the binary lacks sm_90a, and the caller did not look
  }
}

// ---- Host side

template <class Tile>
cudaError_t launch_tail(const TailArgs& c, int processors, cudaStream_t stream) {
  TailWork p{};
  p.tiles_h = int(ceil_div(c.h, kSide)), p.tiles_w = int(ceil_div(c.w, kSide)), p.slices = int(ceil_div(c.wide, kSlice));
  const int64_t tiles = c.n * p.tiles_h * p.tiles_w;
  if (tiles > INT32_MAX - kGroups * processors) return cudaErrorInvalidConfiguration;
  p.tiles = int(tiles), p.middle = int(c.middle), p.wide = int(c.wide), p.next = int(c.next);
  p.bias2 = c.bias2, p.bias3 = c.bias3, p.bias1 = c.bias1;
  constexpr uint64_t size = sizeof(typename Tile::T);
  const auto pixels = [&](CUtensorMap& map, const void* data, int64_t channels, uint32_t side) {
    const uint64_t pixel = uint64_t(channels) * size, row = pixel * uint64_t(c.w);
    return encode_tensor_map<4>(map, c.dtype, data, {uint64_t(channels), uint64_t(c.w), uint64_t(c.h), uint64_t(c.n)},
                                {pixel, row, row * uint64_t(c.h)}, {kSlice, side, side, 1});
  };
  const auto filters = [&](CUtensorMap& map, const void* data, int64_t channels, int64_t count, uint32_t rows) {
    return encode_tensor_map<2>(map, c.dtype, data, {uint64_t(channels), uint64_t(count)}, {uint64_t(channels) * size},
                                {kSlice, rows});
  };
  const uint64_t tap = uint64_t(c.channels) * size;
  cudaError_t error = pixels(p.x, c.x, c.channels, kHaloSide);
  if (error == cudaSuccess) error = pixels(p.residual, c.residual, Tile::kProjected ? c.projected : c.wide, kSide);
  if (error == cudaSuccess) error = pixels(p.y, c.y, c.wide, kSide);
  if (error == cudaSuccess) error = pixels(p.z, c.z, c.next, kSide);
  if (error == cudaSuccess)
    error = encode_tensor_map<4>(p.two, c.dtype, c.weight2, {uint64_t(c.channels), 3, 3, uint64_t(c.middle)},
                                 {tap, 3 * tap, kTaps * tap}, {kSlice, 1, 1, kSlice});
  if (error == cudaSuccess) error = filters(p.three, c.weight3, c.middle, c.wide, kSlice);
  if (error == cudaSuccess && Tile::kProjected) error = filters(p.projection, c.projection, c.projected, c.wide, kSlice);
  if (error == cudaSuccess) error = filters(p.one, c.weight1, c.wide, c.next, Tile::kNext);
  constexpr auto kernel = conv_tail_hopper_kernel<Tile>;
  if (error == cudaSuccess) error = allow_shared<kernel>(Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(smaller(tiles, processors))), dim3(kTailThreads), 1, Tile::kSharedBytes,
                          stream, p);
}

template <class T>
cudaError_t launch_best(const TailArgs& c, int processors, cudaStream_t stream) {
  if (c.projection != nullptr) return launch_tail<TailTile<T, 64, true>>(c, processors, stream);
  if (c.next > 64) return launch_tail<TailTile<T, 128, false>>(c, processors, stream);
  return launch_tail<TailTile<T, 64, false>>(c, processors, stream);
}

template <class Tile>
void register_tile(const std::string& name) {
  Registration("conv_tail_hopper<" + name + ">", conv_tail_hopper_kernel<Tile>, kTailThreads, Tile::kSharedBytes);
}

template <class T>
bool register_type(const std::string& type) {
  register_tile<TailTile<T, 64, false>>(type + ",64"), register_tile<TailTile<T, 128, false>>(type + ",128");
  register_tile<TailTile<T, 64, true>>(type + ",64,projected");
  return true;
}

const bool registered = register_type<__half>("f16") && register_type<__nv_bfloat16>("bf16");

}  // namespace

cudaError_t conv_tail_hopper(const TailArgs& c, cudaStream_t stream) {
  if (c.n * c.h * c.w == 0) return cudaSuccess;
  if (!aligned16(c.x, c.weight2, c.bias2, c.weight3, c.bias3, c.residual, c.projection, c.weight1, c.bias1, c.y, c.z))
    return cudaErrorMisalignedAddress;
  int processors = 0;
  const cudaError_t error = use_device(processors);
  if (error != cudaSuccess) return error;
  return c.dtype == DType::f16 ? launch_best<__half>(c, processors, stream)
                               : launch_best<__nv_bfloat16>(c, processors, stream);
}

}  // namespace resnet_fast
