// Rows of elements as vectors of floats, for whatever registers there are.

#ifndef SOFTPROMPT_VECTORS_H
#define SOFTPROMPT_VECTORS_H

#include "native.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return (uint16_t)((bits >> 16) | 0x40);  // a NaN must not round to infinity
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void load(float *restrict to, const void *from, int64_t offset, int n, int dtype) {
    if (dtype == FLOAT32) {
        memcpy(to, (const float *)from + offset, (size_t)n * sizeof(float));
    } else {
        const uint16_t *restrict bits = (const uint16_t *)from + offset;
        for (int i = 0; i < n; i++) to[i] = from_bf16(bits[i]);
    }
}

static inline void store(void *to, int64_t offset, const float *restrict from, int n, int dtype) {
    if (dtype == FLOAT32) {
        memcpy((float *)to + offset, from, (size_t)n * sizeof(float));
    } else {
        uint16_t *restrict bits = (uint16_t *)to + offset;
        for (int i = 0; i < n; i++) bits[i] = to_bf16(from[i]);
    }
}

// A head is padded with zeros to whole vectors.
typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef uint32_t int_vec __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t half_vec __attribute__((vector_size(WIDTH * sizeof(uint16_t)), aligned(2), may_alias));

// In one instruction and a shift, where compilers convert halves of a vector one by one.
static inline vec widen(const uint16_t *from) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#else
    return (vec)(__builtin_convertvector(*(const half_vec *)from, int_vec) << 16);
#endif
}

static inline void load_padded(vec *to, const void *from, int64_t offset, int n, int vectors, int dtype) {
    if (n < vectors * WIDTH) memset(to + n / WIDTH, 0, (size_t)(vectors - n / WIDTH) * sizeof(vec));
    load((float *)to, from, offset, n, dtype);
}

// Halves of a and b added crosswise; four rounds of it sum the lanes of 16 vectors, three those of 8: lane j of
// sum_lanes' answer is the sum of v[j]'s.
#if defined(__clang__) || __GNUC__ >= 12
#define FOLD(a, b, ...) (__builtin_shufflevector(a, b, __VA_ARGS__))
#else
#define FOLD(a, b, ...) (__builtin_shuffle(a, b, (int_vec){__VA_ARGS__}))
#endif
#ifdef __AVX512F__
static inline vec fold8(vec a, vec b) {
    return FOLD(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           FOLD(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
static inline vec fold4(vec a, vec b) {
    return FOLD(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           FOLD(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
static inline vec fold2(vec a, vec b) {
    return FOLD(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           FOLD(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
}
static inline vec fold1(vec a, vec b) {
    return FOLD(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           FOLD(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

static inline vec sum_lanes(const vec *v) {
    vec halves[8], quarters[4];
    for (int i = 0; i < 8; i++) halves[i] = fold8(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) quarters[i] = fold4(halves[2 * i], halves[2 * i + 1]);
    return fold1(fold2(quarters[0], quarters[1]), fold2(quarters[2], quarters[3]));
}
#else
static inline vec fold4(vec a, vec b) {
    return FOLD(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + FOLD(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
}
static inline vec fold2(vec a, vec b) {
    return FOLD(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + FOLD(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
}
static inline vec fold1(vec a, vec b) {
    return FOLD(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + FOLD(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
}

static inline vec sum_lanes(const vec *v) {
    vec halves[4];
    for (int i = 0; i < 4; i++) halves[i] = fold4(v[2 * i], v[2 * i + 1]);
    return fold1(fold2(halves[0], halves[1]), fold2(halves[2], halves[3]));
}
#endif

// The elements of a vector, widened.
static inline vec load_vector(const void *from, int64_t offset, int dtype) {
    // Copied with memcpy, GCC takes a vector through memory in pieces.
    if (dtype == FLOAT32) return *(const vec *)((const float *)from + offset);
    return widen((const uint16_t *)from + offset);
}

#endif
