// Tensor maps: what TMA needs to know of a tensor in global memory and of the box it copies. The driver encodes them; its
// functions are asked for at run time, so the extension links no libcuda and still loads where there is no driver.
// Source: CUDA driver API, "Tensor Map Object Management".
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../args.h"

namespace resnet_fast {

// A function of the driver as of CUDA 12.0; null where there is none.
template <class F>
F* driver_function(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<F*>(found) : nullptr;
}

inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// `size` elements in each of D dimensions, innermost first, `stride` bytes from one index of dimension i + 1 to the
// next (multiples of 16; the innermost is dense), and the box (each side at most 256, the innermost 128 bytes at most:
// shared tiles are swizzled over 128 bytes). `data` is a multiple of 16. A map is a snapshot of all that.
template <int D>
inline cudaError_t encode_tensor_map(CUtensorMap& map, DType dtype, const void* data, const uint64_t (&size)[D],
                                     const uint64_t (&stride)[D - 1], const uint32_t (&box)[D]) {
  static_assert(D >= 2 && D <= 5);
  static auto* const encode = driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint32_t every[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&map, map_type(dtype), D, const_cast<void*>(data), size, stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Of dense NHWC images of 16-bit elements the pixels that a convolution's tap reads, as a matrix whose rows go on from line to
// line and from image to image, with strides of 1 to 8; the box is `rows` (at most 1024) of its rows and 64 channels. Corners
// (w, h) are those of the pixels that tap (0, 0) reads, from the image's: without padding and for 1x1 filters both zero. What
// a box fetches ahead into L2 is its own 128 bytes: the next 128 may belong to a pixel that is left out.
struct Corners {
  int first[2], last[2];
};

inline cudaError_t encode_im2col_map(CUtensorMap& map, DType dtype, const void* data, uint64_t n, uint64_t h, uint64_t w,
                                     uint64_t c, uint32_t stride_h, uint32_t stride_w, uint32_t rows,
                                     const Corners& corners = {}) {
  static auto* const encode = driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint64_t size[4] = {c, w, h, n}, stride[3] = {2 * c, 2 * c * w, 2 * c * w * h};
  const uint32_t every[4] = {1, stride_w, stride_h, 1};
  const CUresult result =
      encode(&map, map_type(dtype), 4, const_cast<void*>(data), size, stride, corners.first, corners.last, 64, rows, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace resnet_fast
