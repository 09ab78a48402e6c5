// The mean of each channel, before a classifier or a weighting of channels. Bytes: the map, read once.
#include "kernels.h"
#include "zero_bordered_tile.h"

namespace espk::ESPK_ISA {
namespace {

// Four sums hide the latency of the additions.
constexpr int kSums = 4;

template <class T>
void average_pixels(const GlobalAverage& p, int64_t image, int64_t c) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const int64_t valid = least(N, p.channels - c);
  const T* x = static_cast<const T*>(p.x) + image * p.pixels * p.channels + c;
  Vector<C, N> sum[kSums]{};
  int64_t i = 0;
  for (; i + kSums <= p.pixels; i += kSums) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) sum[k] += load_first<N>(x + (i + k) * p.channels, valid);
  }
  for (; i < p.pixels; ++i) sum[0] += load_first<N>(x + i * p.channels, valid);
  const Vector<C, N> mean = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / broadcast<C, N>(static_cast<C>(p.pixels));
  store_first<N>(static_cast<T*>(p.out) + image * p.channels + c, mean, valid);
}

template <class T>
void average_plane(const GlobalAverage& p, int64_t plane) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* x = static_cast<const T*>(p.x) + plane * p.pixels;
  Vector<C, N> sum[kSums]{};
  int64_t i = 0;
  for (; i + kSums * N <= p.pixels; i += kSums * N) {
#pragma GCC unroll 4
    for (int k = 0; k < kSums; ++k) sum[k] += load<N>(x + i + k * N);
  }
  for (; i < p.pixels; i += N) sum[0] += load_first<N>(x + i, least(N, p.pixels - i));
  C lanes[N], total = 0;
  store<N>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (C lane : lanes) total += lane;
  store_one(static_cast<T*>(p.out) + plane, total / static_cast<C>(p.pixels));
}

template <class C>
int64_t maps(const GlobalAverage& p) {
  return p.layout == Layout::channels_last ? ceil_div(p.channels, kLanes<C>) : p.channels;
}

int64_t shared_bytes(const GlobalAverage&) { return 0; }

void before(const GlobalAverage&, void*) {}

// A unit is a vector of channels of an image, or a plane.
int64_t units(const GlobalAverage& p) {
  return with_type(p.type,
                   [&](auto* type) { return p.batch * maps<Compute<std::remove_pointer_t<decltype(type)>>>(p); });
}

void run(const GlobalAverage& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (p.layout == Layout::channels_last) {
        average_pixels<T>(p, unit / maps<C>(p), unit % maps<C>(p) * kLanes<C>);
      } else {
        average_plane<T>(p, unit);
      }
    }
  });
}

}  // namespace

extern const Kernel<GlobalAverage> global_average = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
