// The strips of an EESP unit after its reduction, for units whose reduced map is in memory and for those that reduce its
// rows as they go.
#pragma once

#include "kernels.h"

namespace espk::ESPK_ISA {

// Where reduced rows come from that are no map in memory: rows(context, image, begin, end) are rows [begin, end) of an
// image in the problem's type, dense pixels one row behind the other, until the next call of this thread.
struct ReducedRows {
  const void* (*rows)(const void* context, int64_t image, int64_t begin, int64_t end);
  const void* context;
};

// The kernel pyramid_pointwise's run, with the rows of x from `reduced` where that is not null; channels_last then.
void run_strips(const PyramidPointwise& p, void* shared, int64_t begin, int64_t end, const ReducedRows* reduced);

extern const Kernel<PyramidPointwise> pyramid_pointwise;

}  // namespace espk::ESPK_ISA
