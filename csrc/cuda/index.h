// Which thread touches which element. Plain arithmetic, compiled for device and host alike, so that a host test can
// walk a whole grid and prove that every element is visited exactly once.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline
#endif

namespace resnet_fast {

constexpr int kThreads = 256;

RF_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RF_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
RF_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Flat work: `count` elements in vectors of `width`, one vector a thread and grid-stride beyond the largest grid.
// The count % width elements left over go one each to the first threads of the grid.
RF_HD int64_t flat_blocks(int64_t count, int width) {
  constexpr int64_t kLargestGrid = 0x7fffffff;
  return smaller(larger(ceil_div(count / width, kThreads), 1), kLargestGrid);
}

// NHWC work with per-(image, channel) data: a block owns one image, `lanes` neighbouring vectors of channels, and one
// of `splits` ranges of pixels. Threads are (lanes, kThreads / lanes): neighbours in channel are neighbours in memory,
// and a thread keeps its channels for all its pixels, so the gate is loaded once and the loop divides no index.
struct GateGrid {
  int lanes, rows;
  int64_t splits, chunks;
  int64_t share;  // pixels of a split: worked out once, as 64-bit divisions cost a GPU a hundred instructions
};

RF_HD GateGrid gate_grid(int64_t images, int64_t pixels, int64_t channels, int width,
                         int64_t blocks = 1024,  // wanted: about eight 256-thread blocks for each of 132 SMs
                         int most_lanes = 32) {
  constexpr int64_t kPixelsPerThread = 8;    // fewer would not pay for the block's reduction
  const int64_t vectors = ceil_div(channels, width);
  int lanes = 1;
  while (lanes < most_lanes && lanes < vectors) lanes *= 2;
  const int rows = kThreads / lanes;
  const int64_t chunks = larger(ceil_div(vectors, lanes), 1);
  const int64_t wanted = ceil_div(blocks, larger(images * chunks, 1));
  const int64_t worthwhile = larger(pixels / (rows * kPixelsPerThread), 1);
  const int64_t splits = smaller(wanted, worthwhile);
  return {lanes, rows, splits, chunks, ceil_div(pixels, splits)};
}

// Batch norm's, over one image. Two blocks for each of 132 SMs and no more, and lanes for one line of 128 bytes: every block of
// the second launch reads the partial sums of all splits of its channels, 8 bytes a channel and split. With 64 channels that
// is 34 MB of L2 for the launch, with more of them less; with rows of 32 lanes it would be 134 MB with 256 channels.
RF_HD GateGrid bn_grid(int64_t pixels, int64_t channels, int width) {
  return gate_grid(1, pixels, channels, width, 256, width == 1 ? 32 : 8);
}

struct GateTile {
  int64_t image, channel;  // channel of the first element of this thread's vector; >= channels: nothing to do
  int64_t begin, end;      // pixels of the block; a thread takes begin + row, begin + row + rows, ...
};

RF_HD GateTile gate_tile(const GateGrid& grid, int64_t block_x, int64_t block_y, int lane, int64_t pixels, int width) {
  const int64_t image = uint32_t(block_x) / uint32_t(grid.splits), split = block_x - image * grid.splits;
  return {image, (block_y * grid.lanes + lane) * width, smaller(split * grid.share, pixels),
          smaller((split + 1) * grid.share, pixels)};
}

}  // namespace resnet_fast
