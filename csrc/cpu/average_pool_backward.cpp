// The gradient of average pooling: each pixel of the map is in one window or two of a row and of a column.
// Bytes: C/4 read (+ C of what it is added to) + C written a pixel; channels_last.
#include "far_map.h"
#include "kernels.h"
#include "normalise.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = ResamplingBackward;

int64_t shared_bytes(const Problem&) { return 0; }

void before(const Problem&, void*) {}

// A unit is a row of one image.
int64_t units(const Problem& p) { return p.batch * p.height; }

template <class T>
void run_type(const Problem& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t row_size = p.out_width * p.channels;
  const bool far = !p.add && is_far(static_cast<T*>(p.grad_x), p.batch * p.height * p.width, p.channels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t image = unit / p.height, y = unit % p.height;
    // Windows begin one pixel before twice their number: an even row is in one, an odd one in two, if there are two.
    const T* first = static_cast<const T*>(p.grad) + (image * p.out_height + y / 2) * row_size;
    const T* second = y % 2 && y / 2 + 1 < p.out_height ? first + row_size : nullptr;
    T* to = static_cast<T*>(p.grad_x) + unit * p.width * p.channels;
    for_channel_blocks<C>(p.channels, [&](auto lanes, auto count, int64_t channel, auto valid) {
      constexpr int N = decltype(lanes)::value, J = decltype(count)::value;
      using V = Vector<C, N>;
      const V nine = broadcast<C, N>(9);
      auto column = [&](int64_t i, int64_t at) {
        V sum = load_first<N>(first + i * p.channels + at, valid);
        if (second) sum += load_first<N>(second + i * p.channels + at, valid);
        return sum / nine;
      };
      auto put = [&](T* pixel, V sum) {
        if (p.add) sum += load_first<N>(pixel, valid);
        store_rows<N>(pixel, sum, valid, far);
      };
      for (int64_t i = 0; i < p.out_width; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
          const int64_t at = channel + j * N;
          V sum = column(i, at);
          put(to + 2 * i * p.channels + at, sum);
          if (2 * i + 1 == p.width) continue;
          if (i + 1 < p.out_width) sum += column(i + 1, at);
          put(to + (2 * i + 1) * p.channels + at, sum);
        }
      }
    });
  }
  if (far) finish_far_stores();
}

void run(const Problem& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace

extern const Kernel<Problem> average_pool_backward = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
