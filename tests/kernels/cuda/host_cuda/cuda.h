// The part of the driver API that tensor_map.h calls: cuTensorMapEncode… with the limits of their documentation. A map
// is opaque to the kernels; here its 128 bytes hold what the emulated TMA (host_hopper.h) needs to know.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime_api.h"

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_INVALID_CONTEXT = 201 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

namespace host_cuda {

struct Map {
  static constexpr uint32_t kMagic = 0x7ab1e5;
  uint32_t magic, rank;
  unsigned char* data;
  uint64_t size[5], stride[4];  // elements; bytes
  uint16_t box[5];              // of an im2col map channels and pixels
  bool im2col;
  int8_t lower[2], upper[2];  // corners of its bounding box, from those of the image: w, h
  uint8_t every[2];           // its traversal strides
  uint8_t tap[2];             // how much further a load looks: w, h
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

}  // namespace host_cuda

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, uint32_t rank, void* data,
                                       const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                                       const uint32_t* every, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!host_cuda::context) return CUDA_ERROR_INVALID_CONTEXT;
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && rank >= 1 &&
              rank <= 5 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  host_cuda::Map m{host_cuda::Map::kMagic, rank, static_cast<unsigned char*>(data), {}, {}, {}, false, {}, {}, {}};
  for (uint32_t i = 0; good && i < rank; ++i) {
    good = size[i] >= 1 && size[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && every[i] == 1;
    m.size[i] = size[i], m.box[i] = uint16_t(box[i]);
  }
  for (uint32_t i = 0; good && i + 1 < rank; ++i) {
    good = stride[i] % 16 == 0 && stride[i] < uint64_t(1) << 40;
    m.stride[i] = stride[i];
  }
  good = good && box[0] * 2 % 16 == 0 && box[0] * 2 <= 128;
  if (good) std::memcpy(map, &m, sizeof m);
  return good ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

inline CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, uint32_t rank, void* data,
                                        const uint64_t* size, const uint64_t* stride, const int* lower, const int* upper,
                                        uint32_t channels, uint32_t pixels, const uint32_t* every,
                                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                        CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const uint32_t box[4] = {channels, 1, 1, 1}, ones[4] = {1, 1, 1, 1};
  if (rank != 4 || pixels < 1 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  const CUresult result = cuTensorMapEncodeTiled(map, type, rank, data, size, stride, box, ones, interleave, swizzle,
                                                 promotion, fill);
  auto& m = *reinterpret_cast<host_cuda::Map*>(map);
  for (int i = 0; result == CUDA_SUCCESS && i < 2; ++i) {
    if (lower[i] < -128 || lower[i] > 127 || upper[i] < -128 || upper[i] > 127 || every[i + 1] < 1 || every[i + 1] > 8 ||
        int64_t(size[i + 1]) - 1 + upper[i] < lower[i] || every[3] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    m.lower[i] = int8_t(lower[i]), m.upper[i] = int8_t(upper[i]), m.every[i] = uint8_t(every[i + 1]);
  }
  if (result == CUDA_SUCCESS) m.im2col = true, m.box[1] = uint16_t(pixels);
  return result;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** found, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  const bool tiled = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  const bool known = tiled || std::strcmp(symbol, "cuTensorMapEncodeIm2col") == 0;
  *found = tiled ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : reinterpret_cast<void*>(&cuTensorMapEncodeIm2col);
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
