// How conv_hopper.cu cuts up a 3x3 convolution (padding 1, stride 1 or 2) over NHWC: boxes of the input that lie in
// shared memory with their halo, and which column of a matrix product is which output pixel. Plain arithmetic for device
// and host, so that a host test walks all of it against naive loops.
//
// A box is `rows` full rows of one image, or several whole images. TMA loads it once with a row above, a row below and
// one column to the left, pixels as rows of 128 bytes (64 channels); what lies outside the image is zero. A pixel's right
// neighbour at the end of a row is then the next row's zero to the left, and the row below an image is the zero row
// above the next image. So with `pitch` = W + 1, output pixel (i, r, q) of a box is column
//
//   n = i * image_pitch + r * pitch + q,   and its tap (dr, ds) is the shared pixel n + dr * pitch + ds
//
// for all columns alike: a tap is a shift of the whole matrix. Columns between the rows (and images) are padding: they
// are computed and thrown away, 1 in W + 1. Only the last box row (image) has no successor: its zeros are `tail` pixels
// behind the box, which the kernel writes once, since no copy ever overwrites them.
//
// With stride 2 the input is four planes, of its even or odd rows and even or odd columns, each an image as large as the
// output (or a row, a column less). Output (i, q) takes tap 1 from the even row i and taps 0 and 2 from the odd rows i - 1
// and i; columns likewise. So a box is loaded four times, once of each plane, with a row above and a column to the left (of
// which taps of even ones make no use), each to be multiplied by its own four, two, two or one taps.
#pragma once

#include "index.h"

namespace resnet_fast {

constexpr int kTaps = 9;

struct Halo {
  int stride;
  int height, width;     // of the output, and of a plane of the input
  int rows, images;      // output rows of an image, and images, of a box: `images` is 1 unless rows == height
  int pitch;             // shared pixels from a row to the next
  int box_rows;          // input rows that are loaded of an image
  int image_pitch;       // shared pixels from an image to the next
  int parts;             // boxes an image is cut into
  int tail;              // zero pixels behind the box

  RF_HD int box_pixels() const { return images * image_pitch; }
  RF_HD int pixels() const { return images * rows * width; }  // of output
  RF_HD int planes() const { return stride == 2 ? 4 : 1; }

  // Taps are taken plane by plane, of planes 2 (odd rows) + (odd columns) the last first: the i-th is tap 3 r + s, whose
  // pixels are `shift` shared pixels further than their columns.
  RF_HD int tap(int i) const { return stride == 2 ? int(0x453718620 >> 4 * i & 15) : i; }
  RF_HD bool last_of_plane(int i) const { return ((stride == 2 ? 0x1a8 : 0x100) >> i & 1) != 0; }
  RF_HD int shift(int tap) const {
    const int r = tap / 3, s = tap % 3;
    return stride == 2 ? (r + 1) / 2 * pitch + (s + 1) / 2 : r * pitch + s;
  }
  RF_HD int boxes(int batch) const { return int(ceil_div(batch, images)) * parts; }

  // Which of the box's output pixels column n is, counted as they lie in memory; -1: padding.
  RF_HD int pixel(int n) const {
    const int image = n / image_pitch, row = n % image_pitch / pitch, q = n % pitch;
    return image < images && row < rows && q < width ? (image * rows + row) * width + q : -1;
  }
};

// A box's place: its first image and row, how many output pixels it has (none beyond the batch), the first in memory.
struct HaloBox {
  int image, row, count;
  int64_t first;
};

RF_HD HaloBox halo_box(const Halo& halo, int box, int batch) {
  const int image = box / halo.parts * halo.images, row = box % halo.parts * halo.rows;
  const int images = int(smaller(batch - image, halo.images)), rows = int(smaller(halo.height - row, halo.rows));
  return {image, row, images > 0 ? images * rows * halo.width : 0, (int64_t(image) * halo.height + row) * halo.width};
}

constexpr int kMostBox = 256;  // TMA's limit for a side

// The box for products of `columns` columns, given the output's sizes: as many whole images as fit, or equal shares of
// one; rows is 0 if not even a row fits.
RF_HD Halo make_halo(int height, int width, int columns, int stride) {
  Halo h{stride, height, width, 0, 1, width + 1, 0, 0, 1, 0};
  const int most = columns < width ? 0 : (columns - width) / h.pitch + 1;  // rows of one image
  if (most == 0 || width >= kMostBox) return h;
  const int whole = (height + 1) * h.pitch;
  if (height <= most && height < kMostBox) {
    h.rows = height, h.box_rows = height + 1, h.image_pitch = whole, h.tail = stride == 2 ? 0 : h.pitch + 1;
    h.images = int(smaller((columns - (height - 1) * h.pitch - width) / whole + 1, kMostBox));
  } else {
    h.parts = int(ceil_div(height, smaller(most, kMostBox - 2)));
    h.rows = int(ceil_div(height, h.parts)), h.box_rows = h.rows + (stride == 2 ? 1 : 2);
    h.image_pitch = h.box_rows * h.pitch, h.tail = stride == 2 ? 0 : 1;
  }
  return h;
}

// Shared pixels that a box takes: what is loaded, the zeros behind it, and what padding columns read beyond.
RF_HD int halo_slot(const Halo& halo, int columns) {
  const int read = columns + halo.shift(kTaps - 1), zeros = halo.box_pixels() + halo.tail;
  return int(ceil_div(read > zeros ? read : zeros, 8)) * 8;
}

// The width of products that ends first: rounds of the chip times columns. Narrow images and the last round decide.
constexpr int kHaloColumns[] = {208, 216, 248};

inline int choose_columns(int batch, int height, int width, int filter_tiles, int processors) {
  int best = 0;
  int64_t least = 0;
  for (const int columns : kHaloColumns) {
    const Halo halo = make_halo(height, width, columns, 1);  // as many boxes with either stride
    if (halo.rows == 0) continue;
    const int64_t cost = ceil_div(int64_t(halo.boxes(batch)) * filter_tiles, processors) * columns;
    if (best == 0 || cost < least) best = columns, least = cost;
  }
  return best;
}

}  // namespace resnet_fast
