// Vectors of N numbers on the compiler's own vector type, and the loads and stores between them and stored types.
//
// The same source compiles for each instruction set: the compiler turns `a * b + c` into a fused multiply-add where the
// machine has one and splits vectors wider than its registers. Everything lives in the namespace of the instruction set,
// so no function compiled for a newer one can be linked into the path of an older machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "../shapes.h"
#include "intrinsics.h"

namespace espk::ESPK_ISA {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

template <class C, int N>
struct VectorOf {
  typedef C type __attribute__((vector_size(N * sizeof(C))));
};

template <class C, int N>
using Vector = typename VectorOf<C, N>::type;

// Width of a register, and so the widest vector used, in bytes.
#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

// What a cache holds and fetches at once.
constexpr int64_t kLineBytes = 64;

template <class C>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(C));

// The type that sums are kept in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class C, int N>
inline Vector<C, N> broadcast(C value) {
  return value - Vector<C, N>{};  // exact for every number; a loop over lanes compiles to one insertion a lane
}

// Keeps a vector in a register for all its uses: a compiler that can multiply by memory reads it again for each of them,
// which took the depthwise taps a tenth more time on AVX2 and a quarter on AVX-512 (Zen 4, GCC 12).
template <class V>
[[gnu::always_inline]] inline void hold([[maybe_unused]] V& v) {
#if defined(__AVX2__)
  if constexpr (sizeof(V) >= 16 && sizeof(V) <= kRegisterBytes) asm("" : "+v"(v));
#endif
}

template <int N>
inline Vector<float, N> widen(const bfloat16* p) {
  Vector<uint16_t, N> h;
  __builtin_memcpy(&h, p, sizeof h);
  return (Vector<float, N>)(__builtin_convertvector(h, Vector<uint32_t, N>) << 16);
}

template <int N>
inline void narrow(bfloat16* p, Vector<float, N> v) {
  typedef Vector<uint32_t, N> Bits;
  const Bits bits = (Bits)v;
  const Bits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;
  const auto h =
      __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest_even, Vector<uint16_t, N>);
  __builtin_memcpy(p, &h, sizeof h);
}

template <int N>
inline Vector<float, N> widen(const float16* p) {
#if defined(__F16C__)
  if constexpr (N == 4) return (Vector<float, N>)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (N == 8) return (Vector<float, N>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return (Vector<float, N>)_mm512_maskz_cvtph_ps((__mmask16)-1, _mm256_loadu_si256((const __m256i*)p));
  }
#endif
  typedef Vector<uint32_t, N> Bits;
  Vector<uint16_t, N> h;
  __builtin_memcpy(&h, p, sizeof h);
  const Bits bits = __builtin_convertvector(h, Bits);
  const Bits magnitude = (bits & 0x7fffu) << 13;
  const Bits normal = magnitude + (112u << 23);
  const Bits special = magnitude | (255u << 23);
  // A subnormal half m * 2^-24 as the difference of two normal floats, right also where denormals are flushed.
  const Bits offset = Bits{} + (113u << 23);
  const Bits subnormal = (Bits)((Vector<float, N>)(magnitude + offset) - (Vector<float, N>)offset);
  const Bits result = magnitude >= (0x7c00u << 13) ? special : (magnitude < (0x0400u << 13) ? subnormal : normal);
  return (Vector<float, N>)(result | ((bits & 0x8000u) << 16));
}

template <int N>
inline void narrow(float16* p, Vector<float, N> v) {
#if defined(__F16C__)
  if constexpr (N == 4) {
    _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  if constexpr (N == 8) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph((__mmask16)-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
#endif
  typedef Vector<uint32_t, N> Bits;
  const Bits magnitude = (Bits)v & 0x7fffffffu;
  const Bits rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last bit of a subnormal half at the last bit of the float, rounded to nearest even.
  const Bits half = Bits{} + 0x3f000000u;
  const Bits subnormal = (Bits)((Vector<float, N>)magnitude + (Vector<float, N>)half) - half;
  const Bits infinite_or_nan = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits result = magnitude >= 0x47800000u ? infinite_or_nan : (magnitude < 0x38800000u ? subnormal : rounded);
  const auto h = __builtin_convertvector(result | (((Bits)v >> 16) & 0x8000u), Vector<uint16_t, N>);
  __builtin_memcpy(p, &h, sizeof h);
}

// N stored numbers as a vector of the compute type.
template <int N, class T>
inline Vector<Compute<T>, N> load(const T* p) {
  if constexpr (sizeof(T) == 2) {
    return widen<N>(p);
  } else {
    Vector<T, N> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
}

template <int N, class T>
inline void store(T* p, Vector<Compute<T>, N> v) {
  if constexpr (sizeof(T) == 2) {
    narrow<N>(p, v);
  } else {
    __builtin_memcpy(p, &v, sizeof v);
  }
}

// Copies n < 2 * Top elements, Top a power of two, in power-of-two pieces and so without a loop or a call.
template <int Top, class T>
inline void copy_few(T* to, const T* from, int64_t n) {
  if constexpr (Top >= 1) {
    if (n & Top) {
      __builtin_memcpy(to, from, Top * sizeof(T));
      to += Top;
      from += Top;
    }
    copy_few<Top / 2>(to, from, n);
  }
}

#if defined(__AVX2__)
inline __m256i first_integers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
#endif

// The first n numbers, 0 <= n <= N, and zeros; touches no byte beyond them.
template <int N, class T>
inline Vector<Compute<T>, N> load_first(const T* p, int64_t n) {
  if (n >= N) return load<N>(p);
#if defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (N == 16) return (Vector<float, N>)_mm512_maskz_loadu_ps((__mmask16)mask, p);
    if constexpr (N == 8) return (Vector<float, N>)_mm256_maskz_loadu_ps((__mmask8)mask, p);
    if constexpr (N == 4) return (Vector<float, N>)_mm_maskz_loadu_ps((__mmask8)mask, p);
  }
  if constexpr (sizeof(T) == 2 && N >= 8) {
    alignas(32) T few[N];
    const unsigned mask = (1u << n) - 1u;
    if constexpr (N == 16) _mm256_store_si256((__m256i*)few, _mm256_maskz_loadu_epi16((__mmask16)mask, p));
    if constexpr (N == 8) _mm_store_si128((__m128i*)few, _mm_maskz_loadu_epi16((__mmask8)mask, p));
    return load<N>(few);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4 && N == 8) {
    return (Vector<float, N>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), first_integers()));
  }
  if constexpr (sizeof(T) == 4 && N == 4) {
    return (Vector<float, N>)_mm_maskload_ps(p, _mm_cmpgt_epi32(_mm_set1_epi32((int)n), _mm_setr_epi32(0, 1, 2, 3)));
  }
#endif
  T few[N];
  __builtin_memset(few, 0, sizeof few);
  copy_few<N / 2>(few, p, n);
  return load<N>(few);
}

template <int N, class T>
inline void store_first(T* p, Vector<Compute<T>, N> v, int64_t n) {
  if (n >= N) return store<N>(p, v);
#if defined(__AVX512VL__)
  if constexpr (sizeof(T) == 4) {
    const unsigned mask = (1u << n) - 1u;
    if constexpr (N == 16) return _mm512_mask_storeu_ps(p, (__mmask16)mask, (__m512)v);
    if constexpr (N == 8) return _mm256_mask_storeu_ps(p, (__mmask8)mask, (__m256)v);
    if constexpr (N == 4) return _mm_mask_storeu_ps(p, (__mmask8)mask, (__m128)v);
  }
  if constexpr (sizeof(T) == 2 && N >= 8) {
    alignas(32) T few[N];
    store<N>(few, v);
    const unsigned mask = (1u << n) - 1u;
    if constexpr (N == 16) return _mm256_mask_storeu_epi16(p, (__mmask16)mask, _mm256_load_si256((const __m256i*)few));
    if constexpr (N == 8) return _mm_mask_storeu_epi16(p, (__mmask8)mask, _mm_load_si128((const __m128i*)few));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4 && N >= 4) {
    // Half by half: AMD's machines without AVX-512 are slow at masked stores.
    __m128 left;
    __builtin_memcpy(&left, &v, sizeof left);
    if constexpr (N == 8) {
      if (n & 4) {
        _mm_storeu_ps(p, left);
        left = _mm256_extractf128_ps((__m256)v, 1);
        p += 4;
      }
    }
    if (n & 2) {
      _mm_storel_pi((__m64*)p, left);
      left = _mm_movehl_ps(left, left);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, left);
    return;
  }
#endif
  T few[N];
  store<N>(few, v);
  copy_few<N / 2>(p, few, n);
}

// Calls f(first, valid) for vectors that cover `count` numbers. Where there are N, all are whole: the last one overlaps the
// one before it, and what lies in both is computed twice, from and to memory that are not the same.
template <int N, class F>
inline void for_whole_vectors(int64_t count, F&& f) {
  int64_t first = 0;
  for (; first + N <= count; first += N) f(first, int64_t{N});
  if (first == count) return;
  if (count > N) {
    f(count - N, int64_t{N});
  } else {
    f(first, count);
  }
}

template <class T>
inline Compute<T> load_one(const T* p) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return __builtin_bit_cast(float, uint32_t{p->bits} << 16);
  } else if constexpr (sizeof(T) == 2) {
#if defined(__F16C__)
    return _cvtsh_ss(p->bits);
#else
    return load_first<4>(p, 1)[0];
#endif
  } else {
    return *p;
  }
}

template <class T>
inline void store_one(T* p, Compute<T> value) {
  if constexpr (sizeof(T) == 2) {
    store_first<4>(p, broadcast<float, 4>(value), 1);
  } else {
    *p = value;
  }
}

// The even, or odd, lanes of two vectors.
template <int Odd, class V, std::size_t... I>
inline V every_other(V a, V b, std::index_sequence<I...>) {
#if defined(__AVX2__)
  // In two steps, where compilers find three.
  if constexpr (std::is_same_v<V, Vector<float, 8>>) {
    const __m256 halves = _mm256_shuffle_ps((__m256)a, (__m256)b, Odd ? 0xdd : 0x88);
    return (V)_mm256_permute4x64_pd(_mm256_castps_pd(halves), 0xd8);
  }
#endif
  return __builtin_shufflevector(a, b, (2 * I + Odd)...);
}

// Lanes of two vectors in turn: of their lower halves, or of their upper ones.
template <int Upper, class V, std::size_t... I>
inline V in_turn(V a, V b, std::index_sequence<I...>) {
  constexpr std::size_t N = sizeof...(I);
#if defined(__AVX2__)
  // The first two steps are the same for both halves.
  if constexpr (std::is_same_v<V, Vector<float, 8>>) {
    const __m256 low = _mm256_unpacklo_ps((__m256)a, (__m256)b), high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    return (V)_mm256_permute2f128_ps(low, high, Upper ? 0x31 : 0x20);
  }
#endif
  return __builtin_shufflevector(a, b, (I / 2 + Upper * N / 2 + I % 2 * N)...);
}

// Every third lane of three vectors that lie one behind the other, from lane First on.
template <int First, class V, std::size_t... I>
inline V every_third(const V (&v)[3], std::index_sequence<I...>) {
  constexpr std::size_t N = sizeof...(I);
  const V two = __builtin_shufflevector(v[0], v[1], (3 * I + First < 2 * N ? 3 * I + First : 0)...);
  return __builtin_shufflevector(two, v[2], (3 * I + First < 2 * N ? I : 3 * I + First - N)...);
}

// Vector `Part` of the lanes of three vectors in turn.
template <int Part, class V, std::size_t... I>
inline V three_in_turn(const V (&v)[3], std::index_sequence<I...>) {
  constexpr std::size_t N = sizeof...(I), kFirst = Part * N;
  // Those of the first two where they belong, then those of the third.
  const V two = __builtin_shufflevector(v[0], v[1], ((kFirst + I) / 3 + (kFirst + I) % 3 % 2 * N)...);
  return __builtin_shufflevector(two, v[2], ((kFirst + I) % 3 == 2 ? N + (kFirst + I) / 3 : I)...);
}

// Numbers that name lanes, as wide as the lanes.
template <class C>
using Index = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// The sum of the lanes of each of N vectors of N lanes, as one vector: a tree of N - 1 additions.
template <int N, class C>
inline Vector<C, N> sum_lanes(const Vector<C, N> (&v)[N]) {
  constexpr std::make_index_sequence<N> lanes{};
  Vector<C, N> sums[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sums[i] = v[i];
#pragma GCC unroll 4
  for (int count = N / 2; count > 0; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      sums[i] =
          every_other<0>(sums[2 * i], sums[2 * i + 1], lanes) + every_other<1>(sums[2 * i], sums[2 * i + 1], lanes);
    }
  }
  return sums[0];
}

// Rows vectors of N lanes, Rows a power of two, as the matrix of N rows that they were the columns of: its rows lie one
// behind the other, so that of few vectors the lanes come in turn.
template <int N, class C, int Rows>
inline void transpose(Vector<C, N> (&v)[Rows]) {
#if defined(__AVX2__)
  // Within the halves of a register first: 24 shuffles, where the stages below take 48.
  if constexpr (std::is_same_v<Vector<C, N>, Vector<float, 8>> && Rows == N) {
    __m256d pairs[N], quads[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i += 2) {
      pairs[i] = (__m256d)_mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
      pairs[i + 1] = (__m256d)_mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) {
      const int from = i / 2 * 4 + i % 2;
      quads[2 * i] = _mm256_unpacklo_pd(pairs[from], pairs[from + 2]);
      quads[2 * i + 1] = _mm256_unpackhi_pd(pairs[from], pairs[from + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < N / 2; ++i) {
      v[i] = (Vector<C, N>)_mm256_permute2f128_pd(quads[i], quads[i + 4], 0x20);
      v[i + 4] = (Vector<C, N>)_mm256_permute2f128_pd(quads[i], quads[i + 4], 0x31);
    }
    return;
  }
#endif
  constexpr std::make_index_sequence<N> lanes{};
#pragma GCC unroll 4
  for (int stage = 1; stage < Rows; stage *= 2) {
    Vector<C, N> next[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows / 2; ++i) {
      next[2 * i] = in_turn<0>(v[i], v[i + Rows / 2], lanes);
      next[2 * i + 1] = in_turn<1>(v[i], v[i + Rows / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) v[i] = next[i];
  }
}

// Calls f(Lanes<N>) with the narrowest of the register widths that holds n numbers; n at most kLanes<C>. float64, which
// the other types are checked with, has the widest alone: each width is compiled.
template <int N>
struct Lanes {
  static constexpr int value = N;
};

template <class C, class F>
inline void with_lanes(int64_t n, F&& f) {
  constexpr int widest = kLanes<C>, narrowest = sizeof(C) < 8 ? 4 : widest;
  if constexpr (widest >= 4 * narrowest) {
    if (n <= widest / 4) return f(Lanes<widest / 4>{});
  }
  if constexpr (widest >= 2 * narrowest) {
    if (n <= widest / 2) return f(Lanes<widest / 2>{});
  }
  f(Lanes<widest>{});
}

// The width that with_lanes takes for n numbers, n of any size.
template <class C>
inline int vector_lanes(int64_t n) {
  int width = kLanes<C>;
  with_lanes<C>(n < kLanes<C> ? n : kLanes<C>, [&](auto lanes) { width = decltype(lanes)::value; });
  return width;
}

// What f gives for a null pointer of the stored type that `type` names.
template <class F>
inline auto with_type(Type type, F&& f) {
  switch (type) {
    case Type::float64: return f(static_cast<double*>(nullptr));
    case Type::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case Type::float16: return f(static_cast<float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace espk::ESPK_ISA
