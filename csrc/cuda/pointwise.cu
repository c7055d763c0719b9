// 1x1 convolution over NHWC, a matrix product over pixels, with the shared epilogue:
//
//   out[p, k] = act(sum_c x[pixel(p), c] * weight[k, c] * scale[k] + shift[k] + residual[p, k])
//
// pixel(p) = p for stride 1; else output pixel (n, i, j) reads input pixel (n, i * stride_h, j * stride_w).
// Layout: x [N, H, W, C], weight [K, C], residual and out [N, H', W', K], all dense. float32, float16, bfloat16;
// float32 accumulation and epilogue, one rounding on store.
// Any C and K: multiples of 8 (float32: 4) on 16-byte aligned pointers move 16 bytes at a time, others one by one.
// Floor, for P = N H' W' pixels of b bytes: max((P C + K C + P K [+ P K for the residual]) b / DRAM bandwidth,
// 2 P C K / matrix throughput). In 16 bits that is up to C K / (C + K) FLOP a byte: 32 for 64 -> 64 channels, 410 for
// 512 -> 2048; an H200 turns from DRAM to the matrix units at about 180.
// Source: the GEMM view of 1x1 convolution is cuDNN's (Chetlur et al. 2014); the pipeline is gemm.cuh's.
#include "gemm.cuh"

namespace resnet_fast {
namespace {

// This thread's share of the pixel tile: one chunk column, every kRowStep-th pixel.
template <class T, class Tile, bool kWide>
struct PointwiseSource {
  const T* x;
  int channels;
  int pixel[Tile::kRowsA];  // of the input; negative beyond the last

  __device__ PointwiseSource(const T* x, const ConvShape& shape, int first_m, int rows)
      : x(x), channels(shape.channels) {
    const bool dense = shape.stride_h == 1 && shape.stride_w == 1;
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) {
      const int m = first_m + int(threadIdx.x) / kChunks + i * Tile::kRowStep;
      pixel[i] = m >= rows ? -1 : dense ? m : window_at(m, rows, shape).base;
    }
  }

  __device__ __forceinline__ void fetch(unsigned char* shared, int slice) const {
    const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    const int c = (slice * kChunks + chunk) * kVector<T>;
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) {
      unsigned char* to = shared + swizzled(row + i * Tile::kRowStep, chunk);
      const int64_t at = int64_t(pixel[i]) * channels + c;
      if constexpr (kWide) {
        const bool valid = pixel[i] >= 0 && c < channels;
        cp_async16(to, x + (valid ? at : 0), valid);
      } else {
        gather_chunk(to, x, [&](int e) { return pixel[i] >= 0 && c + e < channels ? at + e : int64_t(-1); });
      }
    }
  }
};

const bool registered = register_gemm<PointwiseSource>("pointwise");

}  // namespace

cudaError_t pointwise(const ConvArgs& p, cudaStream_t stream) { return launch_gemm<PointwiseSource>(p, stream); }

}  // namespace resnet_fast
