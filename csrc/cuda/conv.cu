// Convolution over NHWC as an implicit matrix product, with the shared epilogue:
//
//   out[n, i, j, k] = act(sum * scale[k] + shift[k] + residual[n, i, j, k]),
//   sum = sum_{r, s, c} x[n, i * stride_h - pad_h + r * dilation_h, j * stride_w - pad_w + s * dilation_w, c]
//                       * weight[k, r, s, c],   x = 0 outside the image
//
// Rows of the product are output pixels, its depth the R S C elements of a window, taps outermost; a row of the window
// matrix exists only as addresses, worked out while fetching (tile.h: window_at, advance, element_at).
// Layout: x [N, H, W, C], weight [K, R, S, C], residual and out [N, H', W', K], all dense. float32, float16, bfloat16;
// float32 accumulation and epilogue, one rounding on store. R and S up to 16, any stride, padding, dilation; one group.
// Any C and K: multiples of 8 (float32: 4) on 16-byte aligned pointers move 16 bytes at a time, others one by one (a
// three-channel stem is such a case, and slow: it wants a kernel of its own).
// Floor, for P = N H' W' and b bytes: max((N H W C + K R S C + P K [+ P K]) b / DRAM bandwidth, 2 P R S C K / matrix
// throughput); from L2 each input element is read up to R S / (stride_h stride_w) times for every tile of filters.
// Source: implicit GEMM, cuDNN (Chetlur et al. 2014, section 3); the pipeline is gemm.cuh's.
#include "gemm.cuh"

namespace resnet_fast {
namespace {

// This thread's share of the window matrix: one chunk column, whose tap it walks along, and every kRowStep-th pixel.
template <class T, class Tile, bool kWide>
struct WindowSource {
  const T* x;
  ConvShape shape;
  Window window[Tile::kRowsA];
  Tap tap;

  __device__ WindowSource(const T* x, const ConvShape& shape, int first_m, int rows) : x(x), shape(shape) {
    tap = tap_at(threadIdx.x % kChunks * kVector<T>, shape);
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i)
      window[i] = window_at(first_m + int(threadIdx.x) / kChunks + i * Tile::kRowStep, rows, shape);
  }

  // Slices come in order, each once.
  __device__ __forceinline__ void fetch(unsigned char* shared, int) {
    const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
    Tap taps[kWide ? 1 : kVector<T>];
#pragma unroll
    for (Tap& t : taps) {
      t = tap;
      if constexpr (!kWide) advance(tap, 1, shape);
    }
#pragma unroll
    for (int i = 0; i < Tile::kRowsA; ++i) {
      unsigned char* to = shared + swizzled(row + i * Tile::kRowStep, chunk);
      if constexpr (kWide) {
        const int64_t at = element_at(window[i], tap, shape);
        cp_async16(to, x + (at >= 0 ? at : 0), at >= 0);
      } else {
        gather_chunk(to, x, [&](int e) { return element_at(window[i], taps[e], shape); });
      }
    }
    advance(tap, kWide ? kChunks * kVector<T> : (kChunks - 1) * kVector<T>, shape);
  }
};

const bool registered = register_gemm<WindowSource>("conv");

}  // namespace

cudaError_t conv(const ConvArgs& p, cudaStream_t stream) { return launch_gemm<WindowSource>(p, stream); }

}  // namespace resnet_fast
