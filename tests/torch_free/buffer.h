// Memory as a kernel gets it: exactly the size of the tensor, in its type and layout, and noticed when overrun.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "shapes.h"

using espk::Layout;
using espk::Type;

// `value` rounded to the nearest number of `type`, ties to even.
inline double rounded(Type type, double value) {
  if (type == Type::float64) return value;
  if (type == Type::float32) return static_cast<float>(value);
  const int digits = type == Type::bfloat16 ? 8 : 11;
  const int least_exponent = type == Type::bfloat16 ? -125 : -13;
  const double above_largest = type == Type::bfloat16 ? std::ldexp(1.0, 128) : 65536.0;
  int exponent;
  std::frexp(value, &exponent);
  const double step = std::ldexp(1.0, (exponent > least_exponent ? exponent : least_exponent) - digits);
  const double nearest = std::nearbyint(value / step) * step;
  return std::fabs(nearest) < above_largest ? nearest : std::copysign(INFINITY, value);
}

inline double read(Type type, const unsigned char* p) {
  if (type == Type::float64) {
    double d;
    std::memcpy(&d, p, 8);
    return d;
  }
  float f;
  if (type == Type::float32) {
    std::memcpy(&f, p, 4);
    return f;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (type == Type::bfloat16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}

// `value` is a number of `type`.
inline void write(Type type, unsigned char* p, double value) {
  const float f = static_cast<float>(value);
  if (type == Type::float64) {
    std::memcpy(p, &value, 8);
  } else if (type == Type::float32) {
    std::memcpy(p, &f, 4);
  } else if (type == Type::bfloat16) {
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    const uint16_t bits = static_cast<uint16_t>(wide >> 16);
    std::memcpy(p, &bits, 2);
  } else {
    int exponent = 0;
    const double fraction = std::frexp(std::fabs(value), &exponent);  // in [0.5, 1)
    uint16_t bits = 0;
    if (value != 0 && exponent < -13) bits = static_cast<uint16_t>(std::ldexp(std::fabs(value), 24));
    if (value != 0 && exponent >= -13) bits = static_cast<uint16_t>((exponent + 14) * 1024 + (fraction * 2 - 1) * 1024);
    if (value < 0) bits |= 0x8000;
    std::memcpy(p, &bits, 2);
  }
}

// The logical tensor: any number of dimensions, row-major, in double.
struct Tensor {
  std::vector<int64_t> sizes;
  std::vector<double> values;

  Tensor() = default;
  explicit Tensor(std::vector<int64_t> s) : sizes(std::move(s)) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    values.assign(static_cast<size_t>(count), 0.0);
  }
  int64_t count() const { return static_cast<int64_t>(values.size()); }
  double& at(int64_t a, int64_t b, int64_t c, int64_t d) {
    return values[static_cast<size_t>(((a * sizes[1] + b) * sizes[2] + c) * sizes[3] + d)];
  }
  double at(int64_t a, int64_t b, int64_t c, int64_t d) const { return const_cast<Tensor*>(this)->at(a, b, c, d); }
  double& at(int64_t a, int64_t b) { return values[static_cast<size_t>(a * sizes[1] + b)]; }
  double at(int64_t a, int64_t b) const { return const_cast<Tensor*>(this)->at(a, b); }
};

// A tensor in memory. The last byte of the allocation is the tensor's last; the first element stands one element in, so
// that no alignment beyond the element's own can be relied on, or as many bytes as `aligned` says, for kernels that use
// alignment where it is. Guards beside it show writes where no sanitizer does.
class Buffer {
 public:
  // Bytes that every buffer made from now on is aligned to, 64 at most; 0 for none but the element's own.
  static inline size_t aligned = 0;

  Buffer(Type type, Layout layout, const Tensor& tensor) : Buffer(type, layout, tensor.sizes) {
    for (int64_t i = 0; i < count_; ++i) {
      write(type_, element(i), rounded(type_, tensor.values[static_cast<size_t>(i)]));
    }
  }
  // Not yet written: every element is NaN.
  Buffer(Type type, Layout layout, std::vector<int64_t> sizes)
      : type_(type), layout_(layout), sizes_(std::move(sizes)) {
    count_ = 1;
    for (int64_t size : sizes_) count_ *= size;
    front_ = aligned ? aligned : static_cast<size_t>(espk::bytes_of(type));
    bytes_ = front_ + static_cast<size_t>(count_ * espk::bytes_of(type));
    void* allocation = nullptr;
    if (posix_memalign(&allocation, 64, bytes_ + kGuard)) std::abort();
    allocation_ = static_cast<unsigned char*>(allocation);
    std::memset(allocation_, 0xff, bytes_ + kGuard);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(allocation_); }

  void* data() const { return allocation_ + front_; }
  double get(int64_t i) const { return read(type_, const_cast<Buffer*>(this)->element(i)); }
  std::vector<unsigned char> bits() const { return {allocation_ + front_, allocation_ + bytes_}; }
  bool guards_intact() const {
    for (size_t i = 0; i < front_; ++i) {
      if (allocation_[i] != 0xff) return false;
    }
    for (size_t i = bytes_; i < bytes_ + kGuard; ++i) {
      if (allocation_[i] != 0xff) return false;
    }
    return true;
  }

 private:
#if defined(SANITIZES_MEMORY)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 256;
#endif

  // Element i in row-major order of the sizes; channels_last keeps maps as [B, H, W, C].
  unsigned char* element(int64_t i) {
    if (layout_ == Layout::channels_last && sizes_.size() == 4) {
      const int64_t channels = sizes_[1], pixels = sizes_[2] * sizes_[3];
      const int64_t b = i / (channels * pixels), c = i / pixels % channels, p = i % pixels;
      i = (b * pixels + p) * channels + c;
    }
    return static_cast<unsigned char*>(data()) + i * espk::bytes_of(type_);
  }

  Type type_;
  Layout layout_;
  std::vector<int64_t> sizes_;
  int64_t count_;
  size_t front_, bytes_;
  unsigned char* allocation_;
};
