// One query's attention to the keys and values of one head: what `decode.c` does for each query, for as many heads at a time
// as fit the registers. Each dtype has a file of its own, as the compiler takes its time for each.

#ifndef SOFTPROMPT_DECODE_H
#define SOFTPROMPT_DECODE_H

#include <math.h>
#include <string.h>

#include "vectors.h"

enum { MAX_VECTORS = MAX_DIM / WIDTH, MAX_HEADS = 4 };

typedef struct {
    const void *keys, *values;
    const int32_t *pages;
    int64_t row_elements;  // from one position to the next inside a page
    int64_t head_offset;
    int page_size, dtype, dim;
} Head;

// Where the head's rows of WIDTH positions from `first` on lie, as far as there are any, in elements from the start.
static inline void find_rows(int64_t *rows, const Head *head, int first, int count) {
    int page = first / head->page_size, offset = first - page * head->page_size;
    for (int j = 0; j < count; j++) {
        rows[j] = ((int64_t)head->pages[page] * head->page_size + offset) * head->row_elements + head->head_offset;
        if (++offset == head->page_size) offset = 0, page++;
    }
}

// e^x for x <= 0.
static inline float exp_of_negative(float x) { return exp_within(x < -87.0f ? -87.0f : x); }

// One row; whole vectors where it has no rest.
static inline __attribute__((always_inline)) void load_row(vec *to, const void *from, int64_t offset, int dim,
                                                           int vectors, int dtype) {
    if (dim == vectors * WIDTH)
        for (int c = 0; c < vectors; c++) to[c] = load_vector(from, offset + c * WIDTH, dtype);
    else
        load_padded(to, from, offset, dim, vectors, dtype);
}

static inline void prefetch_rows(const void *from, const int64_t *rows, int count, int dim, int dtype) {
    int64_t item_bytes = dtype == FLOAT32 ? 4 : 2;
    for (int j = 0; j < count; j++)
        for (int64_t byte = 0; byte < dim * item_bytes; byte += 64)
            __builtin_prefetch((const char *)from + rows[j] * item_bytes + byte);
}

// The rows of up to WIDTH of `left` positions from `first` on, which `next` has; how many they are. `next` gets those behind
// them, which are on their way from memory then.
static inline __attribute__((always_inline)) int take_rows(int64_t *rows, int64_t *next, const Head *head,
                                                           const void *from, int first, int left, int dtype) {
    const int count = left < WIDTH ? left : WIDTH;
    memcpy(rows, next, WIDTH * sizeof *rows);
    if (left > count) {
        const int ahead = left - count < WIDTH ? left - count : WIDTH;
        find_rows(next, head, first + WIDTH, ahead);
        prefetch_rows(from, next, ahead, head->dim, dtype);
    }
    return count;
}

// What a softmax has seen before: its largest score, and the sum of e^(score - top).
typedef struct {
    float top, total;
} Seen;

// Answers with what becomes of one of the weights seen before, e^(score - seen.top).
static inline float softmax(float *restrict row, int length, Seen seen, float softcap) {
    if (softcap > 0)
        for (int j = 0; j < length; j++) row[j] = softcap * tanhf(row[j] / softcap);
    float top = seen.top, total = 0;
#pragma omp simd reduction(max : top)
    for (int j = 0; j < length; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : total)
    for (int j = 0; j < length; j++) {
        row[j] = exp_of_negative(row[j] - top);
        total += row[j];
    }
    const float rest = seen.total > 0 ? exp_of_negative(seen.top - top) : 0;
    const float share = 1 / (total + seen.total * rest);
    for (int j = 0; j < length; j++) row[j] *= share;
    return rest * share;
}

// What some query heads at one position start from: attention sinks, scores without a value; or what a shared beginning
// gave them, of each head dim sums, the top and the total (see softprompt_paged_prefix); or nothing.
typedef struct {
    const float *sinks, *prefix;
    int dim;
} Start;

static inline const float *prefix_of(const Start *start, int g) {
    return start->prefix ? start->prefix + (int64_t)g * (start->dim + LANES) : NULL;
}

static inline Seen seen_by(const Start *start, int g) {
    const float *prefix = prefix_of(start, g);
    if (prefix) return (Seen){prefix[start->dim], prefix[start->dim + 1]};
    if (start->sinks) return (Seen){start->sinks[g], 1};
    return (Seen){-INFINITY, 0};
}

// sums[g][0 … 2) += two vectors of each value row, weighted, for up to MAX_HEADS heads. Named, the sums stay in
// registers; an array of them would go through memory at every row.
static inline __attribute__((always_inline)) void add_columns(
    vec *sums, const float *weights, const void *values, const int64_t *rows, int column, int64_t padded, int count,
    int heads, int vectors, int dtype) {
    vec a0 = sums[0], a1 = sums[1], b0 = a0, b1 = a1, c0 = a0, c1 = a1, d0 = a0, d1 = a1;
    if (heads > 1) b0 = sums[vectors], b1 = sums[vectors + 1];
    if (heads > 2) c0 = sums[2 * vectors], c1 = sums[2 * vectors + 1];
    if (heads > 3) d0 = sums[3 * vectors], d1 = sums[3 * vectors + 1];
    for (int j = 0; j < count; j++) {
        vec low = load_vector(values, rows[j] + column, dtype);
        vec high = load_vector(values, rows[j] + column + WIDTH, dtype);
        a0 += weights[j] * low, a1 += weights[j] * high;
        if (heads > 1) b0 += weights[padded + j] * low, b1 += weights[padded + j] * high;
        if (heads > 2) c0 += weights[2 * padded + j] * low, c1 += weights[2 * padded + j] * high;
        if (heads > 3) d0 += weights[3 * padded + j] * low, d1 += weights[3 * padded + j] * high;
    }
    sums[0] = a0, sums[1] = a1;
    if (heads > 1) sums[vectors] = b0, sums[vectors + 1] = b1;
    if (heads > 2) sums[2 * vectors] = c0, sums[2 * vectors + 1] = c1;
    if (heads > 3) sums[3 * vectors] = d0, sums[3 * vectors + 1] = d1;
}

// Some of the query heads that share a key head, at one position. q, out [heads][vectors]; scores [heads][padded].
static inline __attribute__((always_inline)) void attend(
    const Head *head, vec *restrict out, const vec *restrict q, float *restrict scores, Start start, int first,
    int length, int64_t padded, int heads, int vectors, int dtype, float scale, float softcap) {
    int64_t rows[WIDTH], next[WIDTH];
    vec row[MAX_VECTORS], products[MAX_HEADS][WIDTH];
    memset(products, 0, sizeof products);  // what is past the end must be finite
    find_rows(next, head, first, length < WIDTH ? length : WIDTH);
    for (int begin = 0; begin < length; begin += WIDTH) {
        const int count = take_rows(rows, next, head, head->keys, first + begin, length - begin, dtype);
        for (int j = 0; j < count; j++) {
            load_row(row, head->keys, rows[j], head->dim, vectors, dtype);
            for (int g = 0; g < heads; g++) {
                vec sum = q[g * vectors] * row[0];
                for (int c = 1; c < vectors; c++) sum += q[g * vectors + c] * row[c];
                products[g][j] = sum;
            }
        }
        for (int g = 0; g < heads; g++) {
            vec dots = sum_lanes(products[g]) * scale;
            memcpy(scores + g * padded + begin, &dots, sizeof dots);
        }
    }
    vec sums[MAX_HEADS * MAX_VECTORS];
    memset(sums, 0, (size_t)heads * vectors * sizeof(vec));
    for (int g = 0; g < heads; g++) {
        const float rest = softmax(scores + g * padded, length, seen_by(&start, g), softcap);
        const float *prefix = prefix_of(&start, g);
        for (int c = 0; prefix && c < vectors; c++)
            sums[g * vectors + c] = load_vector(prefix, c * WIDTH, FLOAT32) * rest;
    }
    find_rows(next, head, first, length < WIDTH ? length : WIDTH);
    for (int begin = 0; begin < length; begin += WIDTH) {
        const int count = take_rows(rows, next, head, head->values, first + begin, length - begin, dtype);
        if (head->dim % (2 * WIDTH) == 0)
            for (int c = 0; c < vectors; c += 2)
                add_columns(sums + c, scores + begin, head->values, rows, c * WIDTH, padded, count, heads, vectors,
                            dtype);
        else
            for (int j = 0; j < count; j++) {
                load_padded(row, head->values, rows[j], head->dim, vectors, dtype);
                for (int g = 0; g < heads; g++)
                    for (int c = 0; c < vectors; c++) sums[g * vectors + c] += scores[g * padded + begin + j] * row[c];
            }
    }
    memcpy(out, sums, (size_t)heads * vectors * sizeof(vec));
}

// As many of the heads as fit the registers; how many that were. Numbers known to the compiler keep the sums there.
static inline __attribute__((always_inline)) int attend_some(
    const Head *head, vec *out, const vec *q, float *scores, Start start, int first, int length, int64_t padded, int heads,
    int vectors, int dtype, float scale, float softcap) {
    enum { OF_64 = 64 / WIDTH, OF_128 = 128 / WIDTH };
#define ATTEND(HEADS, VECTORS)                                                                                     \
    do {                                                                                                           \
        attend(head, out, q, scores, start, first, length, padded, HEADS, VECTORS, dtype, scale, softcap);         \
        return HEADS;                                                                                              \
    } while (0)
    if (vectors == OF_64 && heads >= 4) ATTEND(4, OF_64);
    if (vectors == OF_64 && heads == 3) ATTEND(3, OF_64);
    if (vectors == OF_64 && heads == 2) ATTEND(2, OF_64);
    if (vectors == OF_64) ATTEND(1, OF_64);
    if (vectors == OF_128 && heads >= 2) ATTEND(2, OF_128);
    if (vectors == OF_128) ATTEND(1, OF_128);
    ATTEND(1, vectors);
#undef ATTEND
}

typedef int AttendSome(const Head *head, vec *out, const vec *q, float *scores, Start start, int first, int length,
                       int64_t padded, int heads, int vectors, float scale, float softcap);

AttendSome softprompt_attend_float32, softprompt_attend_bfloat16;

// The same for queries as they are, where the processor multiplies pairs of bfloat16; 0 for a dimension that it does not
// know, and everywhere else.
int softprompt_attend_pairs(const Head *head, vec *out, const uint16_t *q, int64_t q_head_stride, float *scores,
                            uint16_t *weights, Start start, int first, int length, int64_t padded, int heads, float scale,
                            float softcap);

#endif
