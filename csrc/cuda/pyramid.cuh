// What the passes of the spatial pyramid share: their shapes on the device, how a block's threads divide its pixels and
// channels, and the choice among the variants of a kernel.
#pragma once

#include "window.cuh"

namespace espk::cuda {

struct PyramidShape {
  int64_t channels, height, width, out_height, out_width, stride, blocks;
  int64_t dilations[kMaxBranches];
  Strides in, out;  // of the maps with d and with K*d channels
  Cut cut;
  int branches, halo_rows, halo_columns;
  bool hff, channels_last;
};

struct PyramidPlan {
  PyramidShape shape;
  Window window;
  int64_t shared_bytes, window_bytes;  // all of it, and the window's part
  bool vector_fill;  // 16 bytes hold whole channels; the address is for the caller to look at
};

// Everything but the window and the shared memory, which each pass counts for itself.
inline PyramidPlan pyramid_plan(const Pyramid& p, const Cut& cut) {
  PyramidPlan plan{};
  PyramidShape& s = plan.shape;
  s.channels = p.channels;
  s.height = p.height;
  s.width = p.width;
  s.out_height = p.out_height;
  s.out_width = p.out_width;
  s.stride = p.stride;
  for (int64_t k = 0; k < p.branches; ++k) s.dilations[k] = p.dilations[k];
  s.in = strides_of(p.layout, p.channels, p.height, p.width);
  s.out = strides_of(p.layout, p.out_channels(), p.out_height, p.out_width);
  s.cut = cut;
  s.branches = static_cast<int>(p.branches);
  s.halo_rows = static_cast<int>(reach(p, p.height));
  s.halo_columns = static_cast<int>(reach(p, p.width));
  s.hff = p.hff;
  s.channels_last = p.layout == Layout::channels_last;
  s.blocks = cut.blocks(p.batch);
  const int64_t vector = 16 / bytes_of(p.type);
  plan.vector_fill = s.channels_last && p.channels % vector == 0 && cut.channels % vector == 0;
  return plan;
}

// The window of the input that a cut of the result needs.
inline Window input_window(const Pyramid& p, const PyramidShape& s) {
  return window_of(p.layout, (s.cut.rows - 1) * p.stride + 1 + 2 * int64_t{s.halo_rows},
                   (s.cut.columns - 1) * p.stride + 1 + 2 * int64_t{s.halo_columns}, s.cut.channels);
}

inline int64_t branch_weight_bytes(const Pyramid& p, const Cut& cut) {
  const int64_t compute = p.type == Type::float64 ? 8 : 4;
  return round_up(9 * p.branches * cut.channels, 4) * compute;
}

// The rectangles that a cut makes of the maps, each for all slices of channels.
inline int64_t rectangles_of(const Pyramid& p, const Cut& cut) { return p.batch * cut.down * cut.across; }

// The weights of a block's channels as [K][9][channels] in the type of the sums; zeros for channels that do not exist.
template <class T>
__device__ void load_branch_weights(Compute<T>* to, const T* weight, const PyramidShape& s, int64_t first,
                                    int channels) {
  const int count = s.branches * 9 * s.cut.channels;
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) {
    const int channel = i % s.cut.channels, tap = i / s.cut.channels % 9;
    const int64_t branch = i / s.cut.channels / 9;
    to[i] = channel < channels ? widen(weight[(branch * s.channels + first + channel) * 9 + tap]) : Compute<T>(0);
  }
}

// A thread computes `rows` pixels, one below another and `row_groups` apart, of `vector` channels. Neighbouring threads
// take what is next in memory: channels in channels_last, columns otherwise.
struct Item {
  int row, column, channel;
};

struct Items {
  int row_groups, columns, channels, vector, count;
  bool channels_last;

  __device__ Items(const Cut& cut, int rows, int channels_a_thread, bool last)
      : row_groups(cut.rows / rows),
        columns(cut.columns),
        channels(cut.channels / channels_a_thread),
        vector(channels_a_thread),
        count(row_groups * columns * channels),
        channels_last(last) {}

  __device__ Item operator[](int i) const {
    const int outer = i / (columns * channels), inner = i % (columns * channels);
    if (channels_last) return {outer, inner / channels, inner % channels * vector};
    return {outer, inner % columns, inner / columns * vector};
  }

  // The inverse; `of_vector` counts vectors of channels.
  __device__ int index(int row_group, int column, int of_vector) const {
    const int outer = row_group * columns * channels;
    return outer + (channels_last ? column * channels + of_vector : of_vector * columns + column);
  }
};

// The affine and PReLU of one channel.
template <class C>
__device__ __forceinline__ C channel_epilogue(const Epilogue& e, int64_t channel, C value) {
  if (e.scale) value *= static_cast<const C*>(e.scale)[channel];
  if (e.shift) value += static_cast<const C*>(e.shift)[channel];
  if (e.slope && value <= 0) value *= static_cast<const C*>(e.slope)[channel];
  return value;
}

// A kernel's variant: threads of a block, rows and channels of a thread, and whether the window is staged in shared
// memory or the taps read the map itself, which is for dilations so long that no window fits.
template <int Threads, int Rows, int Channels, bool Staged>
struct PyramidTraits {
  static constexpr int threads = Threads, rows = Rows, channels = Channels;
  static constexpr bool staged = Staged;

  // At most `tall` x `wide` pixels of a map of `height` x `width`, and `slice` channels where they are neighbours.
  static Cut cut(const Pyramid& p, int64_t height, int64_t width, int64_t tall, int64_t wide, int64_t slice) {
    const bool last = p.layout == Layout::channels_last;
    if (!last) slice = 2;
    return cut_into(least(tall, round_up(height, rows)), least(last ? wide : 2 * wide, width),
                    least(slice, round_up(p.channels, channels)), height, width, p.channels);
  }
};

// The one place that chooses. Large blocks reuse more of their halo and hide latency by four rows a thread; where they
// are too few to fill a device, or too large to share a multiprocessor, small ones.
// Calls start(traits, plan) with plan(cut, traits) of a cut of a map of `height` x `width`, whose window holds elements of `bytes`.
template <class T, class Plan, class Start>
auto with_pyramid_traits(const Pyramid& p, int64_t height, int64_t width, int64_t bytes, bool vectors, Plan plan,
                         Start start) {
  constexpr bool kFast = !std::is_same_v<T, double>;
  auto choose = [&](auto large, auto small) {
    if constexpr (kFast) {
      const PyramidPlan big = plan(large.cut(p, height, width, 16, 16, 64 / bytes), large);
      if (big.shape.blocks >= enough_blocks() && big.shared_bytes <= kSharedForTwo) return start(large, big);
    }
    const PyramidPlan little = plan(small.cut(p, height, width, 8, 8, 32 / bytes), small);
    if (little.shared_bytes <= shared_memory_limit()) return start(small, little);
    const PyramidTraits<256, 1, 1, false> direct;
    PyramidPlan unstaged = plan(direct.cut(p, height, width, 8, 16, 32 / bytes), direct);
    unstaged.shared_bytes -= unstaged.window_bytes;
    return start(direct, unstaged);
  };
  if constexpr (kFast) {
    if (vectors && p.layout == Layout::channels_last && p.channels % 4 == 0) {
      return choose(PyramidTraits<256, 4, 4, true>{}, PyramidTraits<128, 1, 4, true>{});
    }
  }
  return choose(PyramidTraits<256, 4, 1, true>{}, PyramidTraits<128, 1, 1, true>{});
}

}  // namespace espk::cuda
