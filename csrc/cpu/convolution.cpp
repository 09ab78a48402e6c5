// Dense convolution of few input channels, such as the first one of a network, with its epilogue: each output row is one
// matrix product whose left side is read where it lies in a zero-bordered strip of the input, M*h*w numbers a pixel.
// Pairs of bfloat16 need each row of the filter in one run, so their strip holds whole pixels, of an even number of channels.
// Bytes: M read + N written a pixel; multiply-adds: M*h*w*N a pixel of the result.
#include "input_strip.h"
#include "kernels.h"
#include "pointwise_weights.h"

namespace espk::ESPK_ISA {
namespace {

PointwiseWeights weights_of(const Convolution& p) { return {p.type, true, 1, p.depth(), p.out_channels, false}; }

bool in_pairs(const Convolution& p) { return kLanes<float> == kPairColumns && p.bfloat16 && p.type == Type::bfloat16; }

// Numbers of a pixel in a strip for pairs.
int64_t pair_pixel(const Convolution& p) { return round_up(p.in_channels, 2); }

// For pairs always pixels, with a zero behind an odd number of channels.
InputStrip strip_of(const Convolution& p, int64_t out_rows) {
  return in_pairs(p) ? InputStrip(p, out_rows, true, pair_pixel(p)) : InputStrip(p, out_rows);
}

int64_t pair_depth(const Convolution& p) { return p.filter_height * p.filter_width * pair_pixel(p); }

int64_t offsets_offset(const Convolution& p) { return round_up(weights_of(p).bytes(), 64); }

int64_t shared_bytes(const Convolution& p) {
  if (in_pairs(p)) return 2 * packed_pairs_size(pair_depth(p), p.out_channels);
  return offsets_offset(p) + p.depth() * static_cast<int64_t>(sizeof(int64_t));
}

void prepare_pairs(const Convolution& p, uint16_t* to) {
  const uint16_t* weight = static_cast<const uint16_t*>(p.weight);
  const int64_t taps = p.filter_height * p.filter_width, pixel = pair_pixel(p);
  pack_pairs(to, pair_depth(p), p.out_channels, [&](int64_t k, int64_t out) {
    const int64_t tap = k / pixel, c = k % pixel;
    return c < p.in_channels ? weight[(out * p.in_channels + c) * taps + tap] : uint16_t{0};
  });
}

// The weights [N, M, h, w] as the columns of a product of depth M*h*w, and where in the strip each step of the depth is.
void before(const Convolution& p, void* shared) {
  if (in_pairs(p)) return prepare_pairs(p, static_cast<uint16_t*>(shared));
  weights_of(p).prepare(p.weight, shared);
  int64_t* offsets = reinterpret_cast<int64_t*>(static_cast<char*>(shared) + offsets_offset(p));
  const InputStrip strip = strip_of(p, strip_rows(p));
  for (int64_t c = 0; c < p.in_channels; ++c) {
    for (int64_t i = 0; i < p.filter_height; ++i) {
      for (int64_t j = 0; j < p.filter_width; ++j) {
        *offsets++ = i * strip.pitch + j * strip.pixel + c * (strip.pixels ? 1 : strip.plane());
      }
    }
  }
}

int64_t units(const Convolution& p) { return p.batch * ceil_div(p.out_height, strip_rows(p)); }

// Row y of the input as whole pixels, between zeros; a row of zeros beyond the input.
void fill_pairs(const Convolution& p, const InputStrip& strip, uint16_t* to, const uint16_t* x, int64_t y) {
  const bool inside = y >= 0 && y < p.height, planes = p.layout == Layout::contiguous;
  const int64_t border = inside ? p.padding_columns * strip.pixel : strip.pitch;
  fill_zero(to, border);
  if (!inside) return;
  const int64_t channels = p.in_channels, plane = p.height * p.width;
  const uint16_t* row = x + y * p.width * (planes ? 1 : channels);
  uint16_t* pixel = to + border;
  int64_t i = 0;
  // The three planes of a photograph, eight pixels at a time.
  for (; planes && channels == 3 && i + 8 <= p.width; i += 8, pixel += 8 * strip.pixel) {
    auto part = [&](int64_t c) {
      Vector<uint16_t, 8> numbers;
      __builtin_memcpy(&numbers, row + c * plane + i, sizeof numbers);
      return __builtin_convertvector(numbers, Vector<uint64_t, 8>);
    };
    const auto pixels = part(0) | part(1) << 16 | part(2) << 32;
    __builtin_memcpy(pixel, &pixels, sizeof pixels);
  }
  for (; i < p.width; ++i, pixel += strip.pixel) {
    for (int64_t c = 0; c < channels; ++c) pixel[c] = planes ? row[c * plane + i] : row[i * channels + c];
    if (channels < strip.pixel) pixel[channels] = 0;
  }
  fill_zero(pixel, to + strip.pitch - pixel);
}

void run_pairs(const Convolution& p, const void* shared, int64_t begin, int64_t end) {
  const int64_t rows = strip_rows(p), strips = ceil_div(p.out_height, rows);
  const InputStrip strip = strip_of(p, rows);
  uint16_t* tile = static_cast<uint16_t*>(scratch(Slot::tile, 2 * strip.plane()));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips, first = unit % strips * rows;
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + image * p.in_channels * p.height * p.width;
    for (int64_t r = 0; r < strip.rows; ++r) {
      fill_pairs(p, strip, tile + r * strip.pitch, x, first * p.stride - p.padding_rows + r);
    }
    for (int64_t y = first; y < least(first + rows, p.out_height); ++y) {
      Bfloat16Product product{};
      product.rows = p.out_width;
      product.groups = 1;
      product.columns = p.out_channels;
      product.depth = p.filter_width * strip.pixel;
      product.parts = p.filter_height;
      product.a = tile + (y - first) * p.stride * strip.pitch;
      product.a_row = p.stride * strip.pixel;
      product.a_part = strip.pitch;
      product.b = static_cast<const uint16_t*>(shared);
      set_parameters(product, p.epilogue, 0);
      product.out = static_cast<uint16_t*>(p.out) + (image * p.out_height + y) * p.out_width * p.out_channels;
      product.out_row = p.out_channels;
      p.bfloat16->multiply(product);
    }
  }
}

template <class T>
void run_type(const Convolution& p, void* shared, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t rows = strip_rows(p), strips = ceil_div(p.out_height, rows), row = p.out_width * p.out_channels;
  const InputStrip strip = strip_of(p, rows);
  C* tile = static_cast<C*>(scratch(Slot::tile, strip.size(p) * static_cast<int64_t>(sizeof(C))));
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / strips, first = unit % strips * rows;
    strip.fill<T>(p, tile, image, first * p.stride - p.padding_rows);
    for (int64_t y = first; y < least(first + rows, p.out_height); ++y) {
      MatrixProduct<C> product{};
      product.rows = p.out_width;
      product.columns = p.out_channels;
      product.depth = p.depth();
      product.a = tile + (y - first) * p.stride * strip.pitch;
      product.a_row = p.stride * strip.pixel;
      product.a_offsets = reinterpret_cast<const int64_t*>(static_cast<char*>(shared) + offsets_offset(p));
      product.b = static_cast<const C*>(shared);
      product.b_packed = true;
      set_epilogue(product, p.epilogue, 0, true);
      T* out = static_cast<T*>(p.out) + (image * p.out_height + y) * row;
      Ahead ahead;  // of what is overwritten: the machine reads lines before it writes to them
      if (y + 1 < p.out_height) ahead.add(out + row, row);
      ahead.over(row * p.depth());
      product.ahead = &ahead;
      multiply_into<T>(product, out, nullptr, p.out_channels);
    }
  }
}

void run(const Convolution& p, void* shared, int64_t begin, int64_t end) {
  if (in_pairs(p)) return run_pairs(p, shared, begin, end);
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, shared, begin, end); });
}

}  // namespace

extern const Kernel<Convolution> convolution = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
