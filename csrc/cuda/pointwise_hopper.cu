// 1x1 convolutions over NHWC on Hopper, one or the sum of two, as a matrix product over pixels, with the shared epilogue:
//
//   out[p, k] = act(sum_c x[q(p), c] * weight[k, c] * scale[k] + shift[k] + residual[p, k])         pointwise_hopper
//   out[p, k] = relu(sum_c x[p, c] * weight[k, c] + sum_c x2[q(p), c] * weight2[k, c] + bias[k])    pointwise_pair_hopper
//
// q(p): the pixel that the stride takes for output pixel p. The pair is the end of a stage's first bottleneck, its last
// convolution and its projection, which is never written: one product over the channels of both, [x | x2] . [w | w2]^T,
// whose main loop walks the slices of x and then those of x2.
//
// Layout: x [N, H, W, C], weight [K, C], residual and out [P, K], dense, 16-byte aligned, C and K multiples of 8, strides
// up to 8; float16 or bfloat16; float32 accumulation and epilogue, one rounding on store. sm_90a only: TMA, mbarriers,
// wgmma. Tails in P, C and K are zeros that TMA reads and values that it does not write. pointwise_hopper.cuh has the
// schedule.
//
// Strides are TMA's own: a map in im2col mode steps over the pixels that are left out and goes on over the ends of lines
// and images, so a tile is 128 output pixels one after the other whatever the stride, and outputs and residuals know
// nothing of it. (Boxes of a tiled map over every second pixel would end with lines and images: of 128 rows 28 x 28 fills
// 112, and 14 x 14 and 7 x 7 want batches that divide.) So does CUTLASS 3 in strided convolutions; PTX ISA, "im2col mode",
// "Traversal Stride". DOUBT, for a GPU to settle: how fast TMA is in this mode.
//
// Floor, for P pixels: max(2 (P C + K C + P K [+ P K for the residual]) bytes / DRAM, 2 P C K / matrix units), C being the
// channels of both inputs of a pair.
// PREDICTED, nothing of it measured, for ResNet-50 at 224^2, batch 256, on an H200 (roofline.py: 4.3 TB/s, 790 TFLOP/s;
// a guess: 6.5 TB/s from L2), in microseconds; "predicted" adds L2 and the last wave of tiles to the floor:
//
//   P per image   C -> K               how often  floor       predicted  tile
//   56^2    64 ->   64                     1       48 DRAM       48      kept 128x64
//   56^2    64 ->  256 + residual          3      215 DRAM      215      kept 128x128
//   56^2    64 ->  256                     1      119 DRAM      119      kept 128x128
//   56^2   256 ->   64                     2      119 DRAM      119      kept 128x64
//   56^2   256 ->  128                     1      143 DRAM      143      kept 128x128
//   28^2   128 ->  512 + residual          4      108 DRAM      108      kept 128x128
//   28^2   512 ->  128                     3       60 DRAM       60      together 256x128
//   28^2   512 ->  256                     1       72 DRAM       72      paired   256x128
//   28^2   256 ->  512, stride 2           1       72 DRAM       72      kept 128x128
//   14^2   256 -> 1024 + residual          6       54 DRAM       54      kept 128x128
//   14^2  1024 ->  256                     5       33 matrix     34      paired   256x128
//   14^2  1024 ->  512                     1       67 matrix     67      paired   256x128
//   14^2   512 -> 1024, stride 2           1       67 matrix     67      paired   256x128
//    7^2   512 -> 2048 + residual          3       33 matrix     40      paired   256x128
//    7^2  2048 ->  512                     2       33 matrix     45      paired   256x128
//    7^2  1024 -> 2048, stride 2           1       67 matrix     67      paired   256x128
//
// Together 2.85 ms, of floors of 2.80. The pairs take the place of eight of these, 742 (734) by 446 (443):
//
//   56^2    64 +   64          ->  256     1      143 DRAM      143      kept 128x128
//   28^2   128 +  256 stride 2 ->  512     1      100 matrix    101      paired   256x128
//   14^2   256 +  512 stride 2 -> 1024     1      100 matrix    101      paired   256x128
//    7^2   512 + 1024 stride 2 -> 2048     1      100 matrix    101      paired   256x128
//
// Left out: where two groups share a tile (together, paired), nobody multiplies during their epilogues. By the machine code's
// stall counts, 30 clocks for what is read of shared memory and one instruction a clock for the two warps of a scheduler, they
// take 1,100 clocks a tile, 1,800 with a residual, beside 16 for each channel of the depth. A group that takes turns needs 950
// and 1,200, of which the other's products hide 512 for each slice.
//
// Source: K-concatenation of two linear maps with one sum; He et al. 2016; PTX ISA; CUTLASS 3 (Nvidia, 2023).
#include "launch.cuh"
#include "pointwise_hopper.cuh"
#include "tensor_map.h"

namespace resnet_fast {
namespace {

cudaError_t encode_matrix(CUtensorMap& map, DType dtype, const void* data, int64_t columns, int64_t rows, uint32_t box_rows) {
  return encode_tensor_map(map, dtype, data, {uint64_t(columns), uint64_t(rows)}, {uint64_t(columns) * 2},
                           {uint32_t(kSlice), box_rows});
}

template <class Tile>
cudaError_t encode_input(Input& input, const ConvArgs& c, int64_t pixels) {
  constexpr uint32_t kShare = Tile::kM / Tile::kBlocks;
  input.slices = int(ceil_div(c.c, kSlice)), input.stride_h = c.stride_h, input.stride_w = c.stride_w;
  input.strided = c.stride_h > 1 || c.stride_w > 1;
  const cudaError_t error =
      input.strided ? encode_im2col_map(input.x, c.dtype, c.x, uint64_t(c.n), uint64_t(c.h), uint64_t(c.w), uint64_t(c.c),
                                        uint32_t(c.stride_h), uint32_t(c.stride_w), kShare)
                    : encode_matrix(input.x, c.dtype, c.x, c.c, pixels, kShare);
  return error == cudaSuccess ? encode_matrix(input.weight, c.dtype, c.weight, c.c, c.k, Tile::kN) : error;
}

template <class T, class Tile>
cudaError_t launch_tile(const ConvArgs& c, const ConvArgs* second, int64_t pixels, int64_t processors, cudaStream_t stream) {
  PointwiseArgs p{};
  cudaError_t error = encode_input<Tile>(p.input[0], c, pixels);
  if (error == cudaSuccess && second != nullptr) error = encode_input<Tile>(p.input[1], *second, pixels);
  if (error == cudaSuccess) error = encode_matrix(p.out, c.dtype, c.out, c.k, pixels, kRows);
  if (error == cudaSuccess && c.residual != nullptr) error = encode_matrix(p.residual, c.dtype, c.residual, c.k, pixels, kRows);
  constexpr auto kernel = pointwise_hopper_kernel<T, Tile>;
  if (error == cudaSuccess) error = allow_shared<kernel>(Tile::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles_n = ceil_div(c.k, Tile::kN * Tile::kBlocks), tiles = ceil_div(pixels, Tile::kM) * tiles_n;
  if (tiles > INT32_MAX) return cudaErrorInvalidConfiguration;
  p.affine = c.affine, p.act = c.act, p.has_residual = c.residual != nullptr;
  p.tiles = uint32_t(tiles), p.tiles_n = uint32_t(tiles_n), p.out_h = uint32_t(c.out_h), p.out_w = uint32_t(c.out_w);
  p.slices = p.input[0].slices + p.input[1].slices, p.n = int(c.k);
  const int64_t most = Tile::kKept > 0 ? processors / tiles_n * tiles_n : larger(processors / Tile::kBlocks, 1);
  return launch_dependent(kernel, dim3(unsigned(smaller(tiles, most) * Tile::kBlocks)), dim3(kBlock), Tile::kBlocks,
                         Tile::kSharedBytes, stream, p);
}

template <class T>
bool register_type(const std::string& type) {
  const auto add = [&](auto tile, const char* name) {
    using Tile = typename decltype(tile)::type;
    Registration("pointwise_hopper<" + type + "," + name + ">", pointwise_hopper_kernel<T, Tile>, kBlock, Tile::kSharedBytes);
  };
  add(Type<Kept128x128>{}, "kept128x128"), add(Type<Kept128x64>{}, "kept128x64");
  add(Type<Streamed128x64>{}, "streamed128x64"), add(Type<Together256x128>{}, "together256x128");
  add(Type<Paired256x128>{}, "paired256x128");
  return true;
}

const bool registered = register_type<__half>("f16") && register_type<__nv_bfloat16>("bf16");

// One convolution, or the sum of two.
cudaError_t launch_sum(const ConvArgs& c, const ConvArgs* second, cudaStream_t stream) {
  const int64_t pixels = c.n * c.out_h * c.out_w;
  if (pixels == 0 || c.k == 0) return cudaSuccess;
  if (!aligned16(c.x, c.weight, c.residual, c.out) || (second != nullptr && !aligned16(second->x, second->weight)))
    return cudaErrorMisalignedAddress;
  int processors = 0;
  const cudaError_t error = use_device(processors);
  if (error != cudaSuccess) return error;
  const int64_t slices = ceil_div(c.c, kSlice) + (second != nullptr ? ceil_div(second->c, kSlice) : 0);
  const auto choose = [&](auto type) {
    using T = typename decltype(type)::type;
    switch (choose_hopper_tile(pixels, c.k, slices * kSlice, processors)) {
      case HopperChoice::kept128x128: return launch_tile<T, Kept128x128>(c, second, pixels, processors, stream);
      case HopperChoice::kept128x64: return launch_tile<T, Kept128x64>(c, second, pixels, processors, stream);
      case HopperChoice::streamed128x64: return launch_tile<T, Streamed128x64>(c, second, pixels, processors, stream);
      case HopperChoice::paired256x128: return launch_tile<T, Paired256x128>(c, second, pixels, processors, stream);
      default: return launch_tile<T, Together256x128>(c, second, pixels, processors, stream);
    }
  };
  return c.dtype == DType::f16 ? choose(Type<__half>{}) : choose(Type<__nv_bfloat16>{});
}

}  // namespace

cudaError_t pointwise_hopper(const ConvArgs& c, cudaStream_t stream) { return launch_sum(c, nullptr, stream); }

cudaError_t pointwise_pair_hopper(const ConvArgs& c, const ConvArgs& second, cudaStream_t stream) {
  return launch_sum(c, &second, stream);
}

}  // namespace resnet_fast
