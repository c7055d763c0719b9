// How a matrix product is cut up: tiles of the output, slices of its depth, chunks of 16 bytes, lanes of a warp, and
// the columns of a convolution seen as a matrix product. Plain arithmetic for device and host, so that host tests walk
// all of it against naive loops.
//
// A convolution over NHWC is out[M, N] = A[M, D] * B[N, D]^T with M = images * out_h * out_w pixels, N = filters and
// depth D = R * S * C (taps outermost, channels innermost): the weight in channels_last is B as it lies.
#pragma once

#include "index.h"

namespace resnet_fast {

// A shared tile has rows of 128 bytes (64 halves or 32 floats of the depth) in eight chunks of 16. Chunk c of row r
// sits at c ^ (r % 8): the eight rows of one ldmatrix phase then touch all 32 banks once, and so do the eight chunks of
// a row.
constexpr int kRowBytes = 128;
constexpr int kChunkBytes = 16;
constexpr int kChunks = kRowBytes / kChunkBytes;

RF_HD int swizzled(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row % kChunks)) * kChunkBytes); }

// From chunk 0 or 1 of a row, an even number of chunks further: swizzled(r, c + n) without working it out again.
RF_HD int further(int at, int chunks) { return at ^ (chunks * kChunkBytes); }

// One block's share of the output, M x N, and how its warps divide it.
template <int kM_, int kN_, int kWarpsM_, int kWarpsN_, int kBlocks_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr int kBlocks = kBlocks_;  // resident on one processor, by registers
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kStages = 3;  // slices in flight; 3 * 32 kB fits every chip (99 kB on sm_89)
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes, kStageBytes = kBytesA + kBytesB;
  static constexpr int kPitch = kN + 8;  // floats; 8 mod 32, so that a half-warp's float2 stores do not collide
  static constexpr int kPipelineBytes = kStages * kStageBytes, kStagingBytes = kM * kPitch * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kStagingBytes ? kPipelineBytes : kStagingBytes;
  static constexpr int kRowsA = kM * kChunks / kThreads, kRowsB = kN * kChunks / kThreads;  // rows a thread fetches
  static constexpr int kRowStep = kThreads / kChunks;  // it fetches one chunk column, every kRowStep-th row
};

using Tile128x128 = Tile<128, 128, 2, 4, 2>;
using Tile128x64 = Tile<128, 64, 2, 2, 3>;
using Tile64x64 = Tile<64, 64, 2, 2, 4>;
using TileFloat = Tile<128, 64, 4, 2, 2>;

struct Coordinates {
  int m, n;
};

// Blocks that share rows of A are neighbours: A comes from DRAM once and from L2 after that.
RF_HD Coordinates tile_at(uint32_t block, uint32_t tiles_n) { return {int(block / tiles_n), int(block % tiles_n)}; }

// Small problems take small tiles, or most processors would have nothing to do.
enum class TileChoice { m64n64, m128n64, m128n128 };

RF_HD TileChoice choose_tile(int64_t m, int64_t n, int64_t processors) {
  if (n > 64 && ceil_div(m, 128) * ceil_div(n, 128) >= processors) return TileChoice::m128n128;
  return ceil_div(m, 128) * ceil_div(n, 64) >= processors ? TileChoice::m128n64 : TileChoice::m64n64;
}

// On Hopper a block is persistent. Up to 256 channels its filters stay in shared memory and its two multiplying warp
// groups take tiles of 128 pixels in turns: one's epilogue, as long as the short main loop, hides behind the other's
// products. Deeper, they share tiles of 256 pixels, which reads a quarter less from L2, and where filters make an even
// number of tiles two blocks share the pixels, which saves another third. Problems of few filters or of fewer tiles than
// processors take narrow tiles.
constexpr int kSlice = 64;  // of the depth, in 16-bit elements: one row of a shared tile
constexpr int kKeptSlices = 4;

enum class HopperChoice { kept128x64, kept128x128, streamed128x64, together256x128, paired256x128 };

RF_HD HopperChoice choose_hopper_tile(int64_t m, int64_t n, int64_t depth, int64_t processors) {
  const bool narrow = n <= 64 || ceil_div(m, 128) * ceil_div(n, 128) < processors;
  if (depth <= kKeptSlices * kSlice && ceil_div(n, narrow ? 64 : 128) <= processors)
    return narrow ? HopperChoice::kept128x64 : HopperChoice::kept128x128;
  if (narrow || ceil_div(m, 256) * ceil_div(n, 128) < processors) return HopperChoice::streamed128x64;
  return ceil_div(n, 128) % 2 == 0 ? HopperChoice::paired256x128 : HopperChoice::together256x128;
}

// With few pixels: tiles of 64 pixels, of how many filters, and how many blocks of a cluster share a tile's depth of `steps`
// slices. Clocks of one block: to be there and to see its first slice, then slice by slice; where blocks share, two barriers
// of the cluster and what is read from it. All guesses, which only have to rank.
struct ClusterChoice {
  int filters, split;
};

RF_HD int64_t cluster_clocks(int64_t pixels, int64_t filters, int steps, int64_t processors, const ClusterChoice& by) {
  const int64_t rounds = ceil_div(ceil_div(pixels, 64) * ceil_div(filters, by.filters) * by.split, processors);
  const int64_t depth = ceil_div(steps, by.split) * (by.filters == 64 ? 180 : 140);
  return rounds * (1500 + depth + (by.split > 1 ? 900 : 0));
}

RF_HD ClusterChoice choose_cluster(int64_t pixels, int64_t filters, int steps, int64_t processors) {
  ClusterChoice best{64, 1};
  for (int n = 64; n >= 32; n /= 2)
    for (int split = 1; split <= 8 && split <= steps; split *= 2) {
      const ClusterChoice by{n, split};
      if (cluster_clocks(pixels, filters, steps, processors, by) < cluster_clocks(pixels, filters, steps, processors, best))
        best = by;
    }
  return best;
}

// Walks a ring of slots: which, and the parity of the phase that fills (or empties) it.
struct Ring {
  int slot;
  unsigned parity = 0;

  RF_HD void step(int by, int slots) {
    slot += by;
    if (slot >= slots) slot -= slots, parity ^= 1;
  }
};

// ---- Fragments of mma.m16n8k16. Chunks count along the depth, within one step of 16 elements (two chunks).

struct RowChunk {
  int row, chunk;
};

// What lane l passes to ldmatrix for A's 16x16: matrices (rows 0-7, 8-15) x (chunk 0), then x (chunk 1).
RF_HD RowChunk fragment_a(int lane) { return {lane % 16, lane / 16}; }

// For two of B's 8x16 (16 filters): matrices (filters 0-7) x (chunk 0, 1), then (filters 8-15).
RF_HD RowChunk fragment_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// Where register pair `half` (0: d0, d1; 1: d2, d3) of the 16x8 result lies; n is that of the first of the pair.
RF_HD Coordinates fragment_d(int lane, int half) { return {lane / 4 + 8 * half, 2 * (lane % 4)}; }

// ---- A convolution's rows and columns.

struct ConvShape {
  int height, width, channels;  // of the input
  int taps_h, taps_w;           // R, S
  int out_h, out_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct Pixel {
  int image, h, w;
};

RF_HD Pixel pixel_at(uint32_t row, uint32_t out_h, uint32_t out_w) {
  const uint32_t line = row / out_w;
  return {int(line / out_h), int(line % out_h), int(row % out_w)};
}

// Column k of A: tap (r, s), channel c. r >= taps_h beyond the last column.
struct Tap {
  int r, s, c;
};

RF_HD Tap tap_at(uint32_t k, const ConvShape& shape) {
  const uint32_t tap = k / uint32_t(shape.channels);
  return {int(tap / shape.taps_w), int(tap % shape.taps_w), int(k % uint32_t(shape.channels))};
}

// The same by walking: no division in the main loop.
RF_HD void advance(Tap& tap, int columns, const ConvShape& shape) {
  tap.c += columns;
  while (tap.c >= shape.channels) {
    tap.c -= shape.channels;
    if (++tap.s == shape.taps_w) {
      tap.s = 0;
      ++tap.r;
    }
  }
}

// Output row -> where its window begins in the input, and which taps of it lie inside the image.
struct Window {
  int base;       // (image * height + h) * width + w in pixels, for tap (0, 0), which may lie in the padding
  uint32_t taps;  // bit r: row r of the filter is inside; bit 16 + s: column s is. Nothing is, beyond the last row
};

constexpr int kMostTaps = 16;

RF_HD Window window_at(int row, int rows, const ConvShape& shape) {
  if (row >= rows) return {0, 0};
  const Pixel p = pixel_at(uint32_t(row), uint32_t(shape.out_h), uint32_t(shape.out_w));
  const int h = p.h * shape.stride_h - shape.pad_h, w = p.w * shape.stride_w - shape.pad_w;
  uint32_t taps = 0;
  for (int r = 0; r < shape.taps_h; ++r)
    taps |= uint32_t(unsigned(h + r * shape.dilation_h) < unsigned(shape.height)) << r;
  for (int s = 0; s < shape.taps_w; ++s)
    taps |= uint32_t(unsigned(w + s * shape.dilation_w) < unsigned(shape.width)) << (kMostTaps + s);
  return {(p.image * shape.height + h) * shape.width + w, taps};
}

// Offset in elements of A[row, column], or -1 where it is padding, beyond the last row or beyond the last column.
RF_HD int64_t element_at(const Window& window, const Tap& tap, const ConvShape& shape) {
  const bool inside =
      tap.r < shape.taps_h && (window.taps >> tap.r & window.taps >> (kMostTaps + tap.s) & 1) != 0;
  const int shift = tap.r * shape.dilation_h * shape.width + tap.s * shape.dilation_w;
  return inside ? (int64_t(window.base) + shift) * shape.channels + tap.c : -1;
}

}  // namespace resnet_fast
