// Launching: every launch's error is returned, and a run-time dtype becomes a template argument in one place.
#pragma once

#include <cuda_runtime.h>

#include "../launch.h"
#include "../registry.h"
#include "vec.cuh"

namespace resnet_fast {

// One launch with `shared_bytes` of dynamic shared memory. cudaLaunchKernelEx and not <<<>>>: it is plain C++, so the
// host tests supply their own and run the kernels on the CPU.
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

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, const A&... args) {
  return launch_shared(kernel, grid, block, 0, stream, args...);
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
