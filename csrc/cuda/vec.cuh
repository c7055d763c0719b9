// 128-bit loads and stores, and the only place where 16-bit floats become float32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../args.h"
#include "index.h"

namespace resnet_fast {

template <class T>
constexpr int kVector = 16 / int(sizeof(T));  // elements in 128 bits

RF_HD float to_float(float v) { return v; }
RF_HD float to_float(__half v) { return __half2float(v); }
RF_HD float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
RF_HD T from_float(float v);
template <>
RF_HD float from_float<float>(float v) { return v; }
template <>
RF_HD __half from_float<__half>(float v) { return __float2half_rn(v); }
template <>
RF_HD __nv_bfloat16 from_float<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// V elements. At most 16-byte aligned, as aligned16() asks of pointers: promised 32 bytes, nvcc 13 makes 32-byte loads for
// compute capability 10 and 12, which fault at an odd multiple of 16.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <class T, int V>
RF_HD void load(const T* p, float (&out)[V]) {
  const auto pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; ++i) out[i] = to_float(pack.v[i]);
}

template <class T, int V>
RF_HD void store(T* p, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) pack.v[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// For the few per-channel values of an epilogue, where a template per dtype would multiply every kernel by three.
RF_HD float load_as_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::f16) return to_float(static_cast<const __half*>(p)[i]);
  if (dtype == DType::bf16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return static_cast<const float*>(p)[i];
}

// May these pointers be read and written 128 bits at a time? Null pointers (absent tensors) may.
template <class... P>
inline bool aligned16(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

}  // namespace resnet_fast
