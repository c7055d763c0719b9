// Walks every index computation of csrc's headers against naive loops. Prints the first thing that is wrong and fails.
#include <set>
#include <utility>
#include <vector>

#include "cuda/index.h"
#include "cuda/tile.h"
#include "expect.h"

using namespace resnet_fast;

void check_swizzle() {
  std::set<int> seen;
  for (int row = 0; row < 128; ++row) {
    unsigned banks = 0;
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int at = swizzled(row, chunk);
      EXPECT(at % kChunkBytes == 0 && at / kRowBytes == row, "row %d chunk %d", row, chunk);
      EXPECT(seen.insert(at).second, "row %d chunk %d lies on another", row, chunk);
      EXPECT(at == further(swizzled(row, chunk % 2), chunk - chunk % 2), "row %d, from chunk %d", row, chunk % 2);
      if (row % 8 == 0)
        for (int r = row; r < row + 8; ++r) banks |= 1u << (swizzled(r, chunk) / kChunkBytes % 8);
      EXPECT(row % 8 != 0 || banks == 0xff, "rows %d to %d of chunk %d share banks", row, row + 7, chunk);
    }
  }
}

void check_fragments() {
  std::set<std::pair<int, int>> a, b, d;
  for (int lane = 0; lane < 32; ++lane) {
    // ldmatrix: lanes 8i .. 8i+7 address matrix i, and register i of lane l gets row l / 4 of it. The mma's registers:
    // A's i: rows 8 * (i % 2), chunk i / 2;  B's i (of two n8 blocks): filters 8 * (i / 2), chunk i % 2.
    const RowChunk from_a = fragment_a(lane), from_b = fragment_b(lane);
    EXPECT(from_a.row == lane % 8 + lane / 8 % 2 * 8 && from_a.chunk == lane / 16, "A, lane %d", lane);
    EXPECT(from_b.row == lane % 8 + lane / 16 * 8 && from_b.chunk == lane / 8 % 2, "B, lane %d", lane);
    a.insert({from_a.row, from_a.chunk}), b.insert({from_b.row, from_b.chunk});
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 2; ++i) d.insert({fragment_d(lane, half).m, fragment_d(lane, half).n + i});
  }
  EXPECT(a.size() == 32 && b.size() == 32 && d.size() == 128, "%zu %zu %zu", a.size(), b.size(), d.size());
}

template <class T>
void check_tile() {
  static_assert(T::kRowsA * T::kRowStep == T::kM && T::kRowsB * T::kRowStep == T::kN && T::kRowStep % 8 == 0);
  static_assert(T::kM % (16 * T::kWarpsM) == 0 && T::kN % (16 * T::kWarpsN) == 0 && T::kThreads >= T::kN);
  static_assert(T::kPitch % 32 == 8 && T::kSharedBytes >= T::kStages * (T::kM + T::kN) * 128);
  static_assert(T::kSharedBytes >= T::kM * T::kPitch * 4 && T::kSharedBytes + T::kN * 8 <= 99 * 1024);
}

void check_tiles() {
  check_tile<Tile128x128>(), check_tile<Tile128x64>(), check_tile<Tile64x64>(), check_tile<TileFloat>();
  for (int tiles_m : {1, 3, 7})
    for (int tiles_n : {1, 2, 5}) {
      std::set<std::pair<int, int>> seen;
      for (int block = 0; block < tiles_m * tiles_n; ++block) {
        const Coordinates tile = tile_at(block, tiles_n);
        EXPECT(tile.m < tiles_m && tile.n < tiles_n, "block %d", block);
        seen.insert({tile.m, tile.n});
      }
      EXPECT(int(seen.size()) == tiles_m * tiles_n, "%d x %d", tiles_m, tiles_n);
    }
  EXPECT(choose_tile(256 * 56 * 56, 256, 132) == TileChoice::m128n128, "layer1, batch 256");
  EXPECT(choose_tile(256 * 56 * 56, 64, 132) == TileChoice::m128n64, "64 filters");
  EXPECT(choose_tile(49, 2048, 132) == TileChoice::m64n64, "batch 1");
  EXPECT(choose_hopper_tile(256 * 56 * 56, 256, 64, 132) == HopperChoice::kept128x128, "layer1's conv3");
  EXPECT(choose_hopper_tile(256 * 56 * 56, 64, 256, 132) == HopperChoice::kept128x64, "layer1's conv1");
  EXPECT(choose_hopper_tile(256 * 14 * 14, 256, 1024, 132) == HopperChoice::paired256x128, "layer3's conv1");
  EXPECT(choose_hopper_tile(256 * 28 * 28, 128, 512, 132) == HopperChoice::together256x128, "layer2's conv1");
  EXPECT(choose_hopper_tile(256 * 56 * 56, 256, 64 + 64, 132) == HopperChoice::kept128x128, "layer1's pair");
  EXPECT(choose_hopper_tile(256 * 28 * 28, 512, 128 + 256, 132) == HopperChoice::paired256x128, "layer2's pair");
  EXPECT(choose_hopper_tile(8 * 14 * 14, 512, 2048, 132) == HopperChoice::streamed128x64, "fewer tiles than processors");
  EXPECT(choose_hopper_tile(1 << 20, 132 * 128 + 8, 64, 132) == HopperChoice::together256x128, "filters for more blocks");
  // As the head of conv_cluster_hopper.cu tells of one image; and no more blocks than there are steps, or than pay.
  const auto cluster = [](int64_t pixels, int64_t filters, int steps, int n, int split) {
    const ClusterChoice found = choose_cluster(pixels, filters, steps, 132);
    EXPECT(found.filters == n && found.split == split, "%d pixels, %d filters, %d steps: %d x %d", int(pixels), int(filters), steps,
           found.filters, found.split);
  };
  cluster(56 * 56, 64, 9, 32, 1), cluster(56 * 56, 256, 1, 64, 1), cluster(28 * 28, 128, 18, 64, 4), cluster(28 * 28, 512, 2, 64, 1);
  cluster(14 * 14, 256, 36, 64, 8), cluster(14 * 14, 256, 16, 64, 8), cluster(7 * 7, 512, 72, 32, 8), cluster(7 * 7, 2048, 8, 32, 1);
  cluster(1, 8, 1, 32, 1), cluster(256 * 56 * 56, 64, 9, 64, 1);
}

// Rows and columns of the window matrix, including those beyond the last, against coordinates counted one by one.
void check_windows(const ConvShape& s, int images) {
  const int rows = images * s.out_h * s.out_w, depth = s.taps_h * s.taps_w * s.channels;
  int row = 0;
  for (int n = 0; n < images; ++n)
    for (int i = 0; i < s.out_h; ++i)
      for (int j = 0; j < s.out_w; ++j, ++row) {
        const Window window = window_at(row, rows, s);
        int k = 0;
        for (int r = 0; r < s.taps_h; ++r)
          for (int t = 0; t < s.taps_w; ++t)
            for (int c = 0; c < s.channels; ++c, ++k) {
              const Tap tap = tap_at(k, s);
              EXPECT(tap.r == r && tap.s == t && tap.c == c, "column %d", k);
              const int h = i * s.stride_h - s.pad_h + r * s.dilation_h;
              const int w = j * s.stride_w - s.pad_w + t * s.dilation_w;
              const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
              const int64_t expected = inside ? ((int64_t(n) * s.height + h) * s.width + w) * s.channels + c : -1;
              const int64_t got = element_at(window, tap, s);
              EXPECT(got == expected, "row %d column %d: %lld, not %lld", row, k, (long long)got, (long long)expected);
            }
        for (k = depth; k < depth + 64; ++k)
          EXPECT(element_at(window, tap_at(k, s), s) == -1, "column %d of %d", k, depth);
      }
  for (row = rows; row < rows + 128; ++row)
    for (int k = 0; k < depth; ++k)
      EXPECT(element_at(window_at(row, rows, s), tap_at(k, s), s) == -1, "row %d of %d", row, rows);
  for (int step : {1, 8, 32, 56, 64})
    for (int start = 0; start < 64; ++start) {
      Tap tap = tap_at(start, s);
      for (int k = start; k < depth + 64; k += step, advance(tap, step, s)) {
        const Tap jump = tap_at(k, s);
        EXPECT(tap.r == jump.r && tap.s == jump.s && tap.c == jump.c, "column %d, steps of %d from %d", k, step, start);
      }
    }
}

void check_convolutions() {
  const int kernels[][2] = {{1, 1}, {3, 3}, {7, 7}, {1, 3}, {5, 2}, {1, 16}};
  for (const auto& [r, t] : kernels)
    for (int channels : {1, 3, 8, 24, 72})
      for (int stride : {1, 2, 3})
        for (int dilation : {1, 2})
          for (int pad : {0, 1, 3}) {
            ConvShape s{7, 10, channels, r, t, 0, 0, stride, stride == 3 ? 1 : stride, pad, pad / 2, dilation, 1};
            s.out_h = (s.height + 2 * s.pad_h - s.dilation_h * (r - 1) - 1) / s.stride_h + 1;
            s.out_w = (s.width + 2 * s.pad_w - s.dilation_w * (t - 1) - 1) / s.stride_w + 1;
            if (s.height + 2 * s.pad_h > s.dilation_h * (r - 1) && s.width + 2 * s.pad_w > s.dilation_w * (t - 1))
              check_windows(s, 2);
          }
  // Offsets beyond 2^31 elements: the last pixel of 2^22 images of 8x8 with 64 channels.
  const ConvShape big{8, 8, 64, 3, 3, 8, 8, 1, 1, 1, 1, 1, 1};
  const int rows = (1 << 22) * 64;
  const int64_t got = element_at(window_at(rows - 1, rows, big), Tap{1, 1, 63}, big);
  EXPECT(got == int64_t(rows) * 64 - 1, "%lld", (long long)got);
}

// add_act's and bn_act's division of [images, pixels, channels] among blocks and threads: each vector exactly once.
void check_gate_grid() {
  for (int64_t images : {1, 2, 5})
    for (int64_t pixels : {1, 7, 49, 3000})
      for (int64_t channels : {1, 3, 64, 72, 520})
        for (int width : {1, 8}) {
          if (channels % width != 0) continue;
          const GateGrid grid = gate_grid(images, pixels, channels, width);
          std::vector<int> visits(images * pixels * channels);
          for (int64_t x = 0; x < images * grid.splits; ++x)
            for (int64_t y = 0; y < grid.chunks; ++y)
              for (int lane = 0; lane < grid.lanes; ++lane) {
                const GateTile tile = gate_tile(grid, x, y, lane, pixels, width);
                if (tile.channel >= channels) continue;
                for (int row = 0; row < grid.rows; ++row)
                  for (int64_t pixel = tile.begin + row; pixel < tile.end; pixel += grid.rows)
                    for (int j = 0; j < width; ++j)
                      ++visits[(tile.image * pixels + pixel) * channels + tile.channel + j];
              }
          for (int count : visits)
            EXPECT(count == 1, "%d visits of %lld x %lld x %lld", count, (long long)images, (long long)pixels,
                   (long long)channels);
          EXPECT(grid.lanes * grid.rows == kThreads && (grid.rows & (grid.rows - 1)) == 0, "lanes %d", grid.lanes);
        }
}

// Batch norm's: all blocks at once on 132 processors, and what the second launch's read of the first's partial sums.
void check_bn_grid() {
  for (int64_t channels : {64, 128, 256, 512, 1024, 2048})
    for (int64_t pixels : {7 * 7 * 4, 56 * 56 * 32, 112 * 112 * 256})
      for (int width : {4, 8}) {
        const GateGrid grid = bn_grid(pixels, channels, width);
        const int64_t blocks = grid.splits * grid.chunks, line = grid.lanes * width;
        EXPECT(blocks <= 2 * 132 && blocks * grid.splits * line * 8 <= 34 << 20, "%lld blocks, %lld splits, %lld channels",
               (long long)blocks, (long long)grid.splits, (long long)channels);
      }
}

int main() {
  check_swizzle();
  check_fragments();
  check_tiles();
  check_convolutions();
  check_gate_grid();
  check_bn_grid();
  return 0;
}
