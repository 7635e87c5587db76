// Causal attention of several new tokens of one sequence, in bfloat16 (AVX512-BF16): keys and values of a head are
// packed from their pages once for a block of queries, then both products are made in registers, or in the tiles of AMX.
// Softmax in float32; its weights are rounded to bfloat16 for the second product, as in every flash attention.

#include "native.h"

#ifndef __AVX512BF16__

int softprompt_paged_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                           int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    return 1;
}

#else

#include "amx.h"
#include "tile.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_ROWS = AMX_ROWS, BLOCK = 32 };  // BLOCK: queries that share a packing

typedef struct {
    uint16_t *keys;     // [positions / LANES][dim / 2][LANES][2]
    uint16_t *values;   // [dim / LANES][positions / 2][LANES][2]
    uint16_t *queries;  // [MOST_ROWS][dim]
    float *scores;      // [MOST_ROWS][positions]
    uint16_t *weights;  // [MOST_ROWS][positions]
    void *memory;
} Buffers;

static Buffers allocate(int64_t positions, int dim) {
    size_t halves = (size_t)positions * dim, rows = MOST_ROWS * (size_t)positions;
    Buffers b = {0};
    size_t bytes = (2 * halves + rows + (size_t)MOST_ROWS * dim) * sizeof(uint16_t) + rows * sizeof(float);
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

// sums[m * sums_row] = x[m] times two panels, see amx_multiply; at most MAX_ROWS rows without AMX.
static void product(int amx, int rows, float *sums, int64_t sums_row, const uint16_t *x, int64_t x_row,
                    const uint16_t *panels, int64_t panel, int64_t pairs) {
    if (amx) {
        amx_multiply(rows, sums, sums_row, x, x_row, panels, panel, pairs, 0);
        return;
    }
    __m512 found[MAX_ROWS][PANELS];
    switch (rows) {
#define CASE(n)                                                                      \
    case n:                                                                          \
        multiply(n, found, x, x_row, panels, panel, pairs, 0);                       \
        for (int m = 0; m < n; m++)                                                  \
            for (int v = 0; v < PANELS; v++)                                         \
                _mm512_storeu_ps(sums + m * sums_row + v * LANES, found[m][v]);      \
        break;
        FOR_ROWS(CASE)
#undef CASE
    }
}

static void score(int amx, int rows, const Buffers *b, int64_t from, int64_t to, int64_t positions, int dim) {
    for (int64_t p = from; p < to; p += PANELS * LANES)
        product(amx, rows, b->scores + p, positions, b->queries, dim, b->keys + p * dim, (int64_t)dim * LANES, dim / 2);
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

// Weights times values, of the positions between `from` and `to` alone.
static void mix(int amx, int rows, const Buffers *b, uint16_t *const *out, const float *scales, int64_t from, int64_t to,
                int64_t positions, int dim) {
    float sums[MOST_ROWS][PANELS * LANES];
    for (int d = 0; d < dim; d += PANELS * LANES) {
        product(amx, rows, sums[0], PANELS * LANES, b->weights + from, positions,
                b->values + d * positions + from * LANES, positions * LANES, (to - from) / 2);
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < PANELS; v++) {
                __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(sums[m] + v * LANES), _mm512_set1_ps(scales[m]));
                _mm256_storeu_si256((__m256i *)(out[m] + d + v * LANES), (__m256i)_mm512_cvtneps_pbh(sum));
            }
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
    const int group = num_heads / num_kv_heads, amx = softprompt_has_amx(), most_rows = amx ? AMX_ROWS : MAX_ROWS;
    // Half blocks where whole ones would leave threads without work.
    const int size = (num_queries + BLOCK - 1) / BLOCK * num_kv_heads < 4 * num_threads ? BLOCK / 2 : BLOCK;
    const int blocks = (int)((num_queries + size - 1) / size);
    const int64_t row = (int64_t)num_kv_heads * dim, step = PANELS * LANES;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && num_queries * context * dim > PARALLEL_WORK)
    {
        int shaped = 0;
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
            const int64_t start = (int64_t)block * size, stop = least(num_queries, start + size);
            const int64_t ahead = context - num_queries;  // positions before the first query's own
            const int64_t first = window ? most(0, ahead + start + 1 - window) / step * step : 0;
            const int64_t positions = (ahead + stop - first + step - 1) / step * step;
            pack(&b, (const uint16_t *)keys + head * dim, (const uint16_t *)values + head * dim, pages, first, positions,
                 ahead + stop, row, dim, page_size);
            const int64_t rows = (stop - start) * group;
            for (int64_t r = 0; r < rows; r += most_rows) {
                const int count = (int)least(most_rows, rows - r);
                uint16_t *to[MOST_ROWS];
                float scales[MOST_ROWS];
                int64_t lows[MOST_ROWS], highs[MOST_ROWS];
                for (int m = 0; m < count; m++) {
                    const int64_t query = start + (r + m) / group, h = (int64_t)head * group + (r + m) % group;
                    memcpy(b.queries + m * dim, (const uint16_t *)q + query * q_row + h * q_head, (size_t)dim * 2);
                    to[m] = (uint16_t *)out + (query * num_heads + h) * dim;
                    highs[m] = ahead + query + 1 - first;
                    lows[m] = window ? most(0, highs[m] - window) : 0;
                }
                const int64_t from = lows[0] / step * step, end = (highs[count - 1] + step - 1) / step * step;
                if (amx && count != shaped) amx_shape(shaped = count);
                score(amx, count, &b, from, end, positions, dim);
                for (int m = 0; m < count; m++)
                    scales[m] = soften(b.scores + m * positions, b.weights + m * positions, from, end, lows[m], highs[m],
                                       scale);
                mix(amx, count, &b, to, scales, from, end, positions, dim);
            }
        }
        if (shaped) amx_release();
        free(b.memory);
    }
    return failed;
}

#endif
