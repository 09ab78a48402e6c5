// What some rows of a dense convolution's result read: rows of its input between the zeros that pad it, in which a filter's
// numbers lie at the same steps from every pixel.
#pragma once

#include "kernels.h"
#include "row.h"

namespace espk::ESPK_ISA {

// In the layout of the input: planes [M][rows][pitch], or pixels [rows][pitch] with `pixel` numbers each.
struct InputStrip {
  bool pixels;
  int64_t pixel, rows, pitch;

  InputStrip(const Convolution& p, int64_t out_rows)
      : InputStrip(p, out_rows, p.layout == Layout::channels_last,
                   p.layout == Layout::channels_last ? p.in_channels : 1) {}

  InputStrip(const Convolution& p, int64_t out_rows, bool pixels, int64_t pixel)
      : pixels(pixels),
        pixel(pixel),
        rows((out_rows - 1) * p.stride + p.filter_height),
        pitch(most((p.out_width - 1) * p.stride + p.filter_width, p.width + p.padding_columns) * pixel) {}

  int64_t plane() const { return rows * pitch; }
  int64_t size(const Convolution& p) const { return plane() * (pixels ? 1 : p.in_channels); }

  // Row `first_row` of an image and those behind it; rows beyond the image are zeros.
  template <class T>
  void fill(const Convolution& p, Compute<T>* to, int64_t image, int64_t first_row) const {
    const int64_t planes = pixels ? 1 : p.in_channels, numbers = p.width * pixel;
    const int64_t border = p.padding_columns * pixel;
    const T* x = static_cast<const T*>(p.x) + image * p.in_channels * p.height * p.width;
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t r = 0; r < rows; ++r, to += pitch) {
        const int64_t y = first_row + r;
        if (y < 0 || y >= p.height) {
          fill_zero(to, pitch);
          continue;
        }
        fill_zero(to, border);
        copy_row(to + border, x + (plane * p.height + y) * numbers, numbers);
        fill_zero(to + border + numbers, pitch - border - numbers);
      }
    }
  }
};

// Rows of the result in one unit: few enough for many threads, and three rows in four read once.
inline int64_t strip_rows(const Convolution& p) { return least(p.out_height, 4); }

}  // namespace espk::ESPK_ISA
