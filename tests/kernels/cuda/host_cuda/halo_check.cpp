// Walks halo.h against naive loops: boxes as TMA would load them, zeros behind them, and every tap of every column.
#include <vector>

#include "cuda/halo.h"
#include "expect.h"

using namespace resnet_fast;

constexpr int kGarbage = -1;  // what shared memory held before; an input pixel is its number from one on, padding zero

int input(int batch, int height, int width, int n, int h, int w) {
  const bool inside = n >= 0 && n < batch && h >= 0 && h < height && w >= 0 && w < width;
  return inside ? (n * height + h) * width + w + 1 : 0;
}

// The box of a plane in shared memory: its rows from `row` - 1 on, columns from -1 on, then the tail.
std::vector<int> loaded(const Halo& halo, const HaloBox& box, int plane, int batch, int height, int width, int columns) {
  std::vector<int> shared(halo_slot(halo, columns), kGarbage);
  for (int i = 0, at = 0; i < halo.images; ++i)
    for (int h = 0; h < halo.box_rows; ++h)
      for (int w = 0; w < halo.pitch; ++w, ++at)
        shared.at(at) = input(batch, height, width, box.image + i, (box.row - 1 + h) * halo.stride + plane / 2,
                              (w - 1) * halo.stride + plane % 2);
  for (int i = 0; i < halo.tail; ++i) shared.at(halo.box_pixels() + i) = 0;
  return shared;
}

void check(int batch, int height, int width, int columns, int stride) {
  const int out_h = (height - 1) / stride + 1, out_w = (width - 1) / stride + 1;
  const Halo halo = make_halo(out_h, out_w, columns, stride);
  EXPECT(halo.rows > 0 && halo.box_rows <= kMostBox && halo.pitch <= kMostBox && halo.images <= kMostBox, "%d x %d",
         height, width);
  // Two boxes, 64 kB of weights (the ring of 128 filters) or 72 (64 filters, 232 columns), two staging areas, barriers.
  const int rest = (columns == 232 ? 72 : 64) * 1024 + 2 * (columns * 128 + 1024) + 1024;
  EXPECT(2 * 128 * halo_slot(halo, columns) + rest <= 227 * 1024, "%d x %d in %d columns", height, width, columns);
  std::vector<int> visits(batch * out_h * out_w);
  for (int b = 0; b < halo.boxes(batch) + 3; ++b) {
    const HaloBox box = halo_box(halo, b, batch);
    int found = 0;
    for (int n = 0; n < columns; ++n) found += halo.pixel(n) >= 0 && halo.pixel(n) < box.count;
    EXPECT(found == box.count, "box %d of %d images of %d x %d: %d of %d", b, batch, height, width, found, box.count);
    int plane = halo.planes() - 1;
    unsigned taken = 0;
    std::vector<int> shared;
    for (int i = 0; i < kTaps; ++i) {
      const int tap = halo.tap(i), shift = halo.shift(tap);
      taken |= 1u << tap;
      if (shared.empty()) shared = loaded(halo, box, plane, batch, height, width, columns);
      for (int n = 0; n < columns; ++n) {
        const int got = shared.at(n + shift);  // padding columns read no further than the slot
        const int pixel = halo.pixel(n);
        if (pixel < 0 || pixel >= box.count) continue;
        const int at = int(box.first) + pixel, h = at / out_w % out_h * stride, w = at % out_w * stride;
        visits.at(at) += i == 0;
        const int expected = input(batch, height, width, at / out_w / out_h, h + tap / 3 - 1, w + tap % 3 - 1);
        EXPECT(got == expected, "%d images of %d x %d by %d in %d columns: pixel %d, tap %d: %d, not %d", batch, height,
               width, stride, columns, at, tap, got, expected);
      }
      if (halo.last_of_plane(i)) shared.clear(), --plane;
    }
    EXPECT(taken == 0x1ff && plane == -1, "taps");
  }
  for (int count : visits) EXPECT(count == 1, "%d images of %d x %d: %d visits", batch, height, width, count);
}

int main() {
  const int heights[] = {1, 2, 3, 5, 7, 8, 13, 14, 28, 57, 260};
  for (int columns : {208, 216, 232, 248})
    for (int height : heights)
      for (int width = 1; width <= 64; ++width) {
        check(height > 14 ? 2 : 9, height, width, columns, 1);
        if (height > 1 && width > 1 && (width % 7 == 0 || width % 5 < 2)) check(height > 28 ? 2 : 9, height, 2 * width - height % 2, columns, 2);
      }
  // What the layers of ResNet-50 at 224 make of it: useful columns.
  const Halo first = make_halo(56, 56, 232, 1), second = make_halo(28, 28, 208, 1), third = make_halo(14, 14, 216, 1),
             fourth = make_halo(7, 7, 248, 1);
  EXPECT(first.rows == 4 && second.rows == 7 && third.rows == 14 && fourth.rows == 7, "rows");
  EXPECT(first.images == 1 && second.images == 1 && third.images == 1 && fourth.images == 4, "images");
  EXPECT(choose_columns(256, 28, 28, 1, 132) == 208 && choose_columns(256, 14, 14, 2, 132) == 216 &&
             choose_columns(256, 7, 7, 4, 132) == 248, "columns");
  EXPECT(make_halo(8, 300, 248, 1).rows == 0, "a row that does not fit");
  EXPECT(halo_box(make_halo(56, 56, 232, 1), 14 * ((1 << 19) - 1), 1 << 19).first == ((int64_t(1) << 19) - 1) * 3136,
         "beyond 2^30 pixels");
  return 0;
}
