// Attention of several queries of one sequence, and of one query of each of several to a beginning that they share, in
// float32: what chunk.c does in bfloat16. LANES query rows lie side by side, so that keys and values are read where they
// are: a key's elements are factors of whole registers of queries, and a weight is one of a whole register of values.
//
// A row's answer is the same whichever rows stand beside it: sums over positions are cut where whole CUTs of them end, and
// what a row does not see has the weight 0.

#include "team.h"
#include "wide.h"

#include <math.h>

#ifndef SOFTPROMPT_HAS_WIDE

int softprompt_wide_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                          int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                          int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    return 1;
}

int softprompt_wide_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                           const int32_t *rows, int64_t n, int64_t length, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, float scale, int num_threads) {
    return 1;
}

#else

typedef struct {
    const float *keys, *values;
    const int32_t *pages;
    int64_t row;  // elements from one position to the next inside a page
    int page_size, dim;
} Head;

// Up to LANES query rows of one head, and what becomes of them. Row m sees the positions from lows[m] up to before
// highs[m]; lanes behind the last row see none. `sums` begin at 0.
typedef struct {
    int count;
    const float *queries[LANES];
    int32_t lows[LANES], highs[LANES];
    float tops[LANES], totals[LANES];  // of the scores, and of e^(score - top)
    float sums[LANES][MAX_DIM];        // of the values, weighted by these
} Rows;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// This thread's scores, [positions][LANES]; NULL where memory was refused.
static float *room(int64_t positions) {
    static _Thread_local Kept kept;
    return softprompt_keep(&kept, (size_t)positions * LANES * sizeof(float));
}

static Head head_of(const void *keys, const void *values, const int32_t *pages, int64_t kv_head, int num_kv_heads,
                    int page_size, int dim) {
    return (Head){(const float *)keys + kv_head * dim, (const float *)values + kv_head * dim, pages,
                  (int64_t)num_kv_heads * dim, page_size, dim};
}

// Elements of a position's row, from the first page's begin.
static inline int64_t place(const Head *head, int64_t position) {
    return ((int64_t)head->pages[position / head->page_size] * head->page_size + position % head->page_size) * head->row;
}

// Positions from this one on that lie side by side, as far as `end`.
static inline int64_t in_page(const Head *head, int64_t position, int64_t end) {
    return least(end - position, head->page_size - position % head->page_size);
}

// `lanes` is here, and below, a number the compiler knows: as many as hold all rows.
static inline __attribute__((always_inline)) void score(int lanes, const Head *head, const Rows *rows, float *scores,
                                                        int64_t from, int64_t end) {
    float panel[MAX_DIM * LANES] __attribute__((aligned(64)));
    memset(panel, 0, (size_t)head->dim * lanes * sizeof(float));
    for (int m = 0; m < rows->count; m++)
        for (int d = 0; d < head->dim; d++) panel[d * lanes + m] = rows->queries[m][d];
    for (int64_t p = from, count; p < end; p += count) {
        const int64_t beside = in_page(head, p, end), parts = (beside + MAX_ROWS - 1) / MAX_ROWS;
        count = (beside + parts - 1) / parts;
        const float *keys = head->keys + place(head, p);
        float *to = scores + (p - from) * lanes;
        switch (count) {
#define CASE(n) \
    case n: multiply(n, lanes, to, 1, keys, head->row, panel, head->dim, FLOAT32, 0); break;
            FOR_ROWS(CASE)
#undef CASE
        }
    }
}

// Scores become weights, those of a register's lanes: by one code for all, as compilers round otherwise in each copy.
static __attribute__((noinline, noclone)) void soften(float *scores, int64_t lanes, const int32_t *lows,
                                                      const int32_t *highs, float *tops, float *totals, int64_t from,
                                                      int64_t end, float scale) {
    float top[WIDTH], total[WIDTH] = {0};
    for (int m = 0; m < WIDTH; m++) top[m] = -INFINITY;
    for (int32_t p = from; p < end; p++) {
        float *row = scores + (p - from) * lanes;
#pragma omp simd
        for (int m = 0; m < WIDTH; m++) {
            const float x = row[m] *= scale;
            top[m] = (p >= lows[m]) & (p < highs[m]) & (x > top[m]) ? x : top[m];
        }
    }
    for (int32_t p = from; p < end;) {
        float part[WIDTH] = {0};
        for (const int64_t stop = least(end, (p / CUT + 1) * CUT); p < stop; p++) {
            float *row = scores + (p - from) * lanes;
#pragma omp simd
            for (int m = 0; m < WIDTH; m++) {
                const float x = row[m] - top[m], e = exp_within(x < -87.0f ? -87.0f : x > 0 ? 0 : x);
                row[m] = (p >= lows[m]) & (p < highs[m]) ? e : 0;
                part[m] += row[m];
            }
        }
        for (int m = 0; m < WIDTH; m++) total[m] += part[m];
    }
    memcpy(tops, top, sizeof top);
    memcpy(totals, total, sizeof total);
}

// sums[m][d … d + LANES] of rows m += weights times values of some positions.
static inline __attribute__((always_inline)) void add(int count, int lanes, const Head *head, float (*sums)[MAX_DIM],
                                                      const float *weights, int64_t p, int64_t stop, int d) {
#define BEGIN(m) vec low##m = {0}, high##m = {0};
#define ADD(m)                                               \
    if (count > m) {                                         \
        const vec each = weights[m] - (vec){0};              \
        low##m = fused(each, v[0], low##m);                  \
        if (PARTS > 1) high##m = fused(each, v[1], high##m); \
    }
#define GIVE(m)                               \
    if (count > m) {                          \
        vec *sum = (vec *)(sums[m] + d);      \
        sum[0] += low##m;                     \
        if (PARTS > 1) sum[1] += high##m;     \
    }
    EACH_ROW(BEGIN)
    for (int64_t beside; p < stop; p += beside) {
        beside = in_page(head, p, stop);
        const float *values = head->values + place(head, p) + d;
        for (int64_t k = 0; k < beside; k++, values += head->row, weights += lanes) {
            vec v[2];
            for (int i = 0; i < PARTS; i++) v[i] = ((const vec *)values)[i];
            EACH_ROW(ADD)
        }
    }
    EACH_ROW(GIVE)
#undef BEGIN
#undef ADD
#undef GIVE
}

static inline __attribute__((always_inline)) void mix(int lanes, const Head *head, Rows *rows, const float *weights,
                                                      int64_t from, int64_t end) {
    const int blocks = (rows->count + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t p = from, stop; p < end; p = stop) {
        stop = least(end, (p / CUT + 1) * CUT);
        for (int block = 0; block < blocks; block++) {
            const int m = rows->count * block / blocks, count = rows->count * (block + 1) / blocks - m;
            const float *mine = weights + (p - from) * lanes + m;
            for (int d = 0; d < head->dim; d += LANES) switch (count) {
#define CASE(n) \
    case n: add(n, lanes, head, rows->sums + m, mine, p, stop, d); break;
                    FOR_ROWS(CASE)
#undef CASE
                }
        }
    }
}

static inline __attribute__((always_inline)) void attend_in(int lanes, const Head *head, Rows *rows, float *scores,
                                                            float scale) {
    int64_t from = rows->lows[0], end = rows->highs[0];
    for (int m = 1; m < rows->count; m++) from = least(from, rows->lows[m]), end = -least(-end, -rows->highs[m]);
    score(lanes, head, rows, scores, from, end);
    for (int m = 0; m < lanes; m += WIDTH)
        soften(scores + m, lanes, rows->lows + m, rows->highs + m, rows->tops + m, rows->totals + m, from, end, scale);
    mix(lanes, head, rows, scores, from, end);
}

static void attend(const Head *head, Rows *rows, float *scores, float scale) {
    if (rows->count <= WIDTH) attend_in(WIDTH, head, rows, scores, scale);
    else attend_in(LANES, head, rows, scores, scale);
}

// As softprompt_paged_chunk, in float32; dim a multiple of LANES.
int softprompt_wide_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                          int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                          int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads) {
    const int group = num_heads / num_kv_heads;
    const int64_t total = num_queries * group, blocks = (total + LANES - 1) / LANES;
    const int64_t ahead = context - num_queries;  // positions before the first query's own
    const int64_t work = num_queries * context * dim;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_wide_chunk(out, q, keys, values, pages, num_queries, context, q_row, q_head, num_heads,
                                       num_kv_heads, dim, page_size, window, scale, 0));
    float *scores = room(context);
    if (!scores) return 1;
    for (Share s = softprompt_share(blocks * num_kv_heads, work); softprompt_next(&s);) {
        // The longest contexts first.
        const int64_t kv_head = s.pass % num_kv_heads, start = (blocks - 1 - s.pass / num_kv_heads) * LANES;
        const Head head = head_of(keys, values, pages, kv_head, num_kv_heads, page_size, dim);
        Rows rows = {.count = (int)least(LANES, total - start)};
        float *to[LANES];
        for (int m = 0; m < rows.count; m++) {
            const int64_t query = (start + m) / group, h = kv_head * group + (start + m) % group;
            rows.queries[m] = (const float *)q + query * q_row + h * q_head;
            rows.highs[m] = (int32_t)(ahead + query + 1);
            rows.lows[m] = window && window < rows.highs[m] ? rows.highs[m] - window : 0;
            to[m] = (float *)out + (query * num_heads + h) * dim;
        }
        attend(&head, &rows, scores, scale);
        for (int m = 0; m < rows.count; m++) {
            const float share = 1 / rows.totals[m];
            for (int d = 0; d < dim; d++) to[m][d] = rows.sums[m][d] * share;
        }
    }
    return 0;
}

// As softprompt_paged_prefix, in float32; dim as above.
int softprompt_wide_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                           const int32_t *rows_of_q, int64_t n, int64_t length, int64_t q_row, int64_t q_head,
                           int num_heads, int num_kv_heads, int dim, int page_size, float scale, int num_threads) {
    const int group = num_heads / num_kv_heads;
    const int64_t width = dim + LANES, total = n * group, blocks = (total + LANES - 1) / LANES;
    const int64_t work = n * length * dim;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_wide_prefix(prefix, q, keys, values, pages, rows_of_q, n, length, q_row, q_head, num_heads,
                                        num_kv_heads, dim, page_size, scale, 0));
    float *scores = room(length);
    if (!scores) return 1;
    for (Share s = softprompt_share(blocks * num_kv_heads, work); softprompt_next(&s);) {
        const int64_t kv_head = s.pass % num_kv_heads, block = s.pass / num_kv_heads, start = total * block / blocks;
        const Head head = head_of(keys, values, pages, kv_head, num_kv_heads, page_size, dim);
        Rows rows = {.count = (int)(total * (block + 1) / blocks - start)};
        float *to[LANES];
        for (int m = 0; m < rows.count; m++) {
            const int64_t at = rows_of_q[(start + m) / group], h = kv_head * group + (start + m) % group;
            rows.queries[m] = (const float *)q + at * q_row + h * q_head;
            rows.highs[m] = (int32_t)length;
            to[m] = prefix + (at * num_heads + h) * width;
        }
        attend(&head, &rows, scores, scale);
        for (int m = 0; m < rows.count; m++) {
            memcpy(to[m], rows.sums[m], (size_t)dim * sizeof(float));
            to[m][dim] = rows.tops[m];
            to[m][dim + 1] = rows.totals[m];
        }
    }
    return 0;
}

#endif
