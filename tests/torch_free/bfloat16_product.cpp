// The product of bfloat16 pairs alone, of one instruction set: exact on whole numbers, and no byte read or written beyond
// what it was given. Sanitizers do not see what masked and tile instructions touch, so pages that nobody may touch stand
// in front of and behind every array.
#include "cpu/bfloat16_product.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/bfloat16_pairs.h"

namespace espk::ESPK_ISA { extern const Bfloat16Arithmetic bfloat16_arithmetic; }

namespace {

using espk::Bfloat16Product;

int failures = 0, checks = 0;

// `count` elements whose last, or first, one lies at a page that nobody may touch.
template <class T>
class Guarded {
 public:
  Guarded(int64_t count, bool at_the_end) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), page = 4096, inside = (bytes / page + 1) * page;
    size_ = inside + 2 * page;
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory_ == MAP_FAILED || mprotect(memory_ + page, inside, PROT_READ | PROT_WRITE)) std::abort();
    std::memset(memory_ + page, 0xff, inside);
    data = reinterpret_cast<T*>(memory_ + page + (at_the_end ? inside - bytes : 0));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, size_); }

  T* data;

 private:
  char* memory_;
  size_t size_;
};

uint16_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bits(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

struct Shape {
  int64_t rows, groups, depth, columns, spare;  // spare numbers behind each row of a and out
  int64_t parts = 1;  // of the depth, three rows of `a` apart
};

std::mt19937 generator;
int whole_number(int most) { return static_cast<int>(generator() % static_cast<unsigned>(2 * most + 1)) - most; }

void check(const Shape& s, bool epilogue, bool at_the_end) {
  const int64_t channels = s.groups * s.columns, a_row = s.groups * s.depth + s.spare, out_row = channels + s.spare;
  const int64_t depth = s.parts * s.depth, a_part = 3 * a_row, a_rows = s.rows + 3 * (s.parts - 1);
  const int64_t b_group = espk::ESPK_ISA::packed_pairs_size(depth, s.columns);
  Guarded<uint16_t> a((a_rows - 1) * a_row + s.groups * s.depth, at_the_end), b(s.groups * b_group, at_the_end);
  Guarded<uint16_t> out((s.rows - 1) * out_row + channels, at_the_end);
  Guarded<uint16_t> residual((s.rows - 1) * out_row + channels, at_the_end);
  Guarded<float> added(s.rows * channels, at_the_end), scale(channels, at_the_end), shift(channels, at_the_end),
      slope(channels, at_the_end);
  std::vector<float> weight(static_cast<size_t>(s.groups * depth * s.columns));
  for (float& w : weight) w = static_cast<float>(whole_number(4));
  for (int64_t i = 0; i < a_rows; ++i) {
    for (int64_t k = 0; k < s.groups * s.depth; ++k) a.data[i * a_row + k] = to_bits(float(whole_number(4)));
  }
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < channels; ++j) residual.data[i * out_row + j] = to_bits(float(whole_number(100)));
  }
  for (int64_t i = 0; i < s.rows * channels; ++i) added.data[i] = static_cast<float>(whole_number(1000));
  for (int64_t j = 0; j < channels; ++j) {
    scale.data[j] = static_cast<float>(whole_number(3));
    shift.data[j] = static_cast<float>(whole_number(50));
    slope.data[j] = static_cast<float>(whole_number(2));
  }
  auto weight_of = [&](int64_t g, int64_t k, int64_t j) {
    return weight[static_cast<size_t>((g * depth + k) * s.columns + j)];
  };
  for (int64_t g = 0; g < s.groups; ++g) {
    espk::ESPK_ISA::pack_pairs(b.data + g * b_group, depth, s.columns,
                               [&](int64_t k, int64_t j) { return to_bits(weight_of(g, k, j)); });
  }

  Bfloat16Product p{};
  p.rows = s.rows;
  p.groups = s.groups;
  p.depth = s.depth;
  p.parts = s.parts;
  p.a_part = a_part;
  p.columns = s.columns;
  p.a = a.data;
  p.a_row = a_row;
  p.b = b.data;
  p.b_group = b_group;
  p.out = out.data;
  p.out_row = out_row;
  if (epilogue) {
    p.scale = scale.data;
    p.shift = shift.data;
    p.slope = slope.data;
    p.residual = residual.data;
    p.added = added.data;
    p.added_row = channels;
  }
  espk::ESPK_ISA::bfloat16_arithmetic.multiply(p);

  ++checks;
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < channels; ++j) {
      const int64_t g = j / s.columns;
      float right = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t at = k / s.depth * a_part + i * a_row + g * s.depth + k % s.depth;
        right += from_bits(a.data[at]) * weight_of(g, k, j % s.columns);
      }
      if (epilogue) {
        right = right * scale.data[j] + shift.data[j] + from_bits(residual.data[i * out_row + j]) +
                added.data[i * channels + j];
        if (!(right > 0)) right *= slope.data[j];
      }
      if (from_bits(out.data[i * out_row + j]) == from_bits(to_bits(right))) continue;
      ++failures;
      std::printf("rows %ld groups %ld depth %ld columns %ld: (%ld, %ld) is %g, not %g\n", long(s.rows), long(s.groups),
                  long(s.depth), long(s.columns), long(i), long(j), from_bits(out.data[i * out_row + j]), right);
      return;
    }
    for (int64_t j = channels; i + 1 < s.rows && j < out_row; ++j) {
      if (out.data[i * out_row + j] == 0xffff) continue;
      ++failures;
      std::printf("columns %ld of %ld groups: wrote behind row %ld\n", long(s.columns), long(s.groups), long(i));
      return;
    }
  }
}

void check_round(int64_t count, bool at_the_end) {
  Guarded<float> from(count, at_the_end);
  Guarded<uint16_t> to(count, at_the_end);
  // Halves of the last place, so that ties are met, and what must stay what it is.
  for (int64_t i = 0; i < count; ++i) from.data[i] = std::ldexp(1.0f + float(i % 1024) / 512, int(i % 200) - 100);
  const float special[] = {INFINITY, -INFINITY, NAN, -0.0f, 3.38e38f, 3.4e38f};
  for (int64_t i = 0; i < count && i < 6; ++i) from.data[i] = special[i];
  espk::ESPK_ISA::bfloat16_arithmetic.round(to.data, from.data, count);
  ++checks;
  for (int64_t i = 0; i < count; ++i) {
    const float got = from_bits(to.data[i]), right = from_bits(to_bits(from.data[i]));
    if (std::isnan(from.data[i]) ? std::isnan(got) : got == right && std::signbit(got) == std::signbit(right)) continue;
    ++failures;
    std::printf("round(%g) is %g, not %g\n", from.data[i], got, right);
  }
}

}  // namespace

int main() {
#if defined(__AMX_BF16__)
  constexpr long kAskForState = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kAskForState, kTileData)) std::abort();
#endif
  for (const bool at_the_end : {true, false}) {
    for (const bool epilogue : {false, true}) {
      for (const int64_t rows : {1, 2, 5, 12, 15, 16, 17, 31, 32, 33, 48, 49, 65}) {
        for (const int64_t depth : {2, 4, 6, 20, 32, 34, 40, 62, 64, 96}) {
          for (const int64_t columns : {1, 2, 3, 8, 15, 16, 17, 20, 32, 33, 50}) {
            for (const int64_t groups : {1, 3, 4, 7})
              check({rows, groups, depth, columns, rows % 3, 1 + columns % 3}, epilogue, at_the_end);
          }
        }
      }
    }
    for (const int64_t count : {1, 2, 15, 16, 17, 31, 32, 33, 47, 4096, 4103}) check_round(count, at_the_end);
  }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
