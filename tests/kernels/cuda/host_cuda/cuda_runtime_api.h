// The part of the CUDA runtime that csrc's host code calls, for a machine that is pretended to have a GPU.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
using cudaStream_t = struct host_stream*;

namespace host_cuda {

constexpr int kSharedLimit = 99 * 1024;  // a block's, on sm_86, sm_89 and sm_120: the least of all targets
constexpr int kHopperShared = 227 * 1024;

struct Settings {
  unsigned seed = 1;      // of the order in which threads run
  int processors = 132;
  bool late_copies = true;  // cp.async lands when it is waited for, or at once: both are allowed
  unsigned first_block = 0;  // blocks before it are left out: the end of a problem too large to run
  int shared_limit = kSharedLimit;
};

inline Settings settings;
inline bool context = false;  // has this thread a context of the driver? A fresh one has none, whatever device it is on

}  // namespace host_cuda

inline cudaError_t cudaSetDevice(int) {
  host_cuda::context = true;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = host_cuda::settings.processors;
  return cudaSuccess;
}

template <class F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int bytes) {
  return bytes <= host_cuda::settings.shared_limit ? cudaSuccess : cudaErrorInvalidConfiguration;
}

enum cudaMemcpyKind { cudaMemcpyDeviceToHost };

template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) {
  *p = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}

inline cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
