// Maps that leave the cache before they are read again, and stores past it.
#pragma once

#include "vector.h"

namespace espk::ESPK_ISA {

// A map larger than this has left the cache before it is read again. Tests try all that depends on it with small maps.
#if !defined(ESPK_FAR_BYTES)
#define ESPK_FAR_BYTES (16 * 1024 * 1024)
#endif
constexpr int64_t kFarBytes = ESPK_FAR_BYTES;

// Whether store_far() is more than store().
#if defined(__x86_64__)
constexpr bool kFarStores = true;
#else
constexpr bool kFarStores = false;
#endif

inline bool starts_a_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLineBytes == 0; }

// Whether vectors of pixels of such a map, `row` numbers each, may be stored past the cache: a line that is written whole
// is then not fetched first, which saves half the traffic of a write.
template <class T>
inline bool is_far(const T* map, int64_t rows, int64_t row) {
  const int64_t row_bytes = row * static_cast<int64_t>(sizeof(T));
  return kFarStores && rows * row_bytes >= kFarBytes && row_bytes % kLineBytes == 0 && starts_a_line(map);
}

// store() past the cache, of a vector of a whole register; aligned to its size.
template <int N, class T>
inline void store_far(T* p, Vector<Compute<T>, N> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) * N == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) * N == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  if constexpr (sizeof(T) * N == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#endif
  store<N>(p, v);
}

// n numbers, whole lines of them, past the cache.
template <class C>
inline void copy_far(C* to, const C* from, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<C>) store_far<kLanes<C>>(to + i, load<kLanes<C>>(from + i));
}

// After stores past the cache, before another thread may read them.
inline void finish_far_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace espk::ESPK_ISA
