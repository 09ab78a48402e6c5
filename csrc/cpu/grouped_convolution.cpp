// 3x3 convolution in many groups of few channels, of a map (grouped_panels.h).
// Bytes: M read + N written a pixel.
#include "grouped_panels.h"
#include "grouped_tiles.h"

namespace espk::ESPK_ISA {
namespace {

using Problem = GroupedConvolution;

// Columns that blocks of 4, 7 and 14 divide.
int64_t panel_of(const Problem& p) { return least(p.width, 84); }

int64_t shared_bytes(const Problem& p) {
  return with_type(p.type, [&](auto* type) {
    using Panels = GroupedPanels<std::remove_pointer_t<decltype(type)>>;
    return Panels::packed_size(p) * static_cast<int64_t>(sizeof(typename Panels::C));
  });
}

void before(const Problem& p, void* shared) {
  with_type(p.type, [&](auto* type) {
    using Panels = GroupedPanels<std::remove_pointer_t<decltype(type)>>;
    Panels::pack(p, static_cast<typename Panels::C*>(shared));
  });
}

int64_t units(const Problem& p) {
  return with_type(
      p.type, [&](auto* type) { return GroupedPanels<std::remove_pointer_t<decltype(type)>>::units(p, panel_of(p)); });
}

void run(const Problem& p, void* shared, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Panels = GroupedPanels<T>;
    const Panels panels(p, panel_of(p));
    panels.run(static_cast<const typename Panels::C*>(shared), begin, end, [&](const auto& part, auto* tiles) {
      const GroupTiles<T> inputs{p, panels.tile, tiles, part.image, part.first_group, part.groups};
      inputs.fill(part.first_row, {part.first_column, p.width});
    });
  });
}

}  // namespace

extern const Kernel<Problem> grouped_convolution = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
