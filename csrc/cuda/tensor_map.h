// Tensor maps: what TMA needs to know of a tensor in global memory and of the box it copies. The driver encodes them; its
// function is asked for at run time, so the extension links no libcuda and still loads where there is no driver.
// Source: CUDA driver API, "Tensor Map Object Management".
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <type_traits>

#include "../args.h"

namespace resnet_fast {

// `size` elements in each of D dimensions, innermost first, `stride` bytes from one index of dimension i + 1 to the
// next (multiples of 16; the innermost is dense), and the box (each side at most 256, the innermost 128 bytes at most:
// shared tiles are swizzled over 128 bytes). `data` is a multiple of 16. A map is a snapshot of all that.
template <int D>
inline cudaError_t encode_tensor_map(CUtensorMap& map, DType dtype, const void* data, const uint64_t (&size)[D],
                                     const uint64_t (&stride)[D - 1], const uint32_t (&box)[D]) {
  static_assert(D >= 2 && D <= 5);
  using Encode = std::remove_pointer_t<decltype(&cuTensorMapEncodeTiled)>;
  static Encode* const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode*>(found) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      &map, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, D,
      const_cast<void*>(data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace resnet_fast
