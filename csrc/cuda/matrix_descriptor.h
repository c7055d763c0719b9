// The 64-bit descriptor by which wgmma finds a matrix in shared memory. Plain arithmetic for device and host.
//
// The one layout used here, as TMA writes it with 128-byte swizzle: rows of 128 bytes (64 halves of the depth, "K-major"),
// eight rows to a pattern of 1024 bytes, chunk c of 16 bytes of a row at c ^ (address / 128 % 8): tile.h's `swizzled`, by
// absolute address. `stride` is the distance from eight rows to the next eight: 1024 where rows follow each other.
// `start` is that of the matrix's first element *before* swizzling: any row, and within a row any multiple of 16 bytes.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format".
#pragma once

#include "index.h"

namespace resnet_fast {

constexpr int kPatternBytes = 1024;  // tiles begin at multiples of it, so the descriptor's base offset is zero

// Bits 0-13 start, 16-29 leading offset (unused by swizzled K-major layouts; one by convention), 32-45 stride, all
// without their last four bits; 49-51 base offset; 62-63 the mode, 1 for 128 bytes.
RF_HD uint64_t matrix_descriptor(uint32_t start, int stride = kPatternBytes) {
  return uint64_t((start & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t((stride & 0x3ffff) >> 4) << 32 | uint64_t(1) << 62;
}

// The same matrix `bytes` further: 32 are one step of 16 halves along the depth, 128 one row, 8192 sixty-four rows.
RF_HD uint64_t further_descriptor(uint64_t descriptor, int bytes) { return descriptor + uint64_t(bytes >> 4); }

}  // namespace resnet_fast
