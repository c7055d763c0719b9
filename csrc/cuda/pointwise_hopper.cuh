// The kernel of pointwise_hopper.cu, which says what it computes, for whom and how fast: its schedule on a Hopper.
//
// A persistent block of three warp groups: one thread loads, two groups multiply. Slices of 64 channels pass through a
// ring of slots, so the loads of the next tiles go on while a tile is finished; the residual arrives, during the main
// loop, in the staging area that the output leaves from. Why two ways of sharing the work: by roofline.py's ceilings for
// an H200 and the shapes of ResNet-50 all products of up to 256 channels are bound by DRAM, their epilogue is as long as
// their main loop, and what counts is that loads never pause: groups take turns ("ping-pong"), and the filters stay in
// shared memory, since at 128 x 128 they would cost as many bytes from L2 as x. Deeper products are bound by L2 or the
// matrix units and have long main loops: both groups share a tile of 256 pixels, which reads a quarter less, and a
// cluster of two blocks shares the pixels of two such tiles by multicast, which saves another third.
// Source: the persistent ping-pong and cooperative schedules are those of CUTLASS 3 (Nvidia, 2023); PTX ISA.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"
#include "tile.h"

namespace resnet_fast {
namespace {

constexpr int kGroup = 128;         // threads of a warp group
constexpr int kBlock = 3 * kGroup;  // one that loads, two that multiply
constexpr int kRows = 128;          // pixels of a multiplying group's tile
constexpr int kBoxBytes = kRows * kRowBytes;              // 64 channels of them, on the way in or out
constexpr int kLoadRegisters = 40, kMathRegisters = 232;  // 40 + 2 * 232 = 3 * 168, what the launch gives

// How a block works: on 128 x kN tiles, its two multiplying groups in turns, or (`kTogether`) on the halves of one of 256
// pixels. Slices of x, and with them of the weight, pass through a ring of `kStages` slots, unless the weight of up to
// `kKept` slices stays: all tiles of a block then have the same filters. `kBlocks` make neighbouring tiles of the same
// pixels, as a cluster: each loads its share of x into all of them.
template <int kN_, bool kTogether_, int kKept_, int kStages_, int kBlocks_ = 1>
struct HopperTile {
  static constexpr int kN = kN_, kKept = kKept_, kStages = kStages_, kBlocks = kBlocks_, kBoxes = kN / 64;
  static constexpr bool kTogether = kTogether_;
  static constexpr int kM = kTogether ? 2 * kRows : kRows;
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes;
  static constexpr int kStageBytes = kKept > 0 ? kBytesA : kBytesA + kBytesB;
  static constexpr int kStagingBytes = kBoxes * kBoxBytes;  // of one group
  static constexpr int kKeptAt = kStages * kStageBytes, kStagingAt = kKeptAt + kKept * kBytesB;
  static constexpr int kAffineAt = kStagingAt + 2 * kStagingBytes;
  static constexpr int kBarriersAt = kAffineAt + 2 * kN * int(sizeof(Affine));
  static constexpr int kSharedBytes = kBarriersAt + (2 * kStages + 5) * 8;
  static_assert(kSharedBytes <= 227 * 1024 && kN <= kGroup);
  // First pixel and filter of tile t.
  static __device__ Coordinates at(uint32_t t, uint32_t tiles_n) {
    const Coordinates tile = tile_at(t, tiles_n);
    return {tile.m * kM, (tile.n * kBlocks + (kBlocks > 1 ? int(cluster_rank()) : 0)) * kN};
  }
};

using Kept128x128 = HopperTile<128, false, kKeptSlices, 6>;
using Kept128x64 = HopperTile<64, false, kKeptSlices, 8>;
using Streamed128x64 = HopperTile<64, false, 0, 8>;
using Together256x128 = HopperTile<128, true, 0, 3>;
using Paired256x128 = HopperTile<128, true, 0, 3, 2>;

// Pixels and their filters, slice by slice; of a strided one x is an im2col map.
struct Input {
  CUtensorMap x, weight;
  int slices, stride_h, stride_w;
  bool strided;
};

struct PointwiseArgs {
  Input input[2];  // the second may have no slices
  CUtensorMap residual, out;
  AffineArgs affine;
  uint32_t tiles, tiles_n;  // of a cluster
  uint32_t out_h, out_w;
  int slices, n;  // of both inputs
  bool has_residual;
  Act act;
};

// The block's shared memory: slots of a ring, filled and emptied in order; then each multiplying group's own.
template <class Tile>
struct Shared {
  unsigned char* const base;
  __device__ uint64_t* full(uint32_t slot) const { return reinterpret_cast<uint64_t*>(base + Tile::kBarriersAt) + slot; }
  __device__ uint64_t* empty(uint32_t slot) const { return full(Tile::kStages + slot); }
  __device__ uint64_t* residual(int group) const { return full(2 * Tile::kStages + group); }
  __device__ uint64_t* turn(int group) const { return residual(2 + group); }
  __device__ uint64_t* kept() const { return residual(4); }
  __device__ unsigned char* kept_weight(int slice) const { return base + Tile::kKeptAt + slice * Tile::kBytesB; }
  __device__ unsigned char* staging(int group) const { return base + Tile::kStagingAt + group * Tile::kStagingBytes; }
  __device__ Affine* affine(int group) const { return reinterpret_cast<Affine*>(base + Tile::kAffineAt) + group * Tile::kN; }

  __device__ void init() const {
    for (int slot = 0; slot < Tile::kStages; ++slot) {
      mbarrier_init(full(slot), 1);
      mbarrier_init(empty(slot), (Tile::kTogether ? 8 : 4) * Tile::kBlocks);  // warps that read what is loaded into it
    }
    mbarrier_init(kept(), 1);
    for (int group = 0; group < 2; ++group) {
      mbarrier_init(residual(group), 1);
      mbarrier_init(turn(group), 4);
    }
    mbarrier_init_fence();
  }
};

// A slice of the whole depth, first input first.
struct Slice {
  const Input& input;
  int channel;
};

__device__ __forceinline__ Slice slice_at(const PointwiseArgs& p, int slice) {
  const bool second = slice >= p.input[0].slices;
  return {p.input[second], (second ? slice - p.input[0].slices : slice) * kSlice};
}

// What this block loads of a tile's pixels, for itself or for all of its cluster: those from output pixel m = `pixel` on.
template <class Tile>
__device__ __forceinline__ void load_pixels(unsigned char* to, uint64_t* full, const Slice& slice, int m, const Pixel& pixel) {
  constexpr unsigned kAll = (1u << Tile::kBlocks) - 1;
  const Input& input = slice.input;
  if (input.strided) {
    const int at[] = {slice.channel, pixel.w * input.stride_w, pixel.h * input.stride_h, pixel.image};
    if constexpr (Tile::kBlocks > 1) {
      tma_load_im2col_multicast(to, &input.x, full, at, kAll);
    } else {
      tma_load_im2col(to, &input.x, full, at);
    }
  } else if constexpr (Tile::kBlocks > 1) {
    tma_load_multicast(to, &input.x, full, {slice.channel, m}, kAll);
  } else {
    tma_load(to, &input.x, full, {slice.channel, m});
  }
}

// One thread keeps the ring full, tile after tile: while a group finishes a tile, the slices of the next ones arrive.
template <class Tile>
__device__ __forceinline__ void load_tiles(const PointwiseArgs& p, const Shared<Tile>& shared) {
  if constexpr (Tile::kKept > 0) {
    const int n = int(blockIdx.x % p.tiles_n) * Tile::kN;  // the grid is a multiple of tiles_n
    mbarrier_expect(shared.kept(), p.slices * Tile::kBytesB);
    for (int i = 0; i < p.slices; ++i) {
      const Slice slice = slice_at(p, i);
      tma_load(shared.kept_weight(i), &slice.input.weight, shared.kept(), {slice.channel, n});
    }
  }
  const bool strided = p.input[0].strided || p.input[1].strided;
  const int share = Tile::kBlocks > 1 ? int(cluster_rank()) * (Tile::kM / Tile::kBlocks) : 0;
  uint32_t at = 0;  // slices since the start
  for (uint32_t t = blockIdx.x / Tile::kBlocks; t < p.tiles; t += gridDim.x / Tile::kBlocks) {
    const Coordinates tile = Tile::at(t, p.tiles_n);
    const int m = tile.m + share;
    const Pixel pixel = strided ? pixel_at(uint32_t(m), p.out_h, p.out_w) : Pixel{};
    for (int i = 0; i < p.slices; ++i, ++at) {
      const Slice slice = slice_at(p, i);
      const uint32_t slot = at % Tile::kStages, round = at / Tile::kStages;
      unsigned char* a = shared.base + slot * Tile::kStageBytes;
      mbarrier_wait(shared.empty(slot), (round & 1) ^ 1);  // the first round finds it empty
      mbarrier_expect(shared.full(slot), Tile::kStageBytes);
      load_pixels<Tile>(a + share * kRowBytes, shared.full(slot), slice, m, pixel);
      if constexpr (Tile::kKept == 0)
        tma_load(a + Tile::kBytesA, &slice.input.weight, shared.full(slot), {slice.channel, tile.n});
    }
  }
}

// sum[128 x kN] over the whole depth, from slice `at` of the ring on. A slot is given back once the products that read
// it are known to be done: when those of the next slice have been started. Groups that take turns start their main loops
// in the order of the ring: a group ahead of a slice that is still on its way to the other would take the slot's last
// round for its own, since a phase is known by its parity alone. `prepare` makes ready what the epilogue wants: groups that
// take turns do so while they wait for theirs, groups that work together behind their first products.
template <class T, class Tile, class F>
__device__ __forceinline__ void multiply(float (&sum)[2][Tile::kN / 2], const Shared<Tile>& shared, int group,
                                         uint32_t at, int slices, uint32_t tiles_before, F&& prepare) {
  const uint32_t lane = threadIdx.x % 32;
  const auto give_back = [&](uint32_t slice) {
    uint64_t* empty = shared.empty(slice % Tile::kStages);
    if constexpr (Tile::kBlocks > 1) {
      if (lane < Tile::kBlocks) mbarrier_arrive_at(empty, lane);
    } else {
      if (lane == 0) mbarrier_arrive(empty);
    }
  };
  if constexpr (!Tile::kTogether) {
    prepare();
    mbarrier_wait(shared.turn(group), (tiles_before & 1) ^ (group == 0));
  }
  for (int slice = 0; slice < slices; ++slice, ++at) {
    const uint32_t slot = at % Tile::kStages;
    const unsigned char* tile = shared.base + slot * Tile::kStageBytes;
    const uint64_t a = matrix_descriptor(shared_address(tile + (Tile::kTogether ? group * kBoxBytes : 0)));
    const uint64_t b = matrix_descriptor(shared_address(Tile::kKept > 0 ? shared.kept_weight(slice) : tile + Tile::kBytesA));
    mbarrier_wait(shared.full(slot), at / Tile::kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes; k += 32)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        wgmma<T, Tile::kN>(sum[half], further_descriptor(a, k + half * kBoxBytes / 2), further_descriptor(b, k),
                           slice > 0 || k > 0);
    wgmma_commit();
    if (Tile::kTogether && slice == 0) prepare();
    wgmma_wait<1>();
    if (slice > 0) give_back(at - 1);
  }
  if (!Tile::kTogether && lane == 0) mbarrier_arrive(shared.turn(1 - group));  // nothing more to wait for in the ring
  wgmma_wait<0>(sum);
  give_back(at - 1);
}

// act(sum * s + t + residual), rounded once, into the staging tile, where the residual lies at the same place. Eight
// rows of four lanes touch all 32 banks once.
template <class T, class Tile, bool kResidual>
__device__ __forceinline__ void finish(const float (&sum)[2][Tile::kN / 2], unsigned char* staging, const Affine* affine,
                                       Act act) {
  constexpr int kTogether = 4;  // chunks read before the first is replaced: one by one, each read would wait for the write before
  const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroup / 32;
  const auto place = [&](int j, int rows) {  // rows: of 64, then of 8
    return staging + j / kChunks * kBoxBytes + (rows / 2 * 64 + rows % 2 * 8) * kRowBytes +
           swizzled(warp * 16 + lane / 4, j % kChunks) + 4 * (lane % 4);
  };
#pragma unroll
  for (int first = 0; first < Tile::kN / 8; first += kTogether) {
    float4 two[kTogether];  // affines
    Pack<T, 2> old[kTogether][4];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      two[k] = *reinterpret_cast<const float4*>(affine + 8 * (first + k) + 2 * (lane % 4));
#pragma unroll
      for (int rows = 0; rows < 4; ++rows)
        if constexpr (kResidual) old[k][rows] = *reinterpret_cast<const Pack<T, 2>*>(place(first + k, rows));
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
#pragma unroll
      for (int rows = 0; rows < 4; ++rows) {
        const float* const s = &sum[rows / 2][4 * (first + k) + 2 * (rows % 2)];
        const auto add = [&](int i) { return kResidual ? to_float(old[k][rows].v[i]) : -0.f; };  // which costs no addition
        const Pack<T, 2> pack{from_float<T>(epilogue(s[0], {two[k].x, two[k].y}, add(0), act)),
                              from_float<T>(epilogue(s[1], {two[k].z, two[k].w}, add(1), act))};
        store_for_async(place(first + k, rows), reinterpret_cast<const uint32_t&>(pack));
      }
  }
}

// One warp group's tiles, from residual to output.
template <class T, class Tile>
__device__ __forceinline__ void make_tiles(const PointwiseArgs& p, const Shared<Tile>& shared, int group) {
  constexpr uint32_t kEvery = Tile::kTogether ? 1 : 2;  // of the block's tiles this group takes every first or second
  const uint32_t thread = threadIdx.x % kGroup, first = Tile::kTogether ? 0 : group;
  unsigned char* const staging = shared.staging(group);
  Affine* const affine = shared.affine(group);
  uint32_t at = first * p.slices, tiles = 0;
  int affine_of = -1;
  if constexpr (Tile::kKept > 0) mbarrier_wait(shared.kept(), 0);
  const uint32_t step = gridDim.x / Tile::kBlocks;
  for (uint32_t t = blockIdx.x / Tile::kBlocks + first * step; t < p.tiles; t += kEvery * step, ++tiles) {
    const Coordinates tile = Tile::at(t, p.tiles_n);
    const int m = tile.m + (Tile::kTogether ? group * kRows : 0), n = tile.n;
    const auto prepare = [&] {
      if (thread == 0) {
        tma_store_wait_read<0>();  // the last tile has left the staging area
        if (p.has_residual) {
          mbarrier_expect(shared.residual(group), Tile::kStagingBytes);
#pragma unroll
          for (int box = 0; box < Tile::kBoxes; ++box)
            tma_load(staging + box * kBoxBytes, &p.residual, shared.residual(group), {n + 64 * box, m});
        }
      }
      if (n != affine_of && thread < Tile::kN && n + int(thread) < p.n)
        affine[thread] = load_affine(p.affine, n + thread);
      affine_of = n;
      __syncwarp();
    };
    float sum[2][Tile::kN / 2];
    multiply<T, Tile>(sum, shared, group, at, p.slices, tiles, prepare);
    at += kEvery * p.slices;
    named_barrier(1 + group, kGroup);  // the staging area is free, the affine there
    if (p.has_residual) {
      mbarrier_wait(shared.residual(group), tiles & 1);
      finish<T, Tile, true>(sum, staging, affine, p.act);
    } else {
      finish<T, Tile, false>(sum, staging, affine, p.act);
    }
    fence_proxy_async();
    named_barrier(1 + group, kGroup);
    if (thread == 0) {
#pragma unroll
      for (int box = 0; box < Tile::kBoxes; ++box) tma_store(&p.out, staging + box * kBoxBytes, {n + 64 * box, m});
      tma_store_commit();
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class T, class Tile>
__global__ void __launch_bounds__(kBlock, 1) pointwise_hopper_kernel(const __grid_constant__ PointwiseArgs p) {
  if constexpr (kHopper) {
    const Shared<Tile> shared{hopper_shared()};
    if (threadIdx.x == 0) {
      shared.init();
      for (const Input& input : p.input)
        if (input.slices > 0) tma_prefetch(&input.x), tma_prefetch(&input.weight);
      tma_prefetch(&p.out);
      if (p.has_residual) tma_prefetch(&p.residual);
    }
    Tile::kBlocks > 1 ? cluster_sync_relaxed() : __syncthreads();
    wait_for_kernels_before();
    if (threadIdx.x < kGroup) {
      registers_down<kLoadRegisters>();
      if (threadIdx.x == 0) load_tiles<Tile>(p, shared);
    } else {
      registers_up<kMathRegisters>();
      make_tiles<T, Tile>(p, shared, int(threadIdx.x) / kGroup - 1);
    }
    if constexpr (Tile::kBlocks > 1) {  // the other still loads into this block and arrives here
      __syncwarp();
      cluster_sync_relaxed();
    }
  } else {
    trap();  // never a wrong answer: the binary lacks sm_90a, and the caller did not look
  }
}

}  // namespace
}  // namespace resnet_fast
