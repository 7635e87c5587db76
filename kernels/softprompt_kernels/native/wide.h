// Products of float32 in registers, for wide.c and wide_chunk.c.
//
// The right factor comes in panels of LANES columns, [K][LANES].

#ifndef SOFTPROMPT_WIDE_H
#define SOFTPROMPT_WIDE_H

#include "vectors.h"

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__AVX512F__) || defined(__ARM_NEON)
#define SOFTPROMPT_HAS_WIDE

// Sums of MAX_ROWS rows and one panel, and what they are made of, fit the registers. A sum of many products is made of the
// sums of CUT of them: a single one would be off by two or three times as much.
enum { MAX_ROWS = WIDTH == 16 ? 12 : 6, PARTS = LANES / WIDTH, CUT = 256 };

// a * b + c, rounded once. Left to themselves, compilers round twice where they think that faster, which depends on how many
// rows there are.
static inline vec fused(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < WIDTH; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#endif
}

// sums [rows][lanes] = or += x [rows, size] times a panel: [size][lanes] in float32, or in bfloat16. `rows`, `lanes`, whole
// registers, and `dtype` are numbers the compiler knows. `next`, unless NULL, is fetched into the cache meanwhile.
static inline __attribute__((always_inline)) void multiply(int rows, int lanes, float *sums, int first, const float *x,
                                                           int64_t x_row, const void *panel, int64_t size, int dtype,
                                                           const uint16_t *next) {
    const int parts = lanes / WIDTH;
#define BEGIN(m) vec low##m = {0}, high##m = {0};
#define ADD(m)                                               \
    if (rows > m) {                                          \
        const vec each = x[m * x_row + k] - (vec){0};        \
        low##m = fused(each, w[0], low##m);                  \
        if (parts > 1) high##m = fused(each, w[1], high##m); \
    }
#define GIVE(m)                                     \
    if (rows > m) {                                 \
        vec *sum = (vec *)(sums + m * lanes);       \
        if (!first) {                               \
            low##m += sum[0];                       \
            if (parts > 1) high##m += sum[1];       \
        }                                           \
        sum[0] = low##m;                            \
        if (parts > 1) sum[1] = high##m;            \
    }
    EACH_ROW(BEGIN)
    for (int64_t k = 0; k < size; k++) {
        vec w[2];
        for (int p = 0; p < parts; p++)
            w[p] = dtype == FLOAT32 ? *((const vec *)panel + k * parts + p)
                                    : widen((const uint16_t *)panel + k * lanes + p * WIDTH);
        if (next) __builtin_prefetch(next + k * lanes);
        EACH_ROW(ADD)
    }
    EACH_ROW(GIVE)
#undef BEGIN
#undef ADD
#undef GIVE
}

// One case for each number of rows, for a function to know it.
#ifdef __AVX512F__
#define FOR_ROWS(CASE) \
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#else
#define FOR_ROWS(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#endif

#endif

#endif
