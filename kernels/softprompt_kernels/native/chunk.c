// Causal attention of several new tokens of one sequence, in bfloat16 (AVX512-BF16): keys and values of a head are
// packed from their pages once for a block of queries, then both products are made in registers, or in the tiles of AMX.
// Softmax in float32; its weights are rounded to bfloat16 for the second product, as in every flash attention.
//
// And attention of one query of each of several sequences to a beginning that they share, by the same means.

#include "native.h"

#ifndef __AVX512BF16__

int softprompt_paged_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                           int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    return 1;
}

int softprompt_paged_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                            const int32_t *rows, int64_t n, int64_t length, int64_t q_row, int64_t q_head,
                            int num_heads, int num_kv_heads, int dim, int page_size, float scale, int num_threads) {
    return 1;
}

#else

#include "amx.h"
#include "team.h"
#include "tile.h"

enum { MOST_ROWS = AMX_ROWS, BLOCK = 32 };  // BLOCK: queries that share a packing
enum { AHEAD = 2 * LANES };                 // positions that are fetched into the cache before they are packed

typedef struct {
    uint16_t *keys;     // [positions / LANES][dim / 2][LANES][2]
    uint16_t *values;   // [dim / LANES][positions / 2][LANES][2]
    uint16_t *queries;  // [MOST_ROWS][dim]
    float *scores;      // [MOST_ROWS][positions]
    uint16_t *weights;  // [MOST_ROWS][positions]
} Buffers;

// This thread's buffers; keys is NULL where memory was refused.
static Buffers allocate(int64_t positions, int dim) {
    static _Thread_local Kept kept;
    size_t halves = (size_t)positions * dim, rows = MOST_ROWS * (size_t)positions;
    size_t bytes = (2 * halves + rows + (size_t)MOST_ROWS * dim) * sizeof(uint16_t) + rows * sizeof(float);
    Buffers b = {.keys = softprompt_keep(&kept, bytes)};
    if (!b.keys) return b;
    b.values = b.keys + halves;
    b.scores = (float *)(b.values + halves);
    b.weights = (uint16_t *)(b.scores + rows);
    b.queries = b.weights + rows;
    return b;
}

// to[i][j] = pair i of row j, of 16 pairs from `at` on in each of 16 rows: a register for each pair.
static inline void transpose(uint16_t *to, const uint16_t *const rows[LANES], int64_t at) {
    __m512i r[16], t[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + at);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // Quarter q of r[i + c] holds pair 4 q + c of rows i to i + 3.
    for (int c = 0; c < 4; c++) {
        const __m512i front = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x44);
        const __m512i front_rest = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x44);
        const __m512i back = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xee);
        const __m512i back_rest = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xee);
        _mm512_storeu_si512(to + c * 2 * LANES, _mm512_shuffle_i32x4(front, front_rest, 0x88));
        _mm512_storeu_si512(to + (4 + c) * 2 * LANES, _mm512_shuffle_i32x4(front, front_rest, 0xdd));
        _mm512_storeu_si512(to + (8 + c) * 2 * LANES, _mm512_shuffle_i32x4(back, back_rest, 0x88));
        _mm512_storeu_si512(to + (12 + c) * 2 * LANES, _mm512_shuffle_i32x4(back, back_rest, 0xdd));
    }
}

// Where a position's keys, or values, begin.
static inline int64_t place(const int32_t *pages, int64_t position, int64_t row, int page_size) {
    return ((int64_t)pages[position / page_size] * page_size + position % page_size) * row;
}

// Positions first … first + positions of a head; zeros where the context has ended.
static void pack(const Buffers *b, const uint16_t *keys, const uint16_t *values, const int32_t *pages, int64_t first,
                 int64_t positions, int64_t context, int64_t row, int dim, int page_size) {
    static const uint16_t zeros[2 * 256];
    for (int64_t j = 0; j < positions; j += LANES) {
        const uint16_t *k[LANES], *v[LANES];
        for (int i = 0; i < LANES; i++) {
            const int64_t p = first + j + i, at = p < context ? place(pages, p, row, page_size) : 0;
            k[i] = p < context ? keys + at : zeros;
            v[i] = p < context ? values + at : zeros;
            if (p + AHEAD >= context) continue;
            const int64_t later = place(pages, p + AHEAD, row, page_size);
            for (int d = 0; d < dim; d += 2 * LANES) {
                _mm_prefetch((const char *)(keys + later + d), _MM_HINT_T0);
                _mm_prefetch((const char *)(values + later + d), _MM_HINT_T0);
            }
        }
        for (int d = 0; d < dim; d += 2 * LANES) transpose(b->keys + j * dim + d * LANES, k, d);
        for (int i = 0; i < LANES; i += 2)
            for (int d = 0; d < dim; d += LANES) {
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v[i] + d)));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(v[i + 1] + d)));
                _mm512_storeu_si512(b->values + d * positions + (j + i) * LANES,
                                    _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
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
// `from` and `to`. Returns their sum, and puts scale * top at `top_score`.
static inline float soften(const float *scores, uint16_t *weights, int64_t from, int64_t to, int64_t low, int64_t high,
                           float scale, float *top_score) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i lows = _mm512_set1_epi32((int)low), highs = _mm512_set1_epi32((int)high);
    __m512 top = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int64_t p = from; p < to; p += LANES) {
        __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)p));
        __mmask16 seen = _mm512_cmpge_epi32_mask(at, lows) & _mm512_cmplt_epi32_mask(at, highs);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + p), factor);
        top = _mm512_mask_max_ps(top, seen, top, x);
    }
    *top_score = _mm512_reduce_max_ps(top);
    top = _mm512_set1_ps(*top_score);
    for (int64_t p = from; p < to; p += LANES) {
        __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32((int)p));
        __mmask16 seen = _mm512_cmpge_epi32_mask(at, lows) & _mm512_cmplt_epi32_mask(at, highs);
        __m512 x = _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(scores + p), factor), top);
        __m512 e = _mm512_maskz_mov_ps(seen, exp_of(x));
        sum = _mm512_add_ps(sum, e);
        _mm256_storeu_si256((__m256i *)(weights + p), (__m256i)_mm512_cvtneps_pbh(e));
    }
    return _mm512_reduce_add_ps(sum);
}

// Columns d … d + PANELS * LANES of weights times values, of the positions between `from` and `to` alone.
static void mix_columns(int amx, int rows, float *sums, int64_t sums_row, const Buffers *b, int64_t from, int64_t to,
                        int64_t positions, int d) {
    product(amx, rows, sums, sums_row, b->weights + from, positions, b->values + d * positions + from * LANES,
            positions * LANES, (to - from) / 2);
}

static void mix(int amx, int rows, const Buffers *b, uint16_t *const *out, const float *scales, int64_t from, int64_t to,
                int64_t positions, int dim) {
    float sums[MOST_ROWS][PANELS * LANES];
    for (int d = 0; d < dim; d += PANELS * LANES) {
        mix_columns(amx, rows, sums[0], PANELS * LANES, b, from, to, positions, d);
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
    const int64_t work = num_queries * context * dim;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_paged_chunk(out, q, keys, values, pages, num_queries, context, q_row, q_head, num_heads,
                                        num_kv_heads, dim, page_size, window, scale, 0));
    // Half blocks where whole ones would leave threads without work.
    const int size = (num_queries + BLOCK - 1) / BLOCK * num_kv_heads < 4 * softprompt_num_threads() ? BLOCK / 2 : BLOCK;
    const int blocks = (int)((num_queries + size - 1) / size);
    const int64_t row = (int64_t)num_kv_heads * dim, step = PANELS * LANES;
    int shaped = 0;
    Buffers b = allocate((context + 2 * step) / step * step, dim);
    if (!b.keys) return 1;
    for (Share s = softprompt_share(blocks * num_kv_heads, work); softprompt_next(&s);) {
        // The longest contexts first.
        const int head = (int)(s.pass % num_kv_heads), block = blocks - 1 - (int)(s.pass / num_kv_heads);
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
            for (int m = 0; m < count; m++) {
                float top;
                scales[m] = 1 / soften(b.scores + m * positions, b.weights + m * positions, from, end, lows[m],
                                       highs[m], scale, &top);
            }
            mix(amx, count, &b, to, scales, from, end, positions, dim);
        }
    }
    if (shaped) amx_release();
    return 0;
}

// One query of each of n sequences, at `rows` of q, and the first `length` positions, whose pages they share: of each
// head the values' sum weighted by e^(score - top), the top score, and the sum of the weights, at the same rows of
// prefix [rows, num_heads, dim + LANES]. The rest as above.
int softprompt_paged_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                            const int32_t *rows, int64_t n, int64_t length, int64_t q_row, int64_t q_head,
                            int num_heads, int num_kv_heads, int dim, int page_size, float scale, int num_threads) {
    const int group = num_heads / num_kv_heads, amx = softprompt_has_amx(), most_rows = amx ? AMX_ROWS : MAX_ROWS;
    const int64_t row = (int64_t)num_kv_heads * dim, step = PANELS * LANES, width = dim + LANES, total = n * group;
    const int64_t positions = (length + step - 1) / step * step, blocks = (total + most_rows - 1) / most_rows;
    const int64_t work = n * length * dim;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_paged_prefix(prefix, q, keys, values, pages, rows, n, length, q_row, q_head, num_heads,
                                         num_kv_heads, dim, page_size, scale, 0));
    // Each part packs for itself: no more of them than keep all threads busy.
    const int64_t parts = num_kv_heads % softprompt_num_threads() ? least(blocks, softprompt_num_threads()) : 1;
    int shaped = 0;
    Buffers b = allocate(positions, dim);
    if (!b.keys) return 1;
    for (Share s = softprompt_share(parts * num_kv_heads, work); softprompt_next(&s);) {
        const int64_t head = s.pass % num_kv_heads, part = s.pass / num_kv_heads;
        pack(&b, (const uint16_t *)keys + head * dim, (const uint16_t *)values + head * dim, pages, 0, positions,
             length, row, dim, page_size);
        for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; block++) {
            const int64_t start = total * block / blocks;
            const int count = (int)(total * (block + 1) / blocks - start);
            float *to[MOST_ROWS], sums[MOST_ROWS][PANELS * LANES];
            for (int m = 0; m < count; m++) {
                const int64_t at = rows[(start + m) / group], h = head * group + (start + m) % group;
                memcpy(b.queries + m * dim, (const uint16_t *)q + at * q_row + h * q_head, (size_t)dim * 2);
                to[m] = prefix + (at * num_heads + h) * width;
            }
            if (amx && count != shaped) amx_shape(shaped = count);
            score(amx, count, &b, 0, positions, positions, dim);
            for (int m = 0; m < count; m++)
                to[m][dim + 1] = soften(b.scores + m * positions, b.weights + m * positions, 0, positions, 0,
                                        length, scale, to[m] + dim);
            for (int d = 0; d < dim; d += PANELS * LANES) {
                mix_columns(amx, count, sums[0], PANELS * LANES, &b, 0, positions, positions, d);
                for (int m = 0; m < count; m++) memcpy(to[m] + d, sums[m], sizeof sums[m]);
            }
        }
    }
    if (shaped) amx_release();
    return 0;
}

#endif
