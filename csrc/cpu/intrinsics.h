// The machine's instructions by name, no more of them than the set that is compiled for has. <immintrin.h> takes the
// compiler a second, so the build precompiles this header once for each set.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__x86_64__)
#include <emmintrin.h>
#endif
