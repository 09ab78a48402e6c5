// The kernels of inference that do something to each pixel: affine, change of layout, concatenation, largest channel.
#pragma once

#include <algorithm>

#include "check.h"

// The first largest channel at each pixel of the map of 2 H - 1 rows and 4 W - 3 columns, whose weights are quarters.
inline std::vector<int64_t> largest_channels(const Tensor& x, int64_t rows, int64_t columns) {
  std::vector<int64_t> winners;
  for (int64_t b = 0; b < x.sizes[0]; ++b)
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t z = 0; z < columns; ++z) {
        const int64_t above = y / 2, left = z / 4;
        const int64_t below = std::min(above + 1, x.sizes[2] - 1), right = std::min(left + 1, x.sizes[3] - 1);
        const double down = static_cast<double>(y % 2) / 2, across = static_cast<double>(z % 4) / 4;
        int64_t winner = 0;
        double best = -INFINITY;
        for (int64_t c = 0; c < x.sizes[1]; ++c) {
          const double upper = x.at(b, c, above, left) * (1 - across) + x.at(b, c, above, right) * across;
          const double lower = x.at(b, c, below, left) * (1 - across) + x.at(b, c, below, right) * across;
          const double value = upper * (1 - down) + lower * down;
          if (value > best) best = value, winner = c;
        }
        winners.push_back(winner);
      }
  return winners;
}

template <class Number>
void check_resized_argmax(const Case& s, Type type, const Tensor& x) {
  espk::ResizedArgmax p{};
  p.type = type;
  p.batch = s.batch;
  p.channels = s.channels;
  p.height = s.height;
  p.width = s.width;
  p.out_height = 2 * s.height - 1;
  p.out_width = 4 * s.width - 3;
  p.wide = sizeof(Number) == 8;
  const Buffer x_buffer(type, Layout::channels_last, x);
  p.x = x_buffer.data();
  const std::vector<int64_t> expected = largest_channels(x, p.out_height, p.out_width);
  for (auto split : kSplits) {
    const std::unique_ptr<Number, void (*)(void*)> out(
        static_cast<Number*>(std::malloc(static_cast<size_t>(std::max<int64_t>(p.out_bytes(), 1)))), std::free);
    std::memset(out.get(), 0xff, static_cast<size_t>(p.out_bytes()));
    p.out = out.get();
    const auto shared = aligned(kernels.resized_argmax.shared_bytes(p));
    kernels.resized_argmax.before(p, shared.get());
    const int64_t units = kernels.resized_argmax.units(p);
    if (units > 0)
      split(units, [&](int64_t begin, int64_t end) { kernels.resized_argmax.run(p, shared.get(), begin, end); });
    ++checks;
    if (!std::equal(expected.begin(), expected.end(), out.get(),
                    [](int64_t right, Number found) { return static_cast<Number>(right) == found; })) {
      ++failures;
      std::printf("FAIL resized_argmax, %s, type %d: other channels\n", s.name, static_cast<int>(type));
    }
  }
}

inline void check_pixels(const Case& s, Type type, Layout layout) {
  Draw draw;
  const Tensor x = draw.integers({s.batch, s.channels, s.height, s.width});
  const Steps steps = draw.steps(s.channels, x.sizes);
  const Buffer pixels(type, Layout::channels_last, x), turned(type, layout, x);
  const EpilogueBuffers buffers(type, Layout::channels_last, steps);

  espk::Affine affine{};
  affine.type = type;
  affine.batch = s.batch;
  affine.channels = s.channels;
  affine.pixels = s.height * s.width;
  affine.x = pixels.data();
  affine.epilogue = buffers.epilogue;
  check("affine", s, kernels.affine, affine, &espk::Affine::out, epilogue(x, steps), Target{Layout::channels_last});

  const bool back = layout == Layout::channels_last;
  espk::ChangeLayout change{};
  change.type = type;
  change.batch = s.batch;
  change.rows = back ? affine.pixels : s.channels;
  change.columns = back ? s.channels : affine.pixels;
  change.x = turned.data();
  check("change_layout", s, kernels.change_layout, change, &espk::ChangeLayout::out, x,
        Target{back ? Layout::contiguous : Layout::channels_last});

  // Behind one channel that is there already, which the guards of the first pixel's memory cannot show.
  Tensor wide = draw.integers({s.batch, s.channels + 1, s.height, s.width}), joined = wide;
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t y = 0; y < s.height; ++y)
        for (int64_t z = 0; z < s.width; ++z) joined.at(b, c + 1, y, z) = x.at(b, c, y, z);
  espk::Concatenate part{};
  part.type = type;
  part.rows = s.batch * affine.pixels;
  part.row = s.channels;
  part.out_row = s.channels + 1;
  part.x = pixels.data();
  check("concatenate", s, kernels.concatenate, part, &espk::Concatenate::out, joined,
        Target{Layout::channels_last, &wide, 1});

  check_resized_argmax<uint8_t>(s, type, x);
  check_resized_argmax<int64_t>(s, type, x);
}
