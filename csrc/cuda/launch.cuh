// Launching: every launch's error is returned, and a run-time dtype becomes a template argument in one place.
#pragma once

#include <cuda_runtime.h>

#include "../launch.h"
#include "../registry.h"
#include "vec.cuh"

namespace resnet_fast {

// One launch. The host tests supply their own, which walks the grid on the CPU.
#ifndef RF_HOST_LAUNCH
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, cudaStream_t stream, const A&... args) {
  kernel<<<grid, block, 0, stream>>>(args...);
  return cudaGetLastError();
}
#endif

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
