// Settles the DOUBT of conv_hopper.cu on the GPU itself, apart from any kernel: where wgmma finds a matrix that begins inside
// a pattern of eight rows. Multiplies such matrices, as either operand and with either stride that the kernels use, by the
// identity, once with the base offset of the pattern (zero, as the kernels have it) and once with that of the matrix (its
// first row), and prints the first rows from which the result is right, a line a case:
//
//   operand a, stride 1280, base offset of the pattern: right from rows 0 1 2 3 4 5 6 7
//
// `make gpu` builds and runs it: nvcc -std=c++17 -I csrc -gencode arch=compute_90a,code=sm_90a descriptor_probe.cu
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"
#include "cuda/tile.h"

using namespace resnet_fast;

constexpr int kRows = 96, kSide = 64, kMatrixBytes = kRows * kRowBytes;  // 7 + 7 * 10 + 8 rows are read at most

RF_HD float element(int row, int column) { return float((row * 5 + column * 3) % 31 - 15); }

__device__ __forceinline__ void put(unsigned char* matrix, int row, int column, float value) {
  auto* at = reinterpret_cast<__half*>(matrix + swizzled(row, column / 8)) + column % 8;
  *at = __float2half_rn(value);
}

// out[i][j] = the matrix's element (i, j), or (j, i) where it is operand b.
__global__ void __launch_bounds__(128, 1) probe(int first_row, int stride, int base, bool as_b, float* out) {
  if constexpr (kHopper) {
    unsigned char *const matrix = hopper_shared(), *const identity = matrix + kMatrixBytes;
    for (int i = threadIdx.x; i < kRows * kSide; i += 128) {
      put(matrix, i / kSide, i % kSide, element(i / kSide, i % kSide));
      if (i < kSide * kSide) put(identity, i / kSide, i % kSide, i / kSide == i % kSide ? 1.f : 0.f);
    }
    fence_proxy_async();
    __syncthreads();
    const uint64_t start = matrix_descriptor(shared_address(matrix) + first_row * kRowBytes, stride) | uint64_t(base) << 49;
    const uint64_t one = matrix_descriptor(shared_address(identity));
    float sum[kSide / 2];
    wgmma_fence();
    for (int k = 0; k < kRowBytes; k += 32)
      wgmma<__half, kSide>(sum, further_descriptor(as_b ? one : start, k), further_descriptor(as_b ? start : one, k), k > 0);
    wgmma_commit();
    wgmma_wait<0>(sum);
#pragma unroll
    for (int i = 0; i < kSide / 2; ++i) {
      const int row = threadIdx.x / 32 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4;
      out[row * kSide + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = sum[i];
    }
  }
}

bool right(int first_row, int stride, int base, bool as_b, float* device) {
  std::vector<float> out(kSide * kSide);
  cudaMemset(device, 0xff, out.size() * sizeof(float));
  cudaError_t error =
      launch_shared(probe, dim3(1), dim3(128), kMatrixBytes + kSide * kRowBytes, nullptr, first_row, stride, base, as_b, device);
  if (error == cudaSuccess) error = cudaMemcpy(out.data(), device, out.size() * sizeof(float), cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) {
    std::printf("failed: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
  for (int i = 0; i < kSide; ++i)
    for (int k = 0; k < kSide; ++k)
      if (out[as_b ? k * kSide + i : i * kSide + k] != element(first_row + i / 8 * (stride / kRowBytes) + i % 8, k)) return false;
  return true;
}

int main() {
  float* device = nullptr;
  if (cudaMalloc(&device, kSide * kSide * sizeof(float)) != cudaSuccess) {
    std::printf("failed: no memory on the GPU, or no GPU\n");
    return 1;
  }
  for (bool as_b : {false, true})
    for (int stride : {1024, 1280})
      for (bool of_matrix : {false, true}) {
        std::printf("operand %c, stride %d, base offset of the %s: right from rows", as_b ? 'b' : 'a', stride,
                    of_matrix ? "matrix" : "pattern");
        for (int row = 0; row < 8; ++row)
          if (right(row, stride, of_matrix ? row : 0, as_b, device)) std::printf(" %d", row);
        std::printf("\n");
      }
  return 0;
}
