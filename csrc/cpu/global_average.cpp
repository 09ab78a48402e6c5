// The mean of each channel, before a classifier or a weighting of channels. Sums of many numbers lose digits, more the more
// alike those are: they are taken in the compute type over a few hundred and in float64 beyond. Bytes: the map, read once.
#include "channel_sums.h"
#include "kernels.h"
#include "vector.h"

namespace espk::ESPK_ISA {
namespace {

// Sums of one vector that hide the latency of the additions.
constexpr int kSums = 4;

// Vectors of channels that a unit takes: a whole line of each pixel, which is read once then.
template <class T>
constexpr int kVectors = static_cast<int>(kLineBytes) / (kLanes<Compute<T>> * static_cast<int>(sizeof(T)));

template <class T>
constexpr int64_t kChannels = kVectors<T> * kLanes<Compute<T>>;

// The channels from `c` on, `channels` of them.
template <class T>
void average_pixels(const GlobalAverage& p, int64_t image, int64_t c, int64_t channels) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* x = static_cast<const T*>(p.x) + image * p.pixels * p.channels + c;
  T* out = static_cast<T*>(p.out) + image * p.channels + c;
  auto average = [&](auto vectors, int64_t first, int64_t valid) {
    constexpr int J = decltype(vectors)::value, P = J > 2 ? 2 : kSums;
    double total[J * N] = {};
    for (int64_t pixel = 0; pixel < p.pixels;) {
      const int64_t end = least(pixel + kSummed, p.pixels);
      Vector<C, N> sum[P][J]{};
      auto add = [&](int64_t at, int to) {
        const T* from = x + at * p.channels + first;
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sum[to][j] += J > 1 ? load<N>(from + j * N) : load_first<N>(from, valid);
      };
      for (; pixel + P <= end; pixel += P) {
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) add(pixel + k, k);
      }
      for (; pixel < end; ++pixel) add(pixel, 0);
      for (int j = 0; j < J; ++j) {
        for (int k = 1; k < P; ++k) sum[0][j] += sum[k][j];
        add_to<C, N>(total + j * N, sum[0][j]);
      }
    }
    for (int j = 0; j < J; ++j) {
      store_first<N>(out + first + j * N, mean_of<C, N>(total + j * N, p.pixels), valid - j * N);
    }
  };
  if (channels == kChannels<T>) return average(Lanes<kVectors<T>>{}, 0, channels);
  for (int64_t first = 0; first < channels; first += N) average(Lanes<1>{}, first, channels - first);
}

template <class T>
void average_plane(const GlobalAverage& p, int64_t plane) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T* x = static_cast<const T*>(p.x) + plane * p.pixels;
  double lanes[N] = {}, total = 0;
  for (int64_t i = 0; i < p.pixels;) {
    const int64_t end = least(i + kSummed * N, p.pixels);
    Vector<C, N> sum[kSums]{};
    for (; i + kSums * N <= end; i += kSums * N) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; ++k) sum[k] += load<N>(x + i + k * N);
    }
    for (; i < end; i += N) sum[0] += load_first<N>(x + i, least(N, end - i));
    add_to<C, N>(lanes, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  for (double lane : lanes) total += lane;
  store_one(static_cast<T*>(p.out) + plane, static_cast<C>(total / static_cast<double>(p.pixels)));
}

template <class T>
int64_t maps(const GlobalAverage& p) {
  return p.layout == Layout::channels_last ? ceil_div(p.channels, kChannels<T>) : p.channels;
}

int64_t shared_bytes(const GlobalAverage&) { return 0; }

void before(const GlobalAverage&, void*) {}

// A unit is a line of channels of an image, or a plane.
int64_t units(const GlobalAverage& p) {
  return with_type(p.type, [&](auto* type) { return p.batch * maps<std::remove_pointer_t<decltype(type)>>(p); });
}

void run(const GlobalAverage& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t unit = begin; unit < end; ++unit) {
      if (p.layout == Layout::channels_last) {
        const int64_t first = unit % maps<T>(p) * kChannels<T>;
        average_pixels<T>(p, unit / maps<T>(p), first, least(kChannels<T>, p.channels - first));
      } else {
        average_plane<T>(p, unit);
      }
    }
  });
}

}  // namespace

extern const Kernel<GlobalAverage> global_average = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
