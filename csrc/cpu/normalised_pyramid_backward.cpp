// Both gradients of the spatial pyramid between two batch norms. The gradients in front of the norm behind it fill one
// zero-bordered tile a branch and become suffix sums there (hierarchical feature fusion turned around); these tiles meet
// the tile of the normalised input for the weights, and the taps for the input, whose gradient goes through the PReLU in
// front and leaves the sums of the norm there. Sums are two-stage, in order. Training only, channels_last.
// Bytes: (2*K + 1)*d read + d written a pixel; multiply-adds: 18*K*d a pixel.
#include "channel_sums.h"
#include "kernels.h"
#include "ordered_sum.h"
#include "pyramid_gradient.h"
#include "pyramid_strip.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = NormalisedPyramidBackward;

// Strips of rows of the gradient, which are those of a class of the input (see pyramid_gradient.h).
template <class C>
Strips strips_of(const Problem& p) {
  const int64_t lanes = least(kLanes<C>, p.channels);
  const int64_t gradient = p.branches * (p.out_width + 2 * gradient_reach(p, p.width));
  const int64_t input = p.stride * (p.width + 2 * reach(p, p.width));
  return choose_strips(p.out_height, (gradient + input) * lanes * static_cast<int64_t>(sizeof(C)),
                       2 * gradient_reach(p, p.height), p.batch * pyramid_maps<C>(p));
}

template <class C>
struct Shared {
  void* weights;
  NormGradientVectors<C> norm;
  NormaliseVectors<C> normalise;
  PieceSums<C> sums;  // a piece is a strip of an image
  C* weight_sums;  // of each piece: for each block of channels [9 K][N]
  int64_t bytes;

  Shared(const Problem& p, void* memory) : Shared(p, Carving(memory)) {}

  static int64_t weight_size(const Problem& p) { return 9 * p.branches * pyramid_maps<C>(p) * kLanes<C>; }
  static int64_t pieces(const Problem& p) { return p.batch * strips_of<C>(p).count; }

 private:
  Shared(const Problem& p, Carving memory)
      : weights(memory.take<char>(branch_weight_bytes(p))),
        norm(p.norm, p.out_channels(), memory),
        normalise(p.channels, memory),
        sums(pieces(p), p.channels, memory),
        weight_sums(memory.take<C>(pieces(p) * weight_size(p))),
        bytes(memory.bytes()) {}
};

void before(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    const Shared<C> shared(p, memory);
    prepare_branch_weights(p, p.weight, shared.weights);
    shared.norm.fill(p.norm, p.out_channels());
    shared.normalise.fill(p.normalise, p.channels);
    fill_vector<C>(shared.sums.mean, p.sums.mean, p.channels, 0);
  });
}

int64_t units(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return Shared<C>::pieces(p) * pyramid_maps<C>(p);
  });
}

// One block of at most N channels of one strip of one image.
template <class T, int N>
struct Block {
  using C = Compute<T>;
  const Problem& p;
  const Shared<C>& shared;
  int64_t piece, image, first, rows, map, first_channel, channels;
  bool moving;
  GradientStrip<C>& strip;
  const PyramidStrip<C>& input_strip;
  C *gradients, *input;  // K tiles, and one

  void fill_gradients() const {
    const Tile& tile = strip.tile;
    const int64_t pitch = p.out_channels(), at = image * p.out_height * p.out_width * pitch + first_channel;
    for (int64_t k = 0; k < p.branches; ++k) {
      const T* grad = static_cast<const T*>(p.grad) + at + k * p.channels;
      const T* out = static_cast<const T*>(p.out) + at + k * p.channels;
      const auto norm = shared.norm.template at<N>(k * p.channels + first_channel);
      fill_positions<N>(
          tile, gradients + k * tile.size(), first, p.out_height, {0, p.out_width}, moving, [&](int64_t pixel) {
            return norm(load_first<N>(grad + pixel * pitch, channels), load_first<N>(out + pixel * pitch, channels));
          });
    }
    if (p.hff) sum_suffixes(gradients, p.branches, tile.size());
  }

  const T* x() const { return static_cast<const T*>(p.x) + image * p.height * p.width * p.channels + first_channel; }

  void add_to_weights() const {
    const auto normalise = shared.normalise.template at<N>(first_channel);
    const T* from = x();
    fill_positions<N>(input_strip.tile, input, first * p.stride, p.height, {0, p.width}, moving,
                      [&](int64_t pixel) { return normalise(load_first<N>(from + pixel * p.channels, channels)); });
    C* sums = shared.weight_sums + piece * Shared<C>::weight_size(p) + map * 9 * p.branches * kLanes<C>;
    fill_zero(sums, 9 * p.branches * kLanes<C>);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t k = 0; k < p.branches; ++k) {
        add_row(N, sums, gradients + k * strip.tile.size() + strip.tile.offset(y, 0),
                input + y * p.stride * input_strip.tile.row_pitch(), input_strip.taps, k, p.out_width, N);
      }
    }
  }

  void pass_to_input() const {
    const int64_t s = p.stride;
    const BranchWeights<C> weights(p, shared.weights);
    const auto normalise = shared.normalise.template at<N>(first_channel);
    for (int64_t a = 0; a < s; ++a) {
      const int64_t class_rows = least(rows, class_size(p, p.height, a) - first);
      for (int64_t b = 0; b < s; ++b) {
        const int64_t columns = class_size(p, p.width, b);
        if (class_rows <= 0 || columns <= 0) continue;
        C* behind = static_cast<C*>(scratch(Slot::map, class_rows * columns * N * static_cast<int64_t>(sizeof(C))));
        Sweep<C> sweep = strip.sweep(a, b, class_rows, gradients, weights.of_block(map));
        sweep.valid = N;
        sweep.out = behind;
        sweep.out_row = columns * N;
        sweep.out_column = N;
        ESPK_ISA::sweep(sweep);
        for (int64_t y = 0; y < class_rows; ++y, behind += columns * N) {
          const int64_t at = (((first + y) * s + a) * p.width + b) * p.channels;
          const T* map_row = x() + at;
          T* grad_row = static_cast<T*>(p.grad_x) + (map_row - static_cast<const T*>(p.x));
          auto sums = shared.sums.template at<N>(first_channel);
          for (int64_t i = 0; i < columns; ++i) {
            const auto v = load_first<N>(map_row + i * s * p.channels, channels);
            const auto g = sums.add(load<N>(behind + i * N), normalise.affine(v), v, normalise.slope);
            store_first<N>(grad_row + i * s * p.channels, g, channels);
          }
          shared.sums.add(piece, first_channel, sums, channels);
        }
      }
    }
  }
};

template <class T>
void run_type(const Problem& p, void* memory, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const Shared<C> shared(p, memory);
  const Strips strips = strips_of<C>(p);
  const int64_t map_count = pyramid_maps<C>(p);
  // The last block of channels may be narrower.
  const int64_t of_whole = least(kLanes<C>, p.channels), of_last = p.channels - (map_count - 1) * kLanes<C>;
  GradientStrip<C> whole(p, strips.rows, of_whole), last(p, strips.rows, of_last);
  const PyramidStrip<C> whole_input(p, strips.rows, of_whole), last_input(p, strips.rows, of_last);
  C* tiles = nullptr;
  int tile_lanes = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t piece = unit / map_count, map = unit % map_count;
    const int64_t first = piece % strips.count * strips.rows, rows = least(strips.rows, p.out_height - first);
    GradientStrip<C>& strip = map + 1 < map_count ? whole : last;
    const PyramidStrip<C>& input_strip = map + 1 < map_count ? whole_input : last_input;
    const int64_t first_channel = map * kLanes<C>, channels = strip.channels;
    shared.sums.begin(piece, first_channel, channels);
    if (strip.lanes != tile_lanes) {
      const int64_t size = p.branches * strip.tile.size() + input_strip.tile.size();
      tiles = static_cast<C*>(scratch(Slot::tile, size * static_cast<int64_t>(sizeof(C))));
      fill_zero(tiles, size);
      tile_lanes = strip.lanes;
    }
    with_lanes<C>(strip.lanes, [&](auto lanes) {
      const Block<T, decltype(lanes)::value> block{p,        shared,
                                                   piece,    piece / strips.count,
                                                   first,    rows,
                                                   map,      first_channel,
                                                   channels, strips.count > 1,
                                                   strip,    input_strip,
                                                   tiles,    tiles + p.branches * strip.tile.size()};
      if (rows > 0) block.fill_gradients();
      if (p.grad_weight) block.add_to_weights();
      if (rows > 0 && p.grad_x) block.pass_to_input();
    });
  }
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, memory, begin, end); });
}

void after(const Problem& p, void* memory) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const Shared<C> shared(p, memory);
    const int64_t pieces = Shared<C>::pieces(p), size = Shared<C>::weight_size(p);
    if (p.grad_x) shared.sums.merge(p.sums, pieces);
    if (!p.grad_weight) return;
    C* sums = static_cast<C*>(scratch(Slot::rows, size * static_cast<int64_t>(sizeof(C))));
    sum_in_order(sums, shared.weight_sums, pieces, size);
    for (int64_t channel = 0; channel < p.channels; ++channel) {
      const int64_t map = channel / kLanes<C>, lanes = vector_lanes<C>(p.channels - map * kLanes<C>);
      const C* from = sums + map * 9 * p.branches * kLanes<C> + channel % kLanes<C>;
      for (int64_t k = 0; k < p.branches; ++k) {
        T* to = static_cast<T*>(p.grad_weight) + (k * p.channels + channel) * 9;
        for (int64_t t = 0; t < 9; ++t) store_one(to + t, from[(9 * k + t) * lanes]);
      }
    }
  });
}

}  // namespace

extern const Kernel<Problem> normalised_pyramid_backward = {carved_bytes<Shared>, before, units, run, after};

}  // namespace espk::ESPK_ISA
