// A batch norm, residual and PReLU that no product's epilogue takes in.
// Bytes: 1 read (+ 1 of the residual) + 1 written for each number of the map.
#include "affine_prelu.h"
#include "kernels.h"

namespace espk::ESPK_ISA {
namespace {

constexpr int64_t kPixels = 64;  // of a unit

int64_t shared_bytes(const Affine&) { return 0; }

void before(const Affine&, void*) {}

int64_t units(const Affine& p) { return ceil_div(p.batch * p.pixels, kPixels); }

template <class T>
void run_type(const Affine& p, int64_t begin, int64_t end) {
  using C = Compute<T>;
  constexpr int N = kLanes<C>;
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.epilogue.residual);
  const AffinePrelu<C> finish(p.epilogue);
  const int64_t last = least(end * kPixels, p.batch * p.pixels);
  for (int64_t pixel = begin * kPixels; pixel < last; ++pixel) {
    for (int64_t c = 0; c < p.channels; c += N) {
      const int64_t valid = least(N, p.channels - c), at = pixel * p.channels + c;
      const auto v = load_first<N>(x + at, valid);
      const T* added = residual ? residual + at : nullptr;
      store_first<N>(static_cast<T*>(p.out) + at, finish.template operator()<N>(v, c, valid, added), valid);
    }
  }
}

void run(const Affine& p, void*, int64_t begin, int64_t end) {
  with_type(p.type, [&](auto* type) { run_type<std::remove_pointer_t<decltype(type)>>(p, begin, end); });
}

}  // namespace

extern const Kernel<Affine> affine = {shared_bytes, before, units, run, nullptr};

}  // namespace espk::ESPK_ISA
