// Convolutions of few pixels over NHWC on Hopper, such as those of one image: a cluster of blocks shares each tile's depth.
//
//   out[p, k] = act(sum_{r, s, c} x[q(p) + (r, s), c] * weight[k, r, s, c] * scale[k] + shift[k] + residual[p, k])
//
// q(p) + (r, s): the pixel that tap (r, s) of output pixel p reads, zero outside the image. Layout: x [N, H, W, C], weight
// [K, R, S, C], residual and out [N, H', W', K], dense, 16-byte aligned, C and K multiples of 8, strides up to 8; float16 or
// bfloat16; float32 accumulation and epilogue, one rounding on store. sm_90a only.
//
// A tile is 64 pixels times 32 or 64 filters: 14 x 14 pixels of 256 filters are 16 tiles, an eighth of the chip, each 36
// slices deep (9 taps of 4). So up to eight blocks share a tile's slices, leave their sums in shared memory, and after one
// barrier of the cluster each adds all of them, always in the same order, for its share of the pixels: no second kernel, no
// sums in global memory, the same bits every time. Pixels come by TMA in im2col mode, which steps over strides, takes the tap
// as an offset and reads zeros outside. What a layer is made of is mostly its weights, and they do not depend on the kernel
// before: while that one still runs, they are fetched into L2, which is where it would show if somebody wrote to them.
//
// Floor: the weights from DRAM, 2 R S C K bytes at 4.3 TB/s: 0.3 us for 256 filters of 3x3x256. PREDICTED, nothing of it
// measured: a block's clocks by cluster_clocks (tile.h), whose rates are guesses, at 1.755 GHz, for ResNet-50's convolutions of
// one image at 224^2 on an H200 in microseconds, beside what the Triton kernels' own model gives, two launches where it splits.
// (What comes behind the products takes 440 clocks of four blocks to 640 of one, by the machine code's stall counts and a guess of
// 200 for a read from another block, of a tile of 64 filters; the model does not name it: its 1,500 and 900 have to hold it.)
//
//   H' = W'   C -> K                   filters x blocks of a tile    all blocks   predicted   triton
//   56          64 ->   64, 3x3                 32 x 1                    98          1.6       3.5
//   56          64 ->  256, 1x1                 64 x 1                   196          1.9       2.2
//   56         256 ->   64, 1x1                 32 x 1                    98          1.2       2.2
//   28         128 ->  128, 3x3                 64 x 4                   104          1.9       5.2
//   28         128 ->  512, 1x1                 64 x 1                   104          1.1       2.0
//   28         512 ->  128, 1x1                 32 x 1                    52          1.5       2.9
//   14         256 ->  256, 3x3                 64 x 8                   128          1.9       7.4
//   14         256 -> 1024, 1x1                 32 x 1                   128          1.2       2.3
//   14        1024 ->  256, 1x1                 64 x 8                   128          1.6       4.7
//    7         512 ->  512, 3x3                 32 x 8                   128          2.1       8.8
//    7         512 -> 2048, 1x1                 32 x 1                    64          1.5       2.9
//    7        2048 ->  512, 1x1                 32 x 8                   128          1.7       6.8
//
// Source: split-K; distributed shared memory as in "CUDA C++ Programming Guide", "Distributed Shared Memory"; PTX ISA.
#include "epilogue.cuh"
#include "hopper.cuh"
#include "launch.cuh"
#include "tensor_map.h"
#include "tile.h"

namespace resnet_fast {
namespace {

constexpr int kGroup = 128;     // threads of a block: one warp group
constexpr int kPixels = 64;     // of a tile
constexpr int kStages = 4;      // slices in flight; two blocks fit a processor, so the next kernel's can be there early
constexpr int kPixelBytes = kPixels * kRowBytes;
constexpr int kVector = 8;      // channels that a thread adds and stores together
using Words = Pack<uint32_t, kVector / 2>;  // two each

template <class T_, int kN_>
struct ClusterTile {
  using T = T_;
  static constexpr int kN = kN_;  // filters
  static constexpr int kStageBytes = kPixelBytes + kN * kRowBytes;
  static constexpr int kPitch = kN + 8;  // floats; eight rows of four lanes then touch all banks once
  static constexpr int kSumsAt = kStages * kStageBytes;
  static constexpr int kAffineAt = kSumsAt + kPixels * kPitch * int(sizeof(float));
  static constexpr int kBarriersAt = kAffineAt + kN * int(sizeof(Affine));
  static constexpr int kSharedBytes = kBarriersAt + 2 * kStages * 8;
};

struct ClusterArgs {
  CUtensorMap x, weight;
  AffineArgs affine;
  const void* residual;
  void* out;
  int out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, taps_w;
  int pixels, filters, tiles_n, slices, steps, split;  // steps: taps times slices of 64 channels
  Act act;
};

template <class Tile>
struct ClusterShared {
  unsigned char* const base;
  __device__ unsigned char* stage(int i) const { return base + i * Tile::kStageBytes; }
  __device__ float* sums() const { return reinterpret_cast<float*>(base + Tile::kSumsAt); }
  __device__ Affine* affine() const { return reinterpret_cast<Affine*>(base + Tile::kAffineAt); }
  __device__ uint64_t* full(int i) const { return reinterpret_cast<uint64_t*>(base + Tile::kBarriersAt) + i; }
  __device__ uint64_t* empty(int i) const { return full(kStages + i); }
};

// A block's part of the depth of its tile.
struct Part {
  int first_pixel, first_filter, begin, end;
};

__device__ __forceinline__ Part part_of(const ClusterArgs& p, int n) {
  const Coordinates tile = tile_at(blockIdx.x / unsigned(p.split), uint32_t(p.tiles_n));
  const int rank = int(blockIdx.x % unsigned(p.split));
  return {tile.m * kPixels, tile.n * n, p.steps * rank / p.split, p.steps * (rank + 1) / p.split};
}

// Where the loads of a part stand: the pixel that tap (0, 0) reads first, and the next step's slice of channels and its tap.
// Walked, not divided: between two products of the block's one group, one of its threads loads.
struct Loads {
  int w, h, image, filter, channel, s, r;
};

__device__ __forceinline__ Loads loads_of(const ClusterArgs& p, const Part& part) {
  const Pixel pixel = pixel_at(uint32_t(part.first_pixel), uint32_t(p.out_h), uint32_t(p.out_w));
  const int tap = part.begin / p.slices, r = tap / p.taps_w;
  return {pixel.w * p.stride_w - p.pad_w, pixel.h * p.stride_h - p.pad_h, pixel.image, part.first_filter,
          (part.begin - tap * p.slices) * kSlice, tap - r * p.taps_w, r};
}

__device__ __forceinline__ void step(Loads& at, const ClusterArgs& p) {
  at.channel += kSlice;
  if (at.channel < p.slices * kSlice) return;
  at.channel = 0;
  if (++at.s == p.taps_w) at.s = 0, ++at.r;
}

// One thread: the pixels and weights of the next step into a slot.
template <class Tile>
__device__ __forceinline__ void load_step(const ClusterArgs& p, const ClusterShared<Tile>& shared, Loads& at, int slot) {
  mbarrier_expect(shared.full(slot), Tile::kStageBytes);
  tma_load_im2col(shared.stage(slot), &p.x, shared.full(slot), {at.channel, at.w, at.h, at.image}, at.s * p.dilation_w,
                  at.r * p.dilation_h);
  tma_load(shared.stage(slot) + kPixelBytes, &p.weight, shared.full(slot), {at.channel, at.s, at.r, at.filter});
  step(at, p);
}

// This block's sums over its part of the depth; the first slots are filled or on their way. Thread 0 fills a slot again once all
// four warps are done with it.
template <class Tile>
__device__ __forceinline__ void multiply(float (&sum)[Tile::kN / 2], const ClusterArgs& p, const ClusterShared<Tile>& shared,
                                         Loads& at, int steps) {
  for (int i = 0; i < steps; ++i) {
    const uint64_t pixels = matrix_descriptor(shared_address(shared.stage(i % kStages)));
    const uint64_t filters = further_descriptor(pixels, kPixelBytes);
    mbarrier_wait(shared.full(i % kStages), i / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kRowBytes; k += 32)
      wgmma<typename Tile::T, Tile::kN>(sum, further_descriptor(pixels, k), further_descriptor(filters, k), i > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    const int done = i - 1, next = done + kStages;
    if (done >= 0 && next < steps) {
      if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.empty(done % kStages));
      if (threadIdx.x == 0) {
        mbarrier_wait(shared.empty(done % kStages), done / kStages & 1);
        load_step<Tile>(p, shared, at, done % kStages);
      }
    }
  }
  wgmma_wait<0>(sum);
}

template <class Tile>
__device__ __forceinline__ void leave_sums(const float (&sum)[Tile::kN / 2], float* sums) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < Tile::kN / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float2*>(sums + (row + 8 * half) * Tile::kPitch + 8 * j + 2 * (lane % 4)) =
          make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
}

// What a thread finishes of the tile: eight filters of every kStep-th pixel of its block's share. They are `column` on, of the
// pixels from `row` to before `end`; `at`: the first of them in residual and output, counted, like `step`, in vectors.
template <class Tile>
struct Share {
  static constexpr int kLanes = Tile::kN / kVector, kStep = kGroup / kLanes, kMost = kPixels / kStep;
  int row, end, column;
  int64_t at, step;
};

template <class Tile>
__device__ __forceinline__ Share<Tile> share_of(const ClusterArgs& p, const Part& part) {
  using S = Share<Tile>;
  const int pixels = kPixels / p.split, begin = pixels * int(cluster_rank()), left = p.pixels - part.first_pixel;
  const int row = begin + int(threadIdx.x) / S::kLanes, column = int(threadIdx.x) % S::kLanes * kVector;
  const int end = part.first_filter + column < p.filters ? (begin + pixels < left ? begin + pixels : left) : 0;
  const int64_t line = p.filters / kVector;
  return {row, end, column, (part.first_pixel + row) * line + (part.first_filter + column) / kVector, S::kStep * line};
}

// Asked for before the products, used behind them.
template <class Tile>
__device__ __forceinline__ void load_residual(Words (&old)[Share<Tile>::kMost], const ClusterArgs& p, const Share<Tile>& share) {
#pragma unroll
  for (int i = 0; i < Share<Tile>::kMost; ++i)
    if (p.residual != nullptr && share.row + i * Share<Tile>::kStep < share.end)
      old[i] = static_cast<const Words*>(p.residual)[share.at + i * share.step];
}

// The sums of all blocks of the cluster for this one's share of the pixels, with the epilogue. All are read before the first is
// used, as none could be while a store is ahead of it: one way to the other blocks and back.
template <class Tile, int kSplit>
__device__ __forceinline__ void add_and_store(const ClusterArgs& p, const ClusterShared<Tile>& shared, const Share<Tile>& share,
                                              const Words (&residual)[Share<Tile>::kMost]) {
  using T = typename Tile::T;
  constexpr int kStep = Share<Tile>::kStep, kRows = Share<Tile>::kMost > kSplit ? Share<Tile>::kMost / kSplit : 1;
  if (share.row >= share.end) return;
  const float* const sums = shared.sums() + share.row * Tile::kPitch + share.column;
  float4 add[kRows][kSplit][kVector / 4];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
#pragma unroll
    for (int from = 0; from < kSplit; ++from)
#pragma unroll
      for (int four = 0; four < kVector / 4; ++four)
        add[i][from][four] = load_from_block(reinterpret_cast<const float4*>(sums + i * kStep * Tile::kPitch + 4 * four), from);
  Affine affine[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) affine[v] = shared.affine()[share.column + v];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (share.row + i * kStep >= share.end) continue;
    float value[kVector] = {};
#pragma unroll
    for (int from = 0; from < kSplit; ++from)
#pragma unroll
      for (int v = 0; v < kVector; v += 4) {
        const float4& four = add[i][from][v / 4];
        value[v] += four.x, value[v + 1] += four.y, value[v + 2] += four.z, value[v + 3] += four.w;
      }
    Words made;
#pragma unroll
    for (int v = 0; v < kVector; v += 2) {
      uint32_t word = residual[i].v[v / 2];
      asm("" : "+r"(word));  // taken apart here: the compiler would do so where it is loaded, and wait there
      const auto& old = reinterpret_cast<const Pack<T, 2>&>(word);
      const Pack<T, 2> pair{from_float<T>(epilogue(value[v], affine[v], to_float(old.v[0]), p.act)),
                            from_float<T>(epilogue(value[v + 1], affine[v + 1], to_float(old.v[1]), p.act))};
      made.v[v / 2] = reinterpret_cast<const uint32_t&>(pair);
    }
    static_cast<Words*>(p.out)[share.at + i * share.step] = made;
  }
}

template <class Tile>
__global__ void __launch_bounds__(kGroup, 1) conv_cluster_hopper_kernel(const __grid_constant__ ClusterArgs p) {
  if constexpr (kHopper) {
    const ClusterShared<Tile> shared{hopper_shared()};
    const Part part = part_of(p, Tile::kN);
    const Share<Tile> share = share_of<Tile>(p, part);
    const int steps = part.end - part.begin;
    Loads at = loads_of(p, part);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(shared.full(i), 1);
        mbarrier_init(shared.empty(i), kGroup / 32);
      }
      mbarrier_init_fence();
      tma_prefetch(&p.x), tma_prefetch(&p.weight);
      if (part.first_pixel == 0) {
        Loads ahead = at;
        for (int i = part.begin; i < part.end; ++i, step(ahead, p))
          tma_prefetch_l2(&p.weight, {ahead.channel, ahead.s, ahead.r, ahead.filter});
      }
    }
    __syncthreads();
    wait_for_kernels_before();
    if (threadIdx.x == 0)
      for (int i = 0; i < kStages && i < steps; ++i) load_step<Tile>(p, shared, at, i);
    const int own = int(threadIdx.x) - (kGroup - Tile::kN);  // by the last warps, since the first loads
    if (own >= 0 && part.first_filter + own < p.filters) shared.affine()[own] = load_affine(p.affine, part.first_filter + own);
    Words residual[Share<Tile>::kMost] = {};
    load_residual<Tile>(residual, p, share);
    float sum[Tile::kN / 2];
    multiply<Tile>(sum, p, shared, at, steps);
    leave_sums<Tile>(sum, shared.sums());
    cluster_sync();  // so are the affines seen
    switch (p.split) {
      case 1: add_and_store<Tile, 1>(p, shared, share, residual); break;
      case 2: add_and_store<Tile, 2>(p, shared, share, residual); break;
      case 4: add_and_store<Tile, 4>(p, shared, share, residual); break;
      default: add_and_store<Tile, 8>(p, shared, share, residual);
    }
    cluster_sync_relaxed();  // others still read this block's sums
  } else {
    trap();  // the binary lacks sm_90a, and the caller did not look
  }
}

// ---- Host side

template <class Tile>
cudaError_t launch_cluster(const ConvArgs& c, int split, cudaStream_t stream) {
  ClusterArgs p{};
  p.affine = c.affine, p.residual = c.residual, p.out = c.out, p.act = c.act;
  p.out_h = int(c.out_h), p.out_w = int(c.out_w), p.stride_h = c.stride_h, p.stride_w = c.stride_w;
  p.pad_h = c.pad_h, p.pad_w = c.pad_w, p.dilation_h = c.dilation_h, p.dilation_w = c.dilation_w, p.taps_w = int(c.s);
  p.pixels = int(c.n * c.out_h * c.out_w), p.filters = int(c.k), p.slices = int(ceil_div(c.c, kSlice));
  p.tiles_n = int(ceil_div(c.k, Tile::kN)), p.steps = int(c.r * c.s) * p.slices, p.split = split;
  const int64_t blocks = ceil_div(p.pixels, kPixels) * p.tiles_n * split;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const uint64_t tap = uint64_t(c.c) * sizeof(typename Tile::T);
  const Corners corners{{-c.pad_w, -c.pad_h},
                        {c.pad_w - int(c.s - 1) * c.dilation_w, c.pad_h - int(c.r - 1) * c.dilation_h}};
  cudaError_t error = encode_im2col_map(p.x, c.dtype, c.x, uint64_t(c.n), uint64_t(c.h), uint64_t(c.w), uint64_t(c.c),
                                        uint32_t(c.stride_h), uint32_t(c.stride_w), kPixels, corners);
  if (error == cudaSuccess)
    error = encode_tensor_map<4>(p.weight, c.dtype, c.weight, {uint64_t(c.c), uint64_t(c.s), uint64_t(c.r), uint64_t(c.k)},
                                 {tap, uint64_t(c.s) * tap, uint64_t(c.r * c.s) * tap}, {kSlice, 1, 1, Tile::kN});
  constexpr auto kernel = conv_cluster_hopper_kernel<Tile>;
  if (error == cudaSuccess) error = allow_shared<kernel>(Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(unsigned(blocks)), dim3(kGroup), split, Tile::kSharedBytes, stream, p);
}

template <class T>
bool register_type(const std::string& type) {
  Registration("conv_cluster_hopper<" + type + ",64x32>", conv_cluster_hopper_kernel<ClusterTile<T, 32>>, kGroup,
               ClusterTile<T, 32>::kSharedBytes);
  Registration("conv_cluster_hopper<" + type + ",64x64>", conv_cluster_hopper_kernel<ClusterTile<T, 64>>, kGroup,
               ClusterTile<T, 64>::kSharedBytes);
  return true;
}

const bool registered = register_type<__half>("f16") && register_type<__nv_bfloat16>("bf16");

}  // namespace

cudaError_t conv_cluster_hopper(const ConvArgs& c, cudaStream_t stream) {
  const int64_t pixels = c.n * c.out_h * c.out_w;
  if (pixels == 0 || c.k == 0) return cudaSuccess;
  if (!aligned16(c.x, c.weight, c.residual, c.out)) return cudaErrorMisalignedAddress;
  int processors = 0;
  const cudaError_t error = use_device(processors);
  if (error != cudaSuccess) return error;
  const ClusterChoice choice = choose_cluster(pixels, c.k, int(c.r * c.s * ceil_div(c.c, kSlice)), processors);
  const auto launch_type = [&](auto type) {
    using T = typename decltype(type)::type;
    return choice.filters == 32 ? launch_cluster<ClusterTile<T, 32>>(c, choice.split, stream)
                                : launch_cluster<ClusterTile<T, 64>>(c, choice.split, stream);
  };
  return c.dtype == DType::f16 ? launch_type(Type<__half>{}) : launch_type(Type<__nv_bfloat16>{});
}

}  // namespace resnet_fast
