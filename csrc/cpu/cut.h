// How one convolution's rows (output pixels, or Winograd's tiles) and panels of filters are cut into blocks for threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace resnet_fast::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of the cuts that keep a block's rows in the cache (`most` of them), the one whose largest share of work is smallest: threads take
// equal numbers of blocks, one after another. As many rows as go, and all panels, unless something else is clearly better: each block
// reads its filters and gathers, or transforms, its rows anew.
struct Cut {
  int64_t rows = 1, panels = 1;  // of a block
  int64_t down = 1, across = 1;  // blocks

  Cut(int64_t all_rows, int64_t all_panels, int64_t most, int64_t threads) {
    const int64_t least = ceil_div(all_rows, most);
    int64_t best = INT64_MAX;
    for (int64_t p = all_panels, a = 1; a <= threads; p = ceil_div(all_panels, a)) {
      const int64_t d = ceil_div(least * a, threads) * threads / a;  // as many as give every thread the same number
      const int64_t r = ceil_div(all_rows, std::clamp(d, least, all_rows)), blocks = ceil_div(all_rows, r) * a;
      const int64_t each = ceil_div(blocks, threads), share = work(each, std::min(each * r, all_rows * a), p);
      if (share < best - best / 64) best = share, rows = r, panels = p, down = blocks / a, across = a;
      if (p == 1) break;
      a = ceil_div(all_panels, p - 1);
    }
  }

  // Of blocks with so many rows together, in sevenths of what one row takes with one panel. Measured on one thread of an AMD EPYC with AVX-512:
  // a panel's filters take as long as 1 to 2 rows more, gathering or transforming a row as long as 0.1 to 0.2 panels more; fewer than 8 rows
  // take up to the time of 8.
  static int64_t work(int64_t blocks, int64_t rows, int64_t panels) { return 7 * panels * (std::max(rows, 8 * blocks) + 2 * blocks) + rows; }
};

}  // namespace resnet_fast::cpu
