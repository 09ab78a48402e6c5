// Depthwise 3x3 convolution of a map of pixels in steps of one. Where a block of channels is no whole line of the cache, rows
// are taken as runs of numbers: blocks would fill and store each line in halves, or leave lanes idle. Other maps are a
// pyramid of one branch.
// Bytes: C read + C written a pixel; multiply-adds: 9*C a pixel.
#include "flat_rows.h"

namespace espk::ESPK_ISA {

extern const Kernel<SpatialPyramid> spatial_pyramid;

namespace {

using Problem = SpatialPyramid;

// Of more channels a panel would hold few pixels beside those that only its edges reach.
bool goes_by_rows(const Problem& p) {
  constexpr int64_t kMostChannels = 192;
  const bool lines = with_type(p.type, [&](auto* type) {
    using C = Compute<std::remove_pointer_t<decltype(type)>>;
    return kRegisterBytes == kLineBytes && p.channels % kLanes<C> == 0;
  });
  return p.stride == 1 && p.dilations[0] == 1 && p.out_pixel == p.channels && p.channels <= kMostChannels && !lines;
}

template <class C>
struct Shared {
  FlatWeights<C> weights;
  int64_t bytes;

  Shared(const Problem& p, void* given) {
    Carving memory(given);
    weights = FlatWeights<C>::of_channels(9, p.width * p.channels, p.channels, memory);
    bytes = memory.bytes();
  }
};

int64_t shared_bytes(const Problem& p) {
  return goes_by_rows(p) ? carved_bytes<Shared>(p) : spatial_pyramid.shared_bytes(p);
}

void before(const Problem& p, void* memory) {
  if (!goes_by_rows(p)) return spatial_pyramid.before(p, memory);
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Shared<Compute<T>> shared(p, memory);
    shared.weights.fill_filters(static_cast<const T*>(p.weight), 1, p.channels, p.epilogue);
  });
}

// How a map is cut: into blocks of as many rows as have their sums in registers, and of each into panels.
struct Cut {
  int64_t length, vectors, panel, panels, blocks;

  Cut(const Problem& p, int lanes)
      : length(p.width * p.channels),
        vectors(ceil_div(length, lanes)),
        panel(flat_panel(vectors, lanes, p.channels)),
        panels(ceil_div(vectors, panel)),
        blocks(ceil_div(p.height, kFlatRows)) {}
};

int64_t units(const Problem& p) {
  if (!goes_by_rows(p)) return spatial_pyramid.units(p);
  return with_type(p.type, [&](auto* type) {
    const Cut cut(p, kLanes<Compute<std::remove_pointer_t<decltype(type)>>>);
    return p.batch * cut.blocks * cut.panels;
  });
}

void run(const Problem& p, void* memory, int64_t begin, int64_t end) {
  if (!goes_by_rows(p)) return spatial_pyramid.run(p, memory, begin, end);
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Shared<Compute<T>> shared(p, memory);
    const Cut cut(p, kLanes<Compute<T>>);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t block = unit / cut.panels, first = unit % cut.panels * cut.panel;
      const int64_t image = block / cut.blocks * p.height * cut.length, row = block % cut.blocks * kFlatRows;
      const FlatRows<T> to{static_cast<T*>(p.out) + image + row * cut.length, 0, cut.length};
      filter_rows(
          static_cast<const T*>(p.x) + image, p.height, row, p.channels, shared.weights,
          FlatSums<T>{to, first, least(first + cut.panel, cut.vectors), least(kFlatRows, p.height - row), cut.length});
    }
  });
}

}  // namespace

extern const Kernel<Problem> depthwise = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
