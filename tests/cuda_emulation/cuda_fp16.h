// __half for the emulation: binary16, rounded to nearest even, through the compiler's own type.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  _Float16 number;
  std::memcpy(&number, &value.bits, 2);
  return static_cast<float>(number);
}

inline __half __float2half_rn(float value) {
  const _Float16 number = static_cast<_Float16>(value);
  __half half;
  std::memcpy(&half.bits, &number, 2);
  return half;
}
