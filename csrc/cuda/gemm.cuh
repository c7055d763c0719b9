// The matrix product behind both convolutions, with the shared epilogue:
//
//   out[m, n] = act(sum_d A[m, d] * weight[n, d] * scale[n] + shift[n] + residual[m, n])
//
// A is whatever `Source` says row m and column d are in global memory (pointwise.cu, conv.cu); weight [N, D] and out,
// residual [M, N] are dense. A block computes one tile of the output in slices of 128 bytes of depth; slices arrive by
// cp.async, kStages - 1 ahead, into swizzled shared tiles. 16-bit types multiply on tensor cores (mma.m16n8k16,
// fragments by ldmatrix), float32 by plain FMA; both accumulate in float32. The sums go through shared memory once, so
// that residual and output move 128 bits at a time in whole rows. Tails in M, N and D are zeros on the way in and masks
// on the way out.
// Source: the multistage pipeline of CUTLASS 2 ("Efficient GEMM in CUDA"); PTX ISA, "Asynchronous copy".
#pragma once

#include "epilogue.cuh"
#include "launch.cuh"
#include "ptx.cuh"
#include "tile.h"

namespace resnet_fast {

struct GemmArgs {
  const void* a;
  const void* weight;
  const void* residual;  // null: none
  void* out;
  AffineArgs affine;
  int m, n, depth, tiles_n;
  bool wide_out;  // out and residual may be moved 128 bits at a time
  Act act;
};

// One block's product by tensor cores: each warp keeps a (kM/kWarpsM) x (kN/kWarpsN) part in registers.
template <class T, class Tile>
struct WarpProduct {
  static constexpr int kRows = Tile::kM / Tile::kWarpsM, kColumns = Tile::kN / Tile::kWarpsN;
  static constexpr int kSteps = kRows / 16, kPairs = kColumns / 16;
  float sum[kSteps][2 * kPairs][4] = {};
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 / Tile::kWarpsN * kRows,
            column = threadIdx.x / 32 % Tile::kWarpsN * kColumns;
  const int from_a = swizzled(row + fragment_a(lane).row, fragment_a(lane).chunk),
            from_b = swizzled(column + fragment_b(lane).row, fragment_b(lane).chunk);

  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      uint32_t fa[kSteps][4], fb[2 * kPairs][2];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) ldmatrix_x4(fa[i], a + further(from_a, chunk) + 16 * i * kRowBytes);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        uint32_t four[4];
        ldmatrix_x4(four, b + further(from_b, chunk) + 16 * j * kRowBytes);
        fb[2 * j][0] = four[0], fb[2 * j][1] = four[1];
        fb[2 * j + 1][0] = four[2], fb[2 * j + 1][1] = four[3];
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int j = 0; j < 2 * kPairs; ++j) mma_16816<T>(sum[i][j], fa[i], fb[j]);
    }
  }

  __device__ __forceinline__ void spill(float* staging) const {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kPairs; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Coordinates at = fragment_d(lane, half);
          *reinterpret_cast<float2*>(staging + (row + 16 * i + at.m) * Tile::kPitch + column + 8 * j + at.n) =
              make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
        }
  }
};

// The same by FMA: a thread keeps rows ty, ty + kThreadsM, ... and columns tx, tx + 16, ...: neighbours read
// neighbouring rows of a shared tile, which the swizzle keeps apart.
template <class Tile>
struct WarpProduct<float, Tile> {
  static constexpr int kThreadsN = 16, kThreadsM = Tile::kThreads / kThreadsN;
  static constexpr int kRows = Tile::kM / kThreadsM, kColumns = Tile::kN / kThreadsN;
  float sum[kRows][kColumns] = {};
  const int tx = threadIdx.x % kThreadsN, ty = threadIdx.x / kThreadsN;

  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
#pragma unroll 2
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      float4 fb[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        fb[j] = *reinterpret_cast<const float4*>(b + swizzled(tx + kThreadsN * j, chunk));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 fa = *reinterpret_cast<const float4*>(a + swizzled(ty + kThreadsM * i, chunk));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          sum[i][j] = fmaf(fa.x, fb[j].x, sum[i][j]);
          sum[i][j] = fmaf(fa.y, fb[j].y, sum[i][j]);
          sum[i][j] = fmaf(fa.z, fb[j].z, sum[i][j]);
          sum[i][j] = fmaf(fa.w, fb[j].w, sum[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void spill(float* staging) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        staging[(ty + kThreadsM * i) * Tile::kPitch + tx + kThreadsN * j] = sum[i][j];
  }
};

// The eight (float32: four) elements of one chunk, gathered one by one: for channels or pointers that 16-byte copies
// cannot take. `offset(e)` is the e-th element's, negative for zero.
template <class T, class Offset>
__device__ __forceinline__ void gather_chunk(unsigned char* shared, const T* base, Offset offset) {
  Pack<T, kVector<T>> pack;
#pragma unroll
  for (int e = 0; e < kVector<T>; ++e) {
    const int64_t at = offset(e);
    pack.v[e] = at >= 0 ? base[at] : from_float<T>(0.f);
  }
  *reinterpret_cast<Pack<T, kVector<T>>*>(shared) = pack;
}

// This thread's share of the weight tile: one chunk column, every kRowStep-th filter. Slices come in order, each once.
template <class T, class Tile, bool kWide>
struct WeightSource {
  const T* next;  // this thread's first filter at its next column
  int column;
  const int filters;  // from this thread's first to the last; may be negative

  __device__ WeightSource(const GemmArgs& p, int first)
      : column(threadIdx.x % kChunks * kVector<T>), filters(p.n - first - int(threadIdx.x) / kChunks) {
    next = static_cast<const T*>(p.weight) + int64_t(p.n - filters) * p.depth + column;
  }

  __device__ __forceinline__ void fetch(unsigned char* shared, const GemmArgs& p) {
    unsigned char* to = shared + swizzled(threadIdx.x / kChunks, threadIdx.x % kChunks);
#pragma unroll
    for (int i = 0; i < Tile::kRowsB; ++i) {
      const bool there = i * Tile::kRowStep < filters;
      const T* from = next + int64_t(i * Tile::kRowStep) * p.depth;
      if constexpr (kWide) {
        const bool valid = there && column < p.depth;
        cp_async16(to + i * Tile::kRowStep * kRowBytes, valid ? from : p.weight, valid);
      } else {
        gather_chunk(to + i * Tile::kRowStep * kRowBytes, from,
                     [&](int e) { return there && column + e < p.depth ? int64_t(e) : int64_t(-1); });
      }
    }
    next += kChunks * kVector<T>;
    column += kChunks * kVector<T>;
  }
};

// Staged sums -> affine, residual, activation -> out. A thread keeps one group of channels for all its rows, and asks for the
// residual of several before it stores the first: no load may pass a store, so one by one each would wait for DRAM.
template <class T, class Tile>
__device__ __forceinline__ void write_out(const float* staging, const Affine* affine, const GemmArgs& p, int first_m,
                                          int first_n) {
  constexpr int V = kVector<T>, kGroups = Tile::kN / V, kStep = Tile::kThreads / kGroups, kTogether = 4;
  static_assert(Tile::kM % (kStep * kTogether) == 0);
  const int column = threadIdx.x % kGroups * V, n = first_n + column, end = p.m - first_m;
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  if (n >= p.n) return;
#pragma unroll 1
  for (int first = threadIdx.x / kGroups; first < Tile::kM && first < end; first += kStep * kTogether) {
    const int64_t at = int64_t(first_m + first) * p.n + n, step = int64_t(kStep) * p.n;
    Pack<T, V> old[kTogether] = {};
    if (p.wide_out && residual != nullptr) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (first + k * kStep < end) old[k] = *reinterpret_cast<const Pack<T, V>*>(residual + at + k * step);
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      if (first + k * kStep >= end) return;
      float sum[V];
      load(staging + (first + k * kStep) * Tile::kPitch + column, sum);
      if (p.wide_out) {
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] = epilogue(sum[j], affine[column + j], to_float(old[k].v[j]), p.act);
        store(out + at + k * step, sum);
      } else {
#pragma unroll 1
        for (int j = 0; j < V && n + j < p.n; ++j) {
          const float r = residual != nullptr ? to_float(residual[at + k * step + j]) : 0.f;
          const float a = staging[(first + k * kStep) * Tile::kPitch + column + j];
          out[at + k * step + j] = from_float<T>(epilogue(a, affine[column + j], r, p.act));
        }
      }
    }
  }
}

template <class T, class Tile, template <class, class, bool> class Source, bool kWide>
__global__ void __launch_bounds__(Tile::kThreads, kWide ? Tile::kBlocks : 1)
    gemm_kernel(GemmArgs p, ConvShape shape) {
  unsigned char* const shared = dynamic_shared();
  const Coordinates tile = tile_at(blockIdx.x, p.tiles_n);
  const int first_m = tile.m * Tile::kM, first_n = tile.n * Tile::kN;
  __shared__ Affine affine[Tile::kN];
  if (threadIdx.x < Tile::kN && first_n + int(threadIdx.x) < p.n)
    affine[threadIdx.x] = load_affine(p.affine, first_n + threadIdx.x);
  constexpr int kSlice = kChunks * kVector<T>;
  const int slices = (p.depth + kSlice - 1) / kSlice;
  Source<T, Tile, kWide> source(static_cast<const T*>(p.a), shape, first_m, p.m);
  WeightSource<T, Tile, kWide> weight(p, first_n);
  WarpProduct<T, Tile> product;

  const auto fetch = [&](int slice, int slot) {
    unsigned char* a = shared + slot * Tile::kStageBytes;
    if (slice < slices) {
      source.fetch(a, slice);
      weight.fetch(a + Tile::kBytesA, p);
    }
    cp_async_commit();  // also when nothing is left: wait counts groups
  };
#pragma unroll
  for (int slice = 0; slice < Tile::kStages - 1; ++slice) fetch(slice, slice);
  int full = 0, free = Tile::kStages - 1;
  for (int slice = 0; slice < slices; ++slice) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this slice is there for all, and all have done with the slot that is filled next
    fetch(slice + Tile::kStages - 1, free);
    const unsigned char* a = shared + full * Tile::kStageBytes;
    product.add(a, a + Tile::kBytesA);
    free = full;
    full = full + 1 == Tile::kStages ? 0 : full + 1;
  }
  cp_async_wait<0>();
  __syncthreads();  // the staging area lies over the slots
  float* staging = reinterpret_cast<float*>(shared);
  product.spill(staging);
  __syncthreads();
  write_out<T, Tile>(staging, affine, p, first_m, first_n);
}

// ---- Host side

template <class T, class Tile, template <class, class, bool> class Source, bool kWide>
cudaError_t launch_tile(GemmArgs p, const ConvShape& shape, cudaStream_t stream) {
  p.tiles_n = int(ceil_div(p.n, Tile::kN));
  const int64_t blocks = ceil_div(p.m, Tile::kM) * p.tiles_n;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr auto kernel = gemm_kernel<T, Tile, Source, kWide>;
  const cudaError_t error = allow_shared<kernel>(Tile::kSharedBytes);
  return error != cudaSuccess ? error
                              : launch_shared(kernel, dim3(unsigned(blocks)), dim3(Tile::kThreads), Tile::kSharedBytes,
                                              stream, p, shape);
}

// The whole choice: element type, 16-byte or element-wise fetching, tile.
template <template <class, class, bool> class Source>
cudaError_t launch_gemm(const ConvArgs& c, cudaStream_t stream) {
  const ConvShape shape{int(c.h), int(c.w), int(c.c), int(c.r), int(c.s), int(c.out_h), int(c.out_w),
                        c.stride_h, c.stride_w, c.pad_h, c.pad_w, c.dilation_h, c.dilation_w};
  GemmArgs p{c.x, c.weight, c.residual, c.out, c.affine, int(c.n * c.out_h * c.out_w), int(c.k), int(c.c * c.r * c.s),
             0, false, c.act};
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return dispatch(c.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    p.wide_out = c.k % kVector<T> == 0 && aligned16(c.out, c.residual);
    const bool wide = c.c % kVector<T> == 0 && aligned16(c.x, c.weight);
    if constexpr (std::is_same_v<T, float>) {
      return wide ? launch_tile<T, TileFloat, Source, true>(p, shape, stream)
                  : launch_tile<T, TileFloat, Source, false>(p, shape, stream);
    } else {
      if (!wide) return launch_tile<T, Tile64x64, Source, false>(p, shape, stream);
      switch (choose_tile(p.m, p.n, processors)) {
        case TileChoice::m128n128: return launch_tile<T, Tile128x128, Source, true>(p, shape, stream);
        case TileChoice::m128n64: return launch_tile<T, Tile128x64, Source, true>(p, shape, stream);
        default: return launch_tile<T, Tile64x64, Source, true>(p, shape, stream);
      }
    }
  });
}

// Names of the 16-byte instantiations, for bindings.cpp: "pointwise<f16,128x64>".
template <template <class, class, bool> class Source, class T, class Tile>
void register_tile(const std::string& name) {
  const std::string size = std::to_string(Tile::kM) + "x" + std::to_string(Tile::kN);
  Registration(name + "," + size + ">", gemm_kernel<T, Tile, Source, true>, Tile::kThreads, Tile::kSharedBytes);
}

template <template <class, class, bool> class Source>
bool register_gemm(const std::string& file) {
  const auto add = [&](auto type, const char* dtype) {
    using T = typename decltype(type)::type;
    const std::string name = file + "<" + dtype;
    if constexpr (std::is_same_v<T, float>) {
      register_tile<Source, T, TileFloat>(name);
    } else {
      register_tile<Source, T, Tile128x128>(name);
      register_tile<Source, T, Tile128x64>(name);
      register_tile<Source, T, Tile64x64>(name);
    }
  };
  add(Type<float>{}, "f32"), add(Type<__half>{}, "f16"), add(Type<__nv_bfloat16>{}, "bf16");
  return true;
}

}  // namespace resnet_fast
