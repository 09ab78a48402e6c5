// What the end of a down-sampler joins, a block of channels at a time: the pooled map or the expanded one, and the shortcut
// from the image, which is multiplied where it is added: I multiply-adds a number instead of a map to write and to read.
#pragma once

#include "normalise.h"

namespace espk::ESPK_ISA {

// The vectors of all N channels in the compute type.
template <class C>
struct JoinedVectors {
  C *weight, *shift, *slope;
  int64_t pitch;  // from one image channel's weights to the next

  JoinedVectors(const JoinedMaps& p, Carving& memory)
      : weight(memory.take<C>(p.image_channels * padded<C>(p.channels()))),
        shift(memory.take<C>(padded<C>(p.channels()))),
        slope(memory.take<C>(padded<C>(p.channels()))),
        pitch(padded<C>(p.channels())) {}

  void fill(const JoinedMaps& p) const {
    for (int64_t k = 0; k < p.image_channels; ++k) {
      fill_vector<C>(weight + k * pitch, p.weight + k * p.channels(), p.channels(), 0);
    }
    fill_vector<C>(shift, p.shift, p.channels(), 0);
    fill_vector<C>(slope, p.slope, p.channels(), 1);
  }
};

// A map that is joined, its gradient, and its first channel in the result.
template <class T>
struct JoinedPart {
  const T* map;
  T* grad;
  int64_t channels, first;
};

// The image's values at one pixel in the compute type.
template <class T>
struct ImagePixel {
  Compute<T> values[kMostImageChannels];

  ImagePixel(const JoinedMaps& p, int64_t pixel) {
    const T* from = static_cast<const T*>(p.image) + pixel * p.image_channels;
    for (int64_t k = 0; k < p.image_channels; ++k) values[k] = load_one(from + k);
  }
};

// The result in front of its PReLU: `v` of the part's channels that are those of the result from `channel` on.
template <int N, class C, class T>
inline Vector<C, N> joined(const JoinedVectors<C>& vectors, int64_t image_channels, const ImagePixel<T>& image,
                           int64_t channel, Vector<C, N> v) {
  v += load<N>(vectors.shift + channel);
  for (int64_t k = 0; k < image_channels; ++k) {
    v += image.values[k] * load<N>(vectors.weight + k * vectors.pitch + channel);
  }
  return v;
}

}  // namespace espk::ESPK_ISA
