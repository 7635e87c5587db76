// Products of float32 in registers, for wide.c and wide_chunk.c.
//
// The right factor comes in panels of LANES columns, [K][LANES].

#ifndef SOFTPROMPT_WIDE_H
#define SOFTPROMPT_WIDE_H

#include "native.h"

#if (defined(__AVX2__) && defined(__FMA__)) || defined(__AVX512F__) || defined(__ARM_NEON)
#define SOFTPROMPT_HAS_WIDE

#ifdef __FMA__
#include <immintrin.h>
#endif

// Sums of MAX_ROWS rows and one panel, and what they are made of, fit the registers. A sum of many products is made of the
// sums of CUT of them: a single one would be off by two or three times as much.
enum { MAX_ROWS = WIDTH == 16 ? 12 : 6, PARTS = LANES / WIDTH, CUT = 256 };

typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef uint32_t int_vec __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t half_vec __attribute__((vector_size(WIDTH * sizeof(uint16_t)), aligned(2), may_alias));

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

static inline vec widen(const uint16_t *from) {
    return (vec)(__builtin_convertvector(*(const half_vec *)from, int_vec) << 16);
}

// sums [rows][lanes] = or += x [rows, size] times a panel: [size][lanes] in float32, or in bfloat16. `rows`, `lanes`, whole
// registers, and `dtype` are numbers the compiler knows, so the sums stay in registers. `next`, unless NULL, is fetched into
// the cache meanwhile.
static inline __attribute__((always_inline)) void multiply(int rows, int lanes, float *sums, int first, const float *x,
                                                           int64_t x_row, const void *panel, int64_t size, int dtype,
                                                           const uint16_t *next) {
    const int parts = lanes / WIDTH;
    vec held[MAX_ROWS][PARTS];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        for (int p = 0; p < parts; p++) held[m][p] = (vec){0};
    for (int64_t k = 0; k < size; k++) {
        vec w[PARTS];
        for (int p = 0; p < parts; p++)
            w[p] = dtype == FLOAT32 ? *((const vec *)panel + k * parts + p)
                                    : widen((const uint16_t *)panel + k * lanes + p * WIDTH);
        if (next) __builtin_prefetch(next + k * lanes);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++) {
            const vec each = x[m * x_row + k] - (vec){0};
            for (int p = 0; p < parts; p++) held[m][p] = fused(each, w[p], held[m][p]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        for (int p = 0; p < parts; p++) {
            vec *sum = (vec *)(sums + m * lanes + p * WIDTH);
            if (!first) held[m][p] += *sum;
            *sum = held[m][p];
        }
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
