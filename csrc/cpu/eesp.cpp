// The whole EESP unit in one pass over a map of pixels: rows are reduced when the pyramid comes to need them, and stay in
// the cache until then. Rows that two strips need are reduced for both.
// Bytes: M read + N written a pixel; multiply-adds: M*d/groups + 9*K*d + K*d*N/groups a pixel.
#include "pyramid_pointwise.h"
#include "vector.h"

namespace espk::ESPK_ISA {

extern const Kernel<GroupPointwise> group_pointwise;

namespace {

// Behind the weights of the reduction lie those of the rest.
int64_t offset_of_rest(const Eesp& p) { return round_up(group_pointwise.shared_bytes(p.reduction()), 64); }

int64_t shared_bytes(const Eesp& p) { return offset_of_rest(p) + pyramid_pointwise.shared_bytes(p); }

void before(const Eesp& p, void* shared) {
  group_pointwise.before(p.reduction(), shared);
  pyramid_pointwise.before(p, static_cast<char*>(shared) + offset_of_rest(p));
}

int64_t units(const Eesp& p) { return pyramid_pointwise.units(p); }

struct Reduction {
  const Eesp& p;
  void* weights;

  const void* rows(int64_t image, int64_t begin, int64_t end) const {
    const int64_t row_bytes = p.width * bytes_of(p.type);
    GroupPointwise r = p.reduction();
    r.batch = 1;
    r.pixels = (end - begin) * p.width;
    r.part_of_far_map = true;
    r.x = static_cast<const char*>(p.x) + (image * p.height + begin) * row_bytes * p.in_channels;
    r.out = scratch(Slot::rows, (end - begin) * row_bytes * p.channels);
    group_pointwise.run(r, weights, 0, group_pointwise.units(r));
    return r.out;
  }
};

void run(const Eesp& p, void* shared, int64_t begin, int64_t end) {
  const Reduction reduction{p, shared};
  const ReducedRows reduced{[](const void* context, int64_t image, int64_t first, int64_t last) {
                              return static_cast<const Reduction*>(context)->rows(image, first, last);
                            },
                            &reduction};
  run_strips(p, static_cast<char*>(shared) + offset_of_rest(p), begin, end, &reduced);
}

}  // namespace

extern const Kernel<Eesp> eesp = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
