// The way of narrow groups that this instruction set takes.
#include "narrow_groups.h"

#if defined(__AVX512F__)
#include "picked_groups.h"
#else
#include "turned_groups.h"
#endif

namespace espk::ESPK_ISA {

template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float*, bool);
template void pack_narrow_groups(const NarrowGroups<double>&, double*, const double*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const bfloat16*, bool);
template void pack_narrow_groups(const NarrowGroups<float>&, float*, const float16*, bool);
template void multiply_narrow_groups(const NarrowGroups<float>&, const MatrixProduct<float>&);
template void multiply_narrow_groups(const NarrowGroups<double>&, const MatrixProduct<double>&);

}  // namespace espk::ESPK_ISA
