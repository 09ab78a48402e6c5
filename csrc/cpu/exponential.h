// Sigmoid and hyperbolic tangent of vectors, both from e^x - 1, which keeps its digits where x is small.
#pragma once

#include <array>

#include "vector.h"

namespace espk::ESPK_ISA {

// x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 comes in two parts, the first so short that n times it is exact. The series of
// e^r - 1 ends where the next term is below half a unit of the last place. n stands in the low bits of n + magic.
template <class C>
struct Exponential;

template <>
struct Exponential<float> {
  using Bits = uint32_t;
  static constexpr int terms = 8, mantissa = 23;
  static constexpr float largest = 88.0f, magic = 0x1.8p23f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Exponential<double> {
  using Bits = uint64_t;
  static constexpr int terms = 14, mantissa = 52;
  static constexpr double largest = 708.0, magic = 0x1.8p52, ln2_high = 6.93147180369123816490e-01,
                          ln2_low = 1.90821492927058770002e-10;
};

template <class C, int Terms>
constexpr std::array<C, Terms + 1> inverse_factorials() {
  std::array<C, Terms + 1> inverse{};
  double factorial = 1;
  for (int k = 0; k <= Terms; factorial *= ++k) inverse[k] = static_cast<C>(1 / factorial);
  return inverse;
}

// e^x - 1. Beyond +-88 (708 in double) as there, where both functions below have long reached their limits; NaN of NaN.
template <class C, int N>
inline Vector<C, N> exponential_minus_one(Vector<C, N> x) {
  using E = Exponential<C>;
  using V = Vector<C, N>;
  typedef Vector<typename E::Bits, N> Bits;
  constexpr auto inverse_factorial = inverse_factorials<C, E::terms>();
  const V largest = broadcast<C, N>(E::largest);
  x = x > largest ? largest : x;
  x = x < -largest ? -largest : x;
  const V n_and_magic = x * C(1.44269504088896340736) + E::magic;
  const V n = n_and_magic - E::magic;
  const V r = (x - n * E::ln2_high) - n * E::ln2_low;
  V series = broadcast<C, N>(inverse_factorial[E::terms]);
#pragma GCC unroll 16
  for (int k = E::terms - 1; k >= 1; --k) series = series * r + inverse_factorial[k];
  const V power = (V)(((Bits)n_and_magic << E::mantissa) + (Bits)broadcast<C, N>(C(1)));
  return power * (series * r) + (power - C(1));
}

template <class C, int N>
inline Vector<C, N> sigmoid(Vector<C, N> x) {
  return C(1) / (exponential_minus_one<C, N>(-x) + C(2));
}

template <class C, int N>
inline Vector<C, N> hyperbolic_tangent(Vector<C, N> x) {
  const Vector<C, N> e = exponential_minus_one<C, N>(x + x);
  return e / (e + C(2));
}

}  // namespace espk::ESPK_ISA
