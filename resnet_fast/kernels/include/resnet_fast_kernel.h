// One .cu file as a kernel of resnet_fast, given to use(), `check --kernel` and `bench --kernel`. No torch header, so it
// compiles in seconds. The file defines two functions and names itself once:
//
//   const char* supports(const Conv&);   // nullptr, or the sentence why not; the pointers are null when it is asked
//   cudaError_t launch(const Conv&);     // on conv.stream; neither allocates nor synchronises
//   RESNET_FAST_KERNEL("experimental.mine", supports, launch)
//
// What launch computes, with i = p * stride_h - pad_h + y * dilation_h, j likewise, and c inside the group of k:
//
//   out[n, p, q, k] = act(scale[k] * sum_{y, z, c} x[n, i, j, c] * filter[k, y, z, c] + shift[k] + residual[n, p, q, k])
//
// x, filter, residual and out lie dense in NHWC and are of one dtype, scale and shift are float32; act is ReLU or nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace resnet_fast {

struct Conv {
  const void *x, *filter;
  const float *scale, *shift;
  const void* residual;  // null: none
  void* out;
  int64_t n, c, h, w, k, r, s, out_h, out_w;  // the filter is r high and s wide
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
  bool relu, has_residual;
  std::string dtype;  // "float32", "float16" or "bfloat16"
  cudaStream_t stream;

  int64_t pixels() const { return n * out_h * out_w; }
  bool pointwise() const { return r == 1 && s == 1 && pad_h == 0 && pad_w == 0 && groups == 1; }
};

__host__ __device__ inline float to_float(float v) { return v; }
__host__ __device__ inline float to_float(__half v) { return __half2float(v); }
__host__ __device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__host__ __device__ inline void round_to(float& to, float v) { to = v; }
__host__ __device__ inline void round_to(__half& to, float v) { to = __float2half_rn(v); }
__host__ __device__ inline void round_to(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }

// One launch; its error is the result. The arguments need only convert to the kernel's parameters.
template <class... P, class... A>
cudaError_t run(void (*kernel)(P...), dim3 grid, dim3 block, int shared_bytes, cudaStream_t stream, const A&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// f(T{}) for the element type of a call.
template <class F>
cudaError_t with_dtype(const Conv& conv, F&& f) {
  if (conv.dtype == "float32") return f(float{});
  if (conv.dtype == "float16") return f(__half{});
  return f(__nv_bfloat16{});
}

inline Conv conv_of(const std::array<uintptr_t, 6>& at, const std::array<int64_t, 9>& size, const std::array<int, 7>& how, bool relu,
                    bool has_residual, const std::string& dtype, uintptr_t stream) {
  return {reinterpret_cast<const void*>(at[0]), reinterpret_cast<const void*>(at[1]), reinterpret_cast<const float*>(at[2]),
          reinterpret_cast<const float*>(at[3]), reinterpret_cast<const void*>(at[4]), reinterpret_cast<void*>(at[5]),
          size[0], size[1], size[2], size[3], size[4], size[5], size[6], size[7], size[8],
          how[0], how[1], how[2], how[3], how[4], how[5], how[6],
          relu, has_residual, dtype, reinterpret_cast<cudaStream_t>(stream)};
}

template <class... A>
std::string declines(const char* (*supports)(const Conv&), const A&... args) {
  const char* reason = supports(conv_of(args...));
  return reason ? reason : "";
}

template <class... A>
void call(const char* id, cudaError_t (*launch)(const Conv&), const A&... args) {
  const cudaError_t error = launch(conv_of(args...));
  if (error != cudaSuccess) throw std::runtime_error(std::string(id) + ": " + cudaGetErrorString(error));
}

using Pointers = std::array<uintptr_t, 6>;
using Sizes = std::array<int64_t, 9>;
using Geometry = std::array<int, 7>;

}  // namespace resnet_fast

#define RESNET_FAST_KERNEL(name, supports, launch)                                                                                   \
  PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {                                                                                    \
    using namespace resnet_fast;                                                                                                     \
    module.attr("id") = name;                                                                                                        \
    module.def("declines", [](const Pointers& at, const Sizes& size, const Geometry& how, bool relu, bool residual,                  \
                              const std::string& dtype, uintptr_t stream) {                                                          \
      return declines(supports, at, size, how, relu, residual, dtype, stream);                                                       \
    });                                                                                                                              \
    module.def("launch", [](const Pointers& at, const Sizes& size, const Geometry& how, bool relu, bool residual,                    \
                            const std::string& dtype, uintptr_t stream) {                                                            \
      call(name, launch, at, size, how, relu, residual, dtype, stream);                                                              \
    });                                                                                                                              \
  }
