// Causal attention of several new tokens of one sequence, in bfloat16 (AVX512-BF16): keys and values of a head are
// packed from their pages once for a block of queries, then both products are tiles in registers. Softmax in float32;
// its weights are rounded to bfloat16 for the second product, as in every flash attention.

#include "native.h"

#ifndef __AVX512BF16__

int softprompt_paged_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                           int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    return 1;
}

#else

#include "tile.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCK = 32 };  // queries that share a packing

typedef struct {
    uint16_t *keys;     // [positions / LANES][dim / 2][LANES][2]
    uint16_t *values;   // [dim / LANES][positions / 2][LANES][2]
    uint16_t *queries;  // [MAX_ROWS][dim]
    float *scores;      // [MAX_ROWS][positions]
    uint16_t *weights;  // [MAX_ROWS][positions]
    void *memory;
} Buffers;

static Buffers allocate(int64_t positions, int dim) {
    size_t halves = (size_t)positions * dim, rows = MAX_ROWS * (size_t)positions;
    Buffers b = {0};
    size_t bytes = (2 * halves + rows + (size_t)MAX_ROWS * dim) * sizeof(uint16_t) + rows * sizeof(float);
    b.memory = aligned_alloc(64, (bytes + 127) / 64 * 64);
    b.keys = b.memory;
    b.values = b.keys + halves;
    b.scores = (float *)(b.values + halves);
    b.weights = (uint16_t *)(b.scores + rows);
    b.queries = b.weights + rows;
    return b;
}

// Positions first … first + positions of a head; zeros where the context has ended.
static void pack(const Buffers *b, const uint16_t *keys, const uint16_t *values, const int32_t *pages, int64_t first,
                 int64_t positions, int64_t context, int64_t row, int dim, int page_size) {
    static const uint16_t zeros[2 * 256];
    for (int64_t j = 0; j < positions; j += 2) {
        const uint16_t *k[2], *v[2];
        for (int i = 0; i < 2; i++) {
            int64_t p = first + j + i;
            int64_t at = p < context ? ((int64_t)pages[p / page_size] * page_size + p % page_size) * row : 0;
            k[i] = p < context ? keys + at : zeros;
            v[i] = p < context ? values + at : zeros;
        }
        for (int i = 0; i < 2; i++) {
            uint32_t *to = (uint32_t *)(b->keys + (j + i) / LANES * LANES * dim) + (j + i) % LANES, pair;
            for (int d = 0; d < dim / 2; d++) {
                memcpy(&pair, k[i] + 2 * d, sizeof pair);
                to[d * LANES] = pair;
            }
        }
        for (int d = 0; d < dim; d += LANES) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v[0] + d)));
            __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v[1] + d)));
            _mm512_storeu_si512(b->values + d * positions + j * LANES, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

static inline __attribute__((always_inline)) void score(int rows, const Buffers *b, int64_t from, int64_t to,
                                                        int64_t positions, int dim) {
    __m512 sums[MAX_ROWS][PANELS];
    for (int64_t p = from; p < to; p += PANELS * LANES) {
        const uint16_t *panels = b->keys + p * dim;
        multiply(rows, sums, b->queries, dim, panels, dim / 2, panels);
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < PANELS; v++) _mm512_storeu_ps(b->scores + m * positions + p + v * LANES, sums[m][v]);
    }
}

// exp(scale * (score - top)) of the positions seen, from `low` up to before `high`, as weights; 0 of the others between
// `from` and `to`. Returns one over their sum.
static inline float soften(const float *scores, uint16_t *weights, int64_t from, int64_t to, int64_t low, int64_t high,
                           float scale) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lows = _mm512_set1_epi32((int)low), highs = _mm512_set1_epi32((int)high);
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int64_t p = from; p < to; p += LANES) {
        __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)p));
        __mmask16 seen = _mm512_cmpge_epi32_mask(at, lows) & _mm512_cmplt_epi32_mask(at, highs);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + p), factor);
        top = _mm512_mask_max_ps(top, seen, top, x);
    }
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t p = from; p < to; p += LANES) {
        __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)p));
        __mmask16 seen = _mm512_cmpge_epi32_mask(at, lows) & _mm512_cmplt_epi32_mask(at, highs);
        __m512 x = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + p), factor), top);
        __m512 e = _mm512_maskz_mov_ps(seen, exp_of(x));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256((__m256i *)(weights + p), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return 1 / _mm512_reduce_add_ps(sum);
}

static inline __attribute__((always_inline)) void mix(int rows, const Buffers *b, uint16_t *const *out,
                                                      const float *scales, int64_t from, int64_t to, int64_t positions,
                                                      int dim) {
    __m512 sums[MAX_ROWS][PANELS];
    for (int d = 0; d < dim; d += PANELS * LANES) {
        const uint16_t *panels = b->values + d * positions;
        // Both panels have a row for every position; the tile walks over the positions seen alone.
        __m512 *flat = &sums[0][0];
        for (int i = 0; i < MAX_ROWS * PANELS; i++) flat[i] = _mm512_setzero_ps();
        for (int64_t p = from; p < to; p += 2) {
            __m512bh a = (__m512bh)_mm512_loadu_si512(panels + p * LANES);
            __m512bh c = (__m512bh)_mm512_loadu_si512(panels + positions * LANES + p * LANES);
#pragma GCC unroll 12
            for (int m = 0; m < rows; m++) {
                int32_t pair;
                memcpy(&pair, b->weights + m * positions + p, sizeof pair);
                __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                sums[m][0] = _mm512_dpbf16_ps(sums[m][0], both, a);
                sums[m][1] = _mm512_dpbf16_ps(sums[m][1], both, c);
            }
        }
#pragma GCC unroll 12
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < PANELS; v++)
                _mm256_storeu_si256((__m256i *)(out[m] + d + v * LANES),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[m][v], _mm512_set1_ps(scales[m]))));
    }
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// q and out [num_queries, num_heads, dim] at the end of a context of that many positions, out contiguous; keys and
// values [pages, page_size, num_kv_heads, dim]; dim a multiple of PANELS * LANES. window 0: none. Returns 0, or 1 where
// memory was refused.
int softprompt_paged_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                           int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    const int group = num_heads / num_kv_heads, blocks = (int)((num_queries + BLOCK - 1) / BLOCK);
    const int64_t row = (int64_t)num_kv_heads * dim, step = PANELS * LANES;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_queries * context * dim > PARALLEL_WORK)
    {
        Buffers b = allocate((context + 2 * step) / step * step, dim);
        if (!b.memory) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(dynamic)
        for (int task = 0; task < blocks * num_kv_heads; task++) {
            if (!b.memory) continue;
            // The longest contexts first.
            const int head = task % num_kv_heads, block = blocks - 1 - task / num_kv_heads;
            const int64_t start = (int64_t)block * BLOCK, stop = least(num_queries, start + BLOCK);
            const int64_t ahead = context - num_queries;  // positions before the first query's own
            const int64_t first = window ? most(0, ahead + start + 1 - window) / step * step : 0;
            const int64_t positions = (ahead + stop - first + step - 1) / step * step;
            pack(&b, (const uint16_t *)keys + head * dim, (const uint16_t *)values + head * dim, pages, first, positions,
                 ahead + stop, row, dim, page_size);
            const int64_t rows = (stop - start) * group;
            for (int64_t r = 0; r < rows; r += MAX_ROWS) {
                const int count = (int)least(MAX_ROWS, rows - r);
                uint16_t *to[MAX_ROWS];
                float scales[MAX_ROWS];
                int64_t lows[MAX_ROWS], highs[MAX_ROWS];
                for (int m = 0; m < count; m++) {
                    const int64_t query = start + (r + m) / group, h = (int64_t)head * group + (r + m) % group;
                    memcpy(b.queries + m * dim, (const uint16_t *)q + query * q_row + h * q_head, (size_t)dim * 2);
                    to[m] = (uint16_t *)out + (query * num_heads + h) * dim;
                    highs[m] = ahead + query + 1 - first;
                    lows[m] = window ? most(0, highs[m] - window) : 0;
                }
                const int64_t from = lows[0] / step * step, end = (highs[count - 1] + step - 1) / step * step;
                switch (count) {
#define CASE(n) \
    case n: score(n, &b, from, end, positions, dim); break;
                    FOR_ROWS(CASE)
#undef CASE
                }
                for (int m = 0; m < count; m++)
                    scales[m] = soften(b.scores + m * positions, b.weights + m * positions, from, end, lows[m], highs[m],
                                       scale);
                switch (count) {
#define CASE(n) \
    case n: mix(n, &b, to, scales, from, end, positions, dim); break;
                    FOR_ROWS(CASE)
#undef CASE
                }
            }
        }
        free(b.memory);
    }
    return failed;
}

#endif
