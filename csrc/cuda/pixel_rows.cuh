// How blocks share out a channels_last map that is read and written once: a thread stays with a few neighbouring channels
// and walks down the pixels of its block's part, a few at a time so that their loads are under way together.
#pragma once

#include "channel_sums.cuh"

namespace espk::cuda {

constexpr int kRowThreads = 256;
constexpr int kPixelsTogether = 4;

struct PixelRows {
  int64_t pixels, channels, slices, parts, pixels_a_part, blocks;
  int vectors, rows;  // of a slice, and pixels that a block has at once
};

// `vector` channels a thread.
inline PixelRows pixel_rows(int64_t pixels, int64_t channels, int vector) {
  PixelRows r{};
  r.pixels = pixels;
  r.channels = channels;
  const int64_t vectors = ceil_div(channels, vector);
  r.slices = ceil_div(vectors, 64);
  r.vectors = static_cast<int>(ceil_div(vectors, r.slices));
  r.rows = kRowThreads / r.vectors;
  const int64_t tile = int64_t{r.rows} * kPixelsTogether;
  r.pixels_a_part = tile * tiles_a_part(ceil_div(pixels, tile), r.slices);
  r.parts = ceil_div(pixels, r.pixels_a_part);
  r.blocks = r.parts * r.slices;
  return r;
}

// This thread's place in one block.
struct RowPlace {
  int64_t channel, first, end;  // the thread's channels, its first pixel, and where its block's end
  bool there;

  __device__ RowPlace(const PixelRows& r, int64_t block, int vector) {
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t slice = block % r.slices, part = block / r.slices;
    channel = (slice * r.vectors + thread % r.vectors) * vector;
    first = part * r.pixels_a_part + thread / r.vectors;
    end = least((part + 1) * r.pixels_a_part, r.pixels);
    there = thread < r.rows * r.vectors && channel < r.channels;
  }
};

// Calls f(element type, channels a thread) for maps of `channels` channels at the addresses given.
template <class F, class... Pointers>
auto with_row_vector(Type type, int64_t channels, F&& f, Pointers... maps) {
  return with_type(type, [&](auto* element) {
    constexpr int kVector = 4;
    const int64_t bytes = least(16, kVector * bytes_of(type));
    if (channels % kVector == 0 && (aligned(maps, bytes) && ...)) {
      return f(element, std::integral_constant<int, kVector>{});
    }
    return f(element, std::integral_constant<int, 1>{});
  });
}

}  // namespace espk::cuda
