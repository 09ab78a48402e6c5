// Sums over pixels, one a channel, in two stages: pieces of the batch that depend on the shape alone are summed in the
// compute type a few pixels at a time and in float64 beyond, and the pieces are added in order. No number of threads
// changes a bit.
#pragma once

#include "normalise.h"

namespace espk::ESPK_ISA {

// sums[i] += numbers[i]
template <class C, int N>
inline void add_to(double* sums, Vector<C, N> numbers) {
  store<N>(sums, load<N>(sums) + __builtin_convertvector(numbers, Vector<double, N>));
}

// The same of the first `valid` lanes alone: the sums behind them may be another unit's.
template <class C, int N>
inline void add_to(double* sums, Vector<C, N> numbers, int64_t valid) {
  if (valid >= N) return add_to<C, N>(sums, numbers);
  for (int64_t lane = 0; lane < valid; ++lane) sums[lane] += static_cast<double>(numbers[lane]);
}

// Numbers a lane that are summed in the compute type, at most.
constexpr int64_t kSummed = 256;

// The mean of `count` numbers from their sum.
template <class C, int N>
inline Vector<C, N> mean_of(const double* sums, int64_t count) {
  return __builtin_convertvector(load<N>(sums) / broadcast<double, N>(static_cast<double>(count)), Vector<C, N>);
}

// The moments of the pieces of a map: for each piece and channel its mean and its sum of squared deviations, which are
// sums around the piece's first pixel until finish(). That pixel is one of the sample, so that however far the mean lies
// from zero, squares cancel only as much as the piece's own spread.
template <class C>
class PieceMoments {
 public:
  PieceMoments(int64_t pieces, int64_t channels, Carving& memory)
      : channels_(channels),
        pitch_(padded<double>(padded<C>(channels))),
        data_(memory.take<double>(2 * pieces * pitch_)) {}

  // Where sums of `piece` begin for channels from `first` on: clears them.
  void begin(int64_t piece, int64_t first, int64_t channels) const;

  // Adds `pixels` pixels, `pitch` apart from `map` on, of the channels from `first` on. `origin` is the piece's first pixel.
  template <class T>
  void add(int64_t piece, int64_t first, int64_t channels, const T* origin, const T* map, int64_t pitch,
           int64_t pixels) const;

  // Turns the sums of `pixels` pixels into moments; `origin` as before.
  template <class T>
  void finish(int64_t piece, int64_t first, int64_t channels, const T* origin, int64_t pixels) const;

  // Merges the pieces, of pixels(piece) pixels each, in order.
  template <class Pixels>
  void merge(const Moments& to, int64_t pieces, Pixels&& pixels) const {
    double total = 0;
    for (int64_t i = 0; i < channels_; ++i) to.mean[i] = to.variance[i] = 0;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const double count = static_cast<double>(pixels(piece));
      if (count == 0) continue;
      const double share = count / (total + count), weight = total * share;
      const double *means = mean(piece), *spreads = squares(piece);
      for (int64_t i = 0; i < channels_; ++i) {
        const double difference = means[i] - to.mean[i];
        to.mean[i] += difference * share;
        to.variance[i] += spreads[i] + difference * difference * weight;
      }
      total += count;
    }
    for (int64_t i = 0; i < channels_; ++i) to.variance[i] /= total;
  }

 private:
  double* mean(int64_t piece) const { return data_ + 2 * piece * pitch_; }
  double* squares(int64_t piece) const { return mean(piece) + pitch_; }

  int64_t channels_, pitch_;
  double* data_;
};

// The three sums of NormSums for one vector of channels, over a few pixels.
template <class C, int N>
struct NormSumLanes {
  using V = Vector<C, N>;
  V mean{}, grad{}, centred{}, slope{};

  // `behind` is the gradient behind the PReLU, `before` what is in front of the PReLU, and `map` of the norm. Returns the
  // gradient between the two.
  V add(V behind, V before, V map, V slopes) {
    slope += before > V{} ? V{} : behind * before;  // the product first: nothing times infinity is no number
    return add(before > V{} ? behind : behind * slopes, map);
  }
  V add(V between, V map) {
    grad += between;
    centred += between * (map - mean);
    return between;
  }
};

// The sums of NormSums for each piece.
template <class C>
class PieceSums {
 public:
  C* mean;

  PieceSums(int64_t pieces, int64_t channels, Carving& memory)
      : mean(memory.take<C>(padded<C>(channels))),
        channels_(channels),
        pitch_(padded<double>(padded<C>(channels))),
        data_(memory.take<double>(3 * pieces * pitch_)) {}

  void begin(int64_t piece, int64_t first, int64_t channels) const;

  template <int N>
  NormSumLanes<C, N> at(int64_t channel) const {
    NormSumLanes<C, N> sums;
    sums.mean = load<N>(mean + channel);
    return sums;
  }

  template <int N>
  void add(int64_t piece, int64_t channel, const NormSumLanes<C, N>& sums, int64_t valid) const {
    const Vector<C, N> numbers[3] = {sums.grad, sums.centred, sums.slope};
    for (int s = 0; s < 3; ++s) add_to<C, N>(of(piece, s) + channel, numbers[s], valid);
  }

  // Adds the pieces in order.
  void merge(const NormSums& to, int64_t pieces) const;

 private:
  double* of(int64_t piece, int s) const { return data_ + (3 * piece + s) * pitch_; }

  int64_t channels_, pitch_;
  double* data_;
};

}  // namespace espk::ESPK_ISA
