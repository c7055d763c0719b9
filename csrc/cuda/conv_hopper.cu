// 3x3 convolution with stride 1 or 2, padding and dilation 1 over NHWC on Hopper, with the shared epilogue:
//
//   out[n, i, j, k] = act(sum * scale[k] + shift[k] + residual[n, i, j, k]),
//   sum = sum_{r, s, c} x[n, t i + r - 1, t j + s - 1, c] * weight[k, r, s, c],   stride t, x = 0 outside the image
//
// Layout: x [N, H, W, C], weight [K, 3, 3, C], residual and out [N, H', W', K], dense, 16-byte aligned, C and K multiples
// of 8, W' up to 64, H and W at least t; float16 or bfloat16; float32 accumulation and epilogue, one rounding on store. sm_90a only.
//
// An implicit product reads its pixels nine times, once a tap, and L2 cannot feed that: by a model with 6.5 TB/s it stops
// a whole ResNet-50 at 43k images a second. Here TMA loads a box of pixels with its halo once for every 64 channels, and
// a tap is a shift of the matrix descriptor by whole pixels of 128 bytes (halo.h). With stride 2 that is true of four planes,
// rows and columns even or odd, which pass through the same ring one after the other with their own taps. Filters are the rows of the product
// (M = 64) and pixels its columns, because a product has any multiple of eight columns: boxes of whole rows fill 79 to
// 97 % of those, of multiples of 64 it would be 77 to 87 %. And 64 filters times 232 pixels read some 80 bytes of shared
// memory a clock, 64 x 64 would read all of its 128.
//
// A persistent block of three warp groups: in the last, one thread loads boxes and one weights; the others multiply, 64
// filters times up to 248 pixels each. With up to 64 filters each group has a box of its own, and the weights of 64
// channels stay in shared memory. With more, both share a box and its 128 filters, whose weights come tap by tap. Sums
// are turned (stmatrix) into the staging area, where the residual has arrived during the main loop, and leave by TMA
// during the next one; both clip rows, images and filters that are not there.
//
// DOUBT, for a GPU to settle (`make gpu` finds the kernel wrong if so, and tools/gpu/descriptor_probe.cu shows why): a matrix
// that begins inside a pattern of eight rows, here at any of them. The PTX ISA wants starts at multiples of 16 bytes, and a
// base offset of zero where the *pattern* starts at a multiple of 1024 ("Matrix Descriptor Format": (pattern start addr >> 7)
// & 7). It does, since TMA swizzles by absolute address, so the offset is zero for every tap. Nvidia's TensorRT-LLM too takes
// it from the pattern's address and not from the matrix's (xqa/gmma.cuh); Triton would take the matrix's, but begins at
// multiples of eight rows. With the matrix's the emulation gives wrong results. Should the hardware want that, or neither:
// without swizzle a shift by a pixel is certain (pixels of 16 bytes in core matrices of eight, one 5-D box {8, W + 1, rows,
// images, 8}, still one copy), for TMA rows of 16 bytes instead of 128.
//
// Floor, for P pixels: max(2 (P C + 9 K C + P K [+ P K for the residual]) bytes / DRAM, 18 P C K / matrix units).
// PREDICTED, nothing of it measured, for ResNet-50 at 224^2, batch 256, on an H200 (roofline.py: 4.3 TB/s, 790 TFLOP/s;
// guesses: 6.5 TB/s from L2, 0.5 us for the epilogue of a tile of 128 filters), in microseconds; "predicted" is rounds of
// 132 tiles x (max(all columns on the matrix units, L2) + epilogue); last, what triton.conv_tma's own model gives it:
//
//   layer  H = W  C = K   floor          box               columns used   rounds   L2   predicted   conv_tma
//   1      56       64    75 (DRAM 48)   4 rows            232   97 %     14       41       80        202
//   2      28      128    75 (DRAM 24)   7 rows            208   94 %      8       67       86        120
//   3      14      256    75 (DRAM 12)   an image          216   91 %      4       61       87        116
//   4       7      512    75 (DRAM  7)   4 images          248   79 %      2       61       99        126
//   stride 2, to
//   2      28      128    75 (DRAM 60)   7 rows            208   94 %      8       92       96        120
//   3      14      256    75 (DRAM 30)   an image          216   91 %      4       87       89        116
//   4       7      512    75 (DRAM 15)   4 images          248   79 %      2       90       99        139
//
// Left for a measurement to ask for: weights multicast to two blocks (they are most of L2's bytes), groups a few taps
// apart so that one's epilogue hides behind the other's products, less padding at 7 x 7.
// Source: implicit GEMM, Chetlur et al. 2014 (cuDNN); schedules of CUTLASS 3 (Nvidia, 2023); PTX ISA.
#include "epilogue.cuh"
#include "halo.h"
#include "hopper.cuh"
#include "launch.cuh"
#include "tensor_map.h"
#include "tile.h"

namespace resnet_fast {
namespace {

constexpr int kGroup = 128;                // threads of a warp group
constexpr int kHaloThreads = 3 * kGroup;   // two multiply, one loads
constexpr int kHaloShared = 227 * 1024;    // what a block may have
constexpr int kSlots = 2;                  // boxes in flight
constexpr int kLoadRegisters = 40, kMathRegisters = 232;  // 40 + 2 * 232 = 3 * 168, what the launch gives
constexpr int kSlice = kRowBytes / 2;      // channels of a pixel's 128 bytes

// The columns of a product, and what the two groups share: one box for 128 filters, or 64 filters for two boxes.
template <class T_, int kColumns_, int kBoxes_>
struct HaloTile {
  using T = T_;
  static constexpr int kColumns = kColumns_, kBoxes = kBoxes_;
  static constexpr int kFilters = kBoxes == 1 ? 128 : 64;
  static constexpr int kStages = kBoxes == 1 ? 4 : kTaps;  // weights in flight: 64 kB, or all of 64 channels, which stay
  static constexpr int kWeightBytes = kFilters * kRowBytes;
  static constexpr int kStagingBytes = kColumns * kRowBytes + kPatternBytes;  // a group's; the last row for padding
};

struct HaloArgs {
  CUtensorMap x[4], weight, residual, out;  // x: plane by plane
  AffineArgs affine;
  Halo halo;
  int batch, filters, slices, tiles, tiles_n, slot_bytes;
  bool resident, has_residual;  // resident: all weights fit, and stay for all tiles
  Act act;
};

struct HaloBarriers {
  uint64_t box_full[kSlots], box_free[kSlots], weight_full[kTaps], weight_free[kTaps], residual[2];
};

// Shared memory: boxes, weights, a staging area for each group, barriers, and for each column its pixel's row of the
// staging area, as where chunk 0 of it lies.
template <class Tile>
struct HaloShared {
  unsigned char *boxes, *weights, *staging;
  HaloBarriers* barriers;
  uint16_t* places;

  RF_HD explicit HaloShared(unsigned char* shared, int slot_bytes)
      : boxes(shared), weights(boxes + kSlots * slot_bytes), staging(weights + Tile::kStages * Tile::kWeightBytes),
        barriers(reinterpret_cast<HaloBarriers*>(staging + 2 * Tile::kStagingBytes)),
        places(reinterpret_cast<uint16_t*>(barriers + 1)) {}

  static int bytes(int slot_bytes) {
    return kSlots * slot_bytes + Tile::kStages * Tile::kWeightBytes + 2 * Tile::kStagingBytes + sizeof(HaloBarriers) +
           Tile::kColumns * sizeof(uint16_t);
  }
};

// One thread: every slice and plane of every box this block works on, each with all its halo in one copy.
template <class Tile>
__device__ __forceinline__ void load_boxes(const HaloArgs& p, const HaloShared<Tile>& shared) {
  Ring ring{0};
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x)
    for (int slice = 0; slice < p.slices; ++slice)
      for (int plane = p.halo.planes() - 1; plane >= 0; --plane)
        for (int b = 0; b < Tile::kBoxes; ++b, ring.step(1, kSlots)) {
          const HaloBox box = halo_box(p.halo, tile / p.tiles_n * Tile::kBoxes + b, p.batch);
          uint64_t* const full = &shared.barriers->box_full[ring.slot];
          mbarrier_wait(&shared.barriers->box_free[ring.slot], ring.parity ^ 1);
          mbarrier_expect(full, p.halo.box_pixels() * kRowBytes);
          tma_load(shared.boxes + ring.slot * p.slot_bytes, &p.x[plane], full, {slice * kSlice, -1, box.row - 1, box.image});
        }
}

// One thread: the weights of every slice and tap of every tile, or once if they all fit.
template <class Tile>
__device__ __forceinline__ void load_weights(const HaloArgs& p, const HaloShared<Tile>& shared) {
  Ring ring{0};
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    for (int slice = 0; slice < p.slices; ++slice)
      for (int i = 0; i < kTaps; ++i, ring.step(1, Tile::kStages)) {
        const int tap = p.halo.tap(i);
        uint64_t* const full = &shared.barriers->weight_full[ring.slot];
        mbarrier_wait(&shared.barriers->weight_free[ring.slot], ring.parity ^ 1);
        mbarrier_expect(full, Tile::kWeightBytes);
        tma_load(shared.weights + ring.slot * Tile::kWeightBytes, &p.weight, full,
                 {slice * kSlice, tap % 3, tap / 3, tile % p.tiles_n * Tile::kFilters});
      }
    if (p.resident) return;
  }
}

// A group's sums -> affine, residual, activation -> staging area, where the residual lies at the same place. They are
// turned from filters x pixels to pixels x filters, and the swizzle keeps either side from meeting a bank twice.
template <class Tile, bool kResidual>
__device__ __forceinline__ void finish(const float (&sum)[Tile::kColumns / 2], const Affine (&affine)[2], Act act,
                                       const uint16_t* places, unsigned char* staging) {
  using T = typename Tile::T;
  constexpr int kMatrices = Tile::kColumns / 8, kTogether = 8;  // read before the first is replaced, so that they wait together
  const int lane = threadIdx.x % 32, chunk = threadIdx.x % kGroup / 32 * 2 + lane / 8 % 2;
#pragma unroll
  for (int first = 0; first < kMatrices; first += kTogether) {
    unsigned char* row[kTogether];
    Pack<T, 2> old[kTogether][2], made[2];
#pragma unroll
    for (int k = 0; k < kTogether && first + k < kMatrices; ++k)
      row[k] = staging + further(places[8 * (first + k) + lane % 8], chunk);
#pragma unroll
    for (int k = 0; k < kTogether && first + k < kMatrices; ++k)
      if constexpr (kResidual) ldmatrix_x2_trans(old[k], row[k]);
#pragma unroll
    for (int k = 0; k < kTogether && first + k < kMatrices; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float r = kResidual ? to_float(old[k][half].v[i]) : -0.f;  // which changes nothing, and costs no addition
          made[half].v[i] = from_float<T>(epilogue(sum[4 * (first + k) + 2 * half + i], affine[half], r, act));
        }
      stmatrix_x2_trans(row[k], made);
    }
  }
}

// A group: products of its box and its filters, then the epilogue, for every tile of this block.
template <class Tile>
__device__ __forceinline__ void multiply(const HaloArgs& p, const HaloShared<Tile>& shared) {
  using T = typename Tile::T;
  HaloBarriers& barriers = *shared.barriers;
  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup, lane = threadIdx.x % 32;
  unsigned char* const staging = shared.staging + group * Tile::kStagingBytes;
  const int own_box = Tile::kBoxes == 2 ? group : 0, own_filters = Tile::kBoxes == 2 ? 0 : 64 * group;
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  Ring box_ring{own_box}, weight_ring{0};
  unsigned parity = 0;
  for (int tile = blockIdx.x; tile < p.tiles; tile += gridDim.x, parity ^= 1) {
    const HaloBox box = halo_box(p.halo, tile / p.tiles_n * Tile::kBoxes + own_box, p.batch);
    const int first = tile % p.tiles_n * Tile::kFilters + own_filters;
    const int at[] = {first, 0, box.row, box.image};
    Affine affine[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int filter = first + thread / 32 * 16 + fragment_d(lane, half).m;
      affine[half] = filter < p.filters ? load_affine(p.affine, filter) : Affine{0.f, 0.f};
    }

    float sum[Tile::kColumns / 2];
    if (p.resident) weight_ring = {0};
    uint64_t *read_weights = nullptr, *read_box = nullptr;  // by the products before the last
    uint64_t pixel = 0;
    for (int slice = 0; slice < p.slices; ++slice) {
#pragma unroll 1
      for (int i = 0; i < kTaps; ++i, weight_ring.step(1, Tile::kStages)) {
        if (i == 0 || p.halo.last_of_plane(i - 1)) {
          mbarrier_wait(&barriers.box_full[box_ring.slot], box_ring.parity);
          pixel = matrix_descriptor(shared_address(shared.boxes + box_ring.slot * p.slot_bytes));
        }
        mbarrier_wait(&barriers.weight_full[weight_ring.slot], weight_ring.parity);
        const uint64_t filter = matrix_descriptor(
            shared_address(shared.weights + weight_ring.slot * Tile::kWeightBytes + own_filters * kRowBytes));
        const uint64_t shifted = further_descriptor(pixel, p.halo.shift(p.halo.tap(i)) * kRowBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kRowBytes; step += 2 * kChunkBytes)
          wgmma<T, Tile::kColumns>(sum, further_descriptor(filter, step), further_descriptor(shifted, step),
                                   slice + i + step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        // By now the last tile has left the staging area, mostly, and the residual has half a slice's time to arrive.
        if (slice == 0 && i == kTaps / 2 && thread == 0) {
          tma_store_wait_read<0>();
          if (p.has_residual) {
            mbarrier_expect(&barriers.residual[group], p.halo.pixels() * kRowBytes);
            tma_load(staging, &p.residual, &barriers.residual[group], at);
          }
        }
        if (read_weights != nullptr) release(read_weights);
        if (read_box != nullptr) release(read_box);
        read_weights = p.resident ? nullptr : &barriers.weight_free[weight_ring.slot];
        read_box = nullptr;
        if (p.halo.last_of_plane(i)) {
          read_box = &barriers.box_free[box_ring.slot];
          box_ring.step(Tile::kBoxes, kSlots);
          if (Tile::kBoxes == kSlots) {  // the next box wants the same slot
            wgmma_wait<0>();
            release(read_box), read_box = nullptr;
          }
        }
      }
    }
    wgmma_wait<0>(sum);
    if (read_weights != nullptr) release(read_weights);
    if (read_box != nullptr) release(read_box);

    named_barrier(1 + group, kGroup);  // the staging area is free
    if (p.has_residual) {
      mbarrier_wait(&barriers.residual[group], parity);
      finish<Tile, true>(sum, affine, p.act, shared.places, staging);
    } else {
      finish<Tile, false>(sum, affine, p.act, shared.places, staging);
    }
    fence_proxy_async();
    named_barrier(1 + group, kGroup);
    if (thread == 0) {
      tma_store(&p.out, staging, at);
      tma_store_commit();
    }
  }
  if (thread == 0) tma_store_wait<0>();
}

template <class Tile>
__global__ void __launch_bounds__(kHaloThreads, 1)
    conv_hopper_kernel(const __grid_constant__ HaloArgs p) {
  if constexpr (kHopper) {
    const HaloShared<Tile> shared(hopper_shared(), p.slot_bytes);
    HaloBarriers& barriers = *shared.barriers;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kSlots; ++i) {
        mbarrier_init(&barriers.box_full[i], 1);
        mbarrier_init(&barriers.box_free[i], 8 / Tile::kBoxes);  // one arrival a warp that reads it
      }
      for (int group = 0; group < 2; ++group) mbarrier_init(&barriers.residual[group], 1);
      for (int i = 0; i < Tile::kStages; ++i) {
        mbarrier_init(&barriers.weight_full[i], 1);
        mbarrier_init(&barriers.weight_free[i], 8);
      }
      mbarrier_init_fence();
      tma_prefetch(&p.x[0]), tma_prefetch(&p.weight), tma_prefetch(&p.out);
      if (p.has_residual) tma_prefetch(&p.residual);
    }
    for (int n = threadIdx.x; n < Tile::kColumns; n += kHaloThreads) {
      const int pixel = p.halo.pixel(n);
      shared.places[n] = uint16_t(swizzled(pixel >= 0 ? pixel : Tile::kColumns, 0));
    }
    for (int i = threadIdx.x; i < kSlots * p.halo.tail * (kRowBytes / 4); i += kHaloThreads) {
      const int slot = i % kSlots, word = i / kSlots;
      store_for_async(shared.boxes + slot * p.slot_bytes + p.halo.box_pixels() * kRowBytes + 4 * word, 0);
    }
    fence_proxy_async();
    wait_for_kernels_before();
    __syncthreads();
    if (threadIdx.x / kGroup == 2) {
      registers_down<kLoadRegisters>();
      if (threadIdx.x == 2 * kGroup) load_boxes<Tile>(p, shared);
      if (threadIdx.x == 2 * kGroup + 32) load_weights<Tile>(p, shared);
    } else {
      registers_up<kMathRegisters>();
      multiply<Tile>(p, shared);
    }
  } else {
    trap();  // the binary lacks sm_90a, and the caller did not look
  }
}

// ---- Host side

template <class Tile>
cudaError_t launch_halo(const ConvArgs& c, const Halo& halo, int processors, cudaStream_t stream) {
  HaloArgs p{};
  p.affine = c.affine, p.halo = halo, p.act = c.act, p.has_residual = c.residual != nullptr;
  p.batch = int(c.n), p.filters = int(c.k), p.slices = int(ceil_div(c.c, kSlice));
  p.tiles_n = int(ceil_div(c.k, Tile::kFilters)), p.slot_bytes = halo_slot(halo, Tile::kColumns) * kRowBytes;
  p.resident = p.slices * kTaps <= Tile::kStages && p.tiles_n == 1;
  const int64_t tiles = ceil_div(halo.boxes(p.batch), Tile::kBoxes) * p.tiles_n;
  const int shared = HaloShared<Tile>::bytes(p.slot_bytes);
  if (halo.rows == 0 || shared > kHaloShared || tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  p.tiles = int(tiles);
  constexpr uint64_t size = sizeof(typename Tile::T);
  const uint64_t w = uint64_t(c.w), h = uint64_t(c.h), n = uint64_t(c.n), stride = uint64_t(halo.stride);
  const uint64_t pixel = uint64_t(c.c) * size, tap = pixel;
  cudaError_t error = cudaSuccess;
  for (uint64_t plane = 0; plane < uint64_t(halo.planes()) && error == cudaSuccess; ++plane) {
    const uint64_t down = plane / 2, right = plane % 2;  // of its first pixel
    error = encode_tensor_map<4>(p.x[plane], c.dtype, static_cast<const unsigned char*>(c.x) + (down * w + right) * pixel,
                                 {uint64_t(c.c), (w - right + stride - 1) / stride, (h - down + stride - 1) / stride, n},
                                 {stride * pixel, stride * w * pixel, h * w * pixel},
                                 {kSlice, uint32_t(halo.pitch), uint32_t(halo.box_rows), uint32_t(halo.images)});
  }
  const auto made = [&](CUtensorMap& map, const void* data) {
    const uint64_t at = uint64_t(c.k) * size, row = at * uint64_t(c.out_w);
    return encode_tensor_map<4>(map, c.dtype, data, {uint64_t(c.k), uint64_t(c.out_w), uint64_t(c.out_h), n},
                                {at, row, row * uint64_t(c.out_h)},
                                {kSlice, uint32_t(halo.width), uint32_t(halo.rows), uint32_t(halo.images)});
  };
  if (error == cudaSuccess) error = made(p.out, c.out);
  if (error == cudaSuccess && p.has_residual) error = made(p.residual, c.residual);
  if (error == cudaSuccess)
    error = encode_tensor_map<4>(p.weight, c.dtype, c.weight, {uint64_t(c.c), 3, 3, uint64_t(c.k)},
                                 {tap, 3 * tap, kTaps * tap}, {kSlice, 1, 1, Tile::kFilters});
  if (error == cudaSuccess) error = allow_shared<conv_hopper_kernel<Tile>>(kHaloShared);
  if (error != cudaSuccess) return error;
  return launch_dependent(conv_hopper_kernel<Tile>, dim3(unsigned(smaller(p.tiles, processors))), dim3(kHaloThreads), 1,
                          shared, stream, p);
}

template <class T>
cudaError_t launch_best(const ConvArgs& c, int processors, cudaStream_t stream) {
  const int h = int(c.out_h), w = int(c.out_w);
  if (c.k <= 64) return launch_halo<HaloTile<T, 232, 2>>(c, make_halo(h, w, 232, c.stride_h), processors, stream);
  const int columns = choose_columns(int(c.n), h, w, int(ceil_div(c.k, 128)), processors);
  const Halo halo = make_halo(h, w, columns, c.stride_h);
  switch (columns) {
    case 208: return launch_halo<HaloTile<T, 208, 1>>(c, halo, processors, stream);
    case 216: return launch_halo<HaloTile<T, 216, 1>>(c, halo, processors, stream);
    default: return launch_halo<HaloTile<T, 248, 1>>(c, halo, processors, stream);
  }
}

// Named by filters and columns: "conv_hopper<f16,64x464>" has two boxes of 232.
template <class Tile>
void register_halo(const std::string& dtype) {
  const std::string size = std::to_string(Tile::kFilters) + "x" + std::to_string(Tile::kBoxes * Tile::kColumns);
  Registration("conv_hopper<" + dtype + "," + size + ">", conv_hopper_kernel<Tile>, kHaloThreads, kHaloShared);
}

template <class T>
bool register_type(const std::string& dtype) {
  register_halo<HaloTile<T, 232, 2>>(dtype), register_halo<HaloTile<T, 208, 1>>(dtype);
  register_halo<HaloTile<T, 216, 1>>(dtype), register_halo<HaloTile<T, 248, 1>>(dtype);
  return true;
}

const bool registered = register_type<__half>("f16") && register_type<__nv_bfloat16>("bf16");

}  // namespace

cudaError_t conv_hopper(const ConvArgs& c, cudaStream_t stream) {
  if (c.n * c.h * c.w * c.k == 0) return cudaSuccess;
  const bool strided = c.stride_h == 2 && c.h > 1 && c.w > 1;  // all four planes have pixels
  if (c.stride_w != c.stride_h || !(strided || c.stride_h == 1)) return cudaErrorInvalidValue;
  if (c.c % 8 != 0 || c.k % 8 != 0 || !aligned16(c.x, c.weight, c.residual, c.out)) return cudaErrorInvalidValue;
  int processors = 0;
  const cudaError_t error = use_device(processors);
  if (error != cudaSuccess) return error;
  if (c.dtype == DType::f16) return launch_best<__half>(c, processors, stream);
  return c.dtype == DType::bf16 ? launch_best<__nv_bfloat16>(c, processors, stream) : cudaErrorInvalidValue;
}

}  // namespace resnet_fast
