// Gradient of the grouped convolution for its weights: for tap t of input j and an output of a group, the sum over all pixels
// of the output's gradient times the input shifted by the tap. A vector runs over groups, of which each input and each
// output is one tile in the cache. Two stages: every strip of an image leaves its own sums, and these are added in order.
// Bytes: M + N read a pixel; multiply-adds: those of the forward pass.
#include "grouped_tiles.h"
#include "kernels.h"
#include "ordered_sum.h"
#include "pyramid_gradient.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupedConvolutionBackwardWeight;

// Sums of one strip: [blocks of groups][outputs of a group][inputs of a group][taps][groups of a block].
template <class C>
int64_t partial_size(const Problem& p) {
  return round_up(p.groups, kLanes<C>) * p.out_of_group * p.in * 9;
}

// The map of gradients as a grouped convolution would read it.
GroupedConvolution outputs_of(const Problem& p) {
  GroupedConvolution outputs = p;
  outputs.x = p.grad;
  outputs.in = p.out_of_group;
  return outputs;
}

// One thread's strips.
template <class T>
struct GradientStrips {
  using C = Compute<T>;
  static constexpr int N = kLanes<C>;

  explicit GradientStrips(const Problem& problem)
      : p(problem),
        outputs(outputs_of(problem)),
        panel(group_panel(p)),
        strips(group_strips<C>(p)),
        tile(1, N, least(1, p.height - 1), least(1, p.width - 1), strips.rows, panel),
        grad_tile(1, N, 0, 0, strips.rows, panel),
        tiles(static_cast<C*>(scratch(Slot::tile, p.in * tile.size() * static_cast<int64_t>(sizeof(C))))),
        grad_tiles(
            static_cast<C*>(scratch(Slot::map, p.out_of_group * grad_tile.size() * static_cast<int64_t>(sizeof(C))))) {
    taps.begin_segment();
    for_taps(1, p.height, p.width, [&](int64_t tap, int64_t y, int64_t x) { taps.add(tile.offset(y, x), tap); });
    taps.end_segment(N);
  }

  void run(int64_t unit, C* sums) const {
    const int64_t image = unit / strips.count, first_row = unit % strips.count * strips.rows;
    fill_zero(sums, partial_size<C>(p));
    for (int64_t column = 0; column < p.width; column += panel) {
      for (int64_t group = 0; group < p.groups; group += N) {
        const int64_t groups = least(N, p.groups - group);
        GroupTiles<T>{p, tile, tiles, image, group, groups}.fill(first_row, {column, p.width});
        GroupTiles<T>{outputs, grad_tile, grad_tiles, image, group, groups}.fill(first_row, {column, p.width});
        add_tiles(sums + group * p.out_of_group * p.in * 9, least(strips.rows, p.height - first_row),
                  least(panel, p.width - column));
      }
    }
  }

 private:
  void add_tiles(C* sums, int64_t rows, int64_t columns) const {
    for (int64_t y = 0; y < rows; ++y) {
      C* to = sums;
      for (int64_t t = 0; t < p.out_of_group; ++t) {
        const C* gradient = grad_tiles + t * grad_tile.size() + y * grad_tile.row_pitch();
        for (int64_t j = 0; j < p.in; ++j, to += 9 * N) {
          add_row(N, to, gradient, tiles + j * tile.size() + y * tile.row_pitch(), taps, 0, columns, N);
        }
      }
    }
  }

  const Problem& p;
  const GroupedConvolution outputs;
  const int64_t panel;
  const Strips strips;
  const Tile tile, grad_tile;  // of each input, and of each output
  C *const tiles, *const grad_tiles;
  TapList taps;
};

int64_t units(const Problem& p) {
  return p.batch * with_type(p.type, [&](auto* type) {
           return group_strips<Compute<std::remove_pointer_t<decltype(type)>>>(p).count;
         });
}

// The sums of every unit, and behind them room for their sum.
int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return (units(p) + 1) * partial_size<C>(p) * static_cast<int64_t>(sizeof(C));
  });
}

void before(const Problem&, void*) {}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    const GradientStrips<T> strips(p);
    for (int64_t unit = begin; unit < end; ++unit) {
      strips.run(unit, static_cast<C*>(shared) + unit * partial_size<C>(p));
    }
  });
}

void after(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using C = Compute<T>;
    constexpr int N = kLanes<C>;
    const int64_t size = partial_size<C>(p), runs = units(p), filter = p.in * 9;
    C* sums = static_cast<C*>(shared) + runs * size;
    sum_in_order(sums, static_cast<const C*>(shared), runs, size);
    for (int64_t n = 0; n < p.out_channels(); ++n) {
      const int64_t group = n / p.out_of_group, t = n % p.out_of_group;
      const C* from = sums + ((group / N * p.out_of_group + t) * filter) * N + group % N;
      T* to = static_cast<T*>(p.grad_weight) + n * filter;
      for (int64_t i = 0; i < filter; ++i) store_one(to + i, from[i * N]);
    }
  });
}

}  // namespace

extern const Kernel<Problem> grouped_convolution_backward_weight = {shared_bytes, before, units, run, after};

}  // namespace espk::ESPK_ISA
