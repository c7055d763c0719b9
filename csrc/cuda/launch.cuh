// Launching: every launch's error is returned, and a run-time dtype becomes a template argument in one place.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "../launch.h"
#include "../registry.h"
#include "vec.cuh"

namespace resnet_fast {

// cudaLaunchKernelEx and not <<<>>>: it is plain C++, so the host tests supply their own and run the kernels on the CPU.
template <class... P, class... A>
cudaError_t launch_shared(void (*kernel)(P...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream,
                          const A&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// From sm_90 on: clusters of `cluster` blocks, placed as soon as those of the kernel before have started and leave room. So
// the kernel does nothing that another could see, or see of another, before wait_for_kernels_before() (hopper.cuh).
template <class... P, class... A>
cudaError_t launch_dependent(void (*kernel)(P...), dim3 grid, dim3 block, int cluster, int shared_bytes,
                             cudaStream_t stream, const A&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = unsigned(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.attrs = attributes;
  config.numAttrs = 2;
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, const A&... args) {
  return launch_shared(kernel, grid, block, 0, stream, args...);
}

// Processors of the current device, whose context becomes this thread's: one that has launched nothing yet may have none, and
// without one the driver encodes no tensor map.
inline cudaError_t use_device(int& processors) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) : error;
}

// A kernel that wants more than 48 kB of shared memory has to be allowed to, once on each device.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // one bit a device
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t(1) << device : 0;
  if ((allowed.load() & bit) != 0) return cudaSuccess;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed |= bit;
  return error;
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the element type of `dtype`.
template <class F>
cudaError_t dispatch(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(Type<float>{});
  if (dtype == DType::f16) return f(Type<__half>{});
  return f(Type<__nv_bfloat16>{});
}

}  // namespace resnet_fast
