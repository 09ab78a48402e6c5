// How the pixels of a batch are cut where their order does not matter: into runs, each with sums of its own, and these
// into chunks that stay in the cache from their load to their last use. By the shape alone.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

struct PixelRuns {
  int64_t pixels, count, chunk;

  // `pixel_bytes` is what the kernel holds of a pixel at a time, `sums` how many numbers a run leaves.
  PixelRuns(int64_t pixels, int64_t pixel_bytes, int64_t sums) : pixels(pixels) {
    constexpr int64_t kNearBytes = 384 * 1024, kMostSums = 1 << 21, kWorthwhile = 192;
    count = most(least(least(pixels / kWorthwhile, 64), kMostSums / most(sums, 1)), 1);
    // Rows that fill the register blocks of the products.
    chunk = least(most(kNearBytes / most(pixel_bytes, 1) / 12 * 12, 24), 96);
  }

  int64_t begin(int64_t run) const { return run * pixels / count; }
  int64_t size(int64_t run) const { return begin(run + 1) - begin(run); }

  // Calls f(first pixel, pixels, pixels of the chunk behind it) for the chunks of a run.
  template <class F>
  void for_chunks(int64_t run, F&& f) const {
    for (int64_t first = begin(run), end = begin(run + 1); first < end; first += chunk) {
      const int64_t here = least(chunk, end - first);
      f(first, here, least(chunk, end - first - here));
    }
  }
};

}  // namespace espk::ESPK_ISA
