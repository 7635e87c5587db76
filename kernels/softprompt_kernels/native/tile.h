// Products of pairs of bfloat16 in registers (AVX512-BF16), for all kernels that make them.
//
// The right factor comes in panels of LANES columns; a panel holds, for each pair of elements of the left factor's
// rows, one register: [panels][K / 2][LANES][2].

#ifndef SOFTPROMPT_TILE_H
#define SOFTPROMPT_TILE_H

#include "native.h"

#include <immintrin.h>

enum { PANELS = 2, MAX_ROWS = 12 };

// One pair for every lane.
static inline __m512bh pair_at(const uint16_t *x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return (__m512bh)_mm512_set1_epi32(pair);
}

// sums[m] = x[m] times two panels that lie `panel` elements apart. `rows` is a number the compiler knows. `next`, unless
// NULL, is fetched into the cache meanwhile: so much of two panels from there on.
static inline __attribute__((always_inline)) void multiply(int rows, __m512 sums[MAX_ROWS][PANELS], const uint16_t *x,
                                                           int64_t x_row, const uint16_t *panels, int64_t panel,
                                                           int64_t pairs, const uint16_t *next) {
#define BEGIN(m) __m512 left##m = _mm512_setzero_ps(), right##m = left##m;
#define ADD(m)                                                \
    if (rows > m) {                                           \
        const __m512bh both = pair_at(x + m * x_row + 2 * k); \
        left##m = _mm512_dpbf16_ps(left##m, both, a);         \
        right##m = _mm512_dpbf16_ps(right##m, both, b);       \
    }
#define GIVE(m) \
    if (rows > m) sums[m][0] = left##m, sums[m][1] = right##m;
    EACH_ROW(BEGIN)
    for (int64_t k = 0; k < pairs; k++) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(panels + k * 2 * LANES);
        const __m512bh b = (__m512bh)_mm512_loadu_si512(panels + panel + k * 2 * LANES);
        if (next) {
            _mm_prefetch((const char *)(next + k * 2 * LANES), _MM_HINT_T0);
            _mm_prefetch((const char *)(next + panel + k * 2 * LANES), _MM_HINT_T0);
        }
        EACH_ROW(ADD)
    }
    EACH_ROW(GIVE)
#undef BEGIN
#undef ADD
#undef GIVE
}

// e^x, relative error below 3e-7, by the same reduction as in native.h; infinity from 89 on, and a NaN stays one.
static inline __m512 exp_of(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// One case for each number of rows, for `multiply` to know it.
#define FOR_ROWS(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)

#endif
