#include "normalise.h"

namespace espk::ESPK_ISA {

template <class C>
void fill_vector(C* to, const double* from, int64_t channels, C otherwise) {
  for (int64_t i = 0; i < padded<C>(channels); ++i) {
    to[i] = i >= channels ? C(0) : from ? static_cast<C>(from[i]) : otherwise;
  }
}

template void fill_vector(float* to, const double* from, int64_t channels, float otherwise);
template void fill_vector(double* to, const double* from, int64_t channels, double otherwise);

}  // namespace espk::ESPK_ISA
