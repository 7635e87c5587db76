// CPU kernels: what torch can only do in many small operations, each with its own dispatch and its own copy.
// Plain C for any compiler with OpenMP; the compiler vectorises the inner loops. Sums and softmax in float32.
// Bounds, shapes and dtypes are the caller's duty: see __init__.py.

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "team.h"
#include "vectors.h"

// keys[slots[t]] = k[t] and the same for values; [slots, num_kv_heads, dim] with dense rows, k and v with strides.
void softprompt_kv_write(
    void *keys, void *values, const void *k, const void *v, const int64_t *slots, int64_t n, int64_t k_row_stride,
    int64_t k_head_stride, int64_t v_row_stride, int64_t v_head_stride, int num_kv_heads, int dim, int item_bytes) {
    size_t bytes = (size_t)dim * item_bytes;
    for (int64_t t = 0; t < n; t++)
        for (int h = 0; h < num_kv_heads; h++) {
            size_t to = ((size_t)slots[t] * num_kv_heads + h) * bytes;
            memcpy((char *)keys + to, (const char *)k + (t * k_row_stride + h * k_head_stride) * item_bytes, bytes);
            memcpy((char *)values + to, (const char *)v + (t * v_row_stride + h * v_head_stride) * item_bytes, bytes);
        }
}

// [outer, inner] rows of `size` elements, dense in themselves; out and sum are contiguous.
typedef struct {
    const void *data;
    int64_t outer_stride, inner_stride;
} Rows;

static inline int64_t row_offset(const Rows *rows, int64_t row, int64_t inner) {
    return row / inner * rows->outer_stride + row % inner * rows->inner_stride;
}

// h = x + residual, rounded to the dtype (or h = x); out = h / sqrt(mean(h^2) + eps) * (weight or 1 + weight).
// Returns 0, or 1 where memory for a row was refused.
int softprompt_rms_norm(
    void *out, void *sum, const void *x, const void *residual, const void *weight, int64_t outer, int64_t inner,
    int64_t size, int64_t x_outer_stride, int64_t x_inner_stride, int64_t residual_outer_stride,
    int64_t residual_inner_stride, int dtype, int unit_offset, float eps, int num_threads) {
    Rows from = {x, x_outer_stride, x_inner_stride}, plus = {residual, residual_outer_stride, residual_inner_stride};
    const int64_t count = outer * inner, work = count * size;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_rms_norm(out, sum, x, residual, weight, outer, inner, size, x_outer_stride, x_inner_stride,
                                     residual_outer_stride, residual_inner_stride, dtype, unit_offset, eps, 0));
    static _Thread_local Kept kept;
    float *restrict h = softprompt_keep(&kept, (size_t)size * 3 * sizeof(float));
    if (!h) return 1;
    float *restrict w = h + size, *restrict r = w + size;
    load(w, weight, 0, (int)size, dtype);
    if (unit_offset)
        for (int64_t i = 0; i < size; i++) w[i] += 1;
    for (Share s = softprompt_share(count, work); softprompt_next(&s);) {
        load(h, from.data, row_offset(&from, s.pass, inner), (int)size, dtype);
        if (residual) {
            load(r, plus.data, row_offset(&plus, s.pass, inner), (int)size, dtype);
            for (int64_t i = 0; i < size; i++) h[i] += r[i];
            store(sum, s.pass * size, h, (int)size, dtype);
            load(h, sum, s.pass * size, (int)size, dtype);
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < size; i++) squares += h[i] * h[i];
        float scale = 1 / sqrtf(squares / (float)size + eps);
        for (int64_t i = 0; i < size; i++) h[i] = h[i] * scale * w[i];
        store(out, s.pass * size, h, (int)size, dtype);
    }
    return 0;
}

static inline void rotate(void *out, const void *x, int64_t to, int64_t from, const float *restrict cosine,
                          const float *restrict sine, int half, int dtype) {
    float first[MAX_DIM / 2], second[MAX_DIM / 2], turned[MAX_DIM];
    load(first, x, from, half, dtype);
    load(second, x, from + half, half, dtype);
    for (int d = 0; d < half; d++) {
        turned[d] = first[d] * cosine[d] - second[d] * sine[d];
        turned[half + d] = second[d] * cosine[half + d] + first[d] * sine[half + d];
    }
    store(out, to, turned, 2 * half, dtype);
}

// Half-split rotary embedding of q [n, num_heads, dim] and k [n, num_kv_heads, dim] by tables [n, dim]. Returns 0, or 1
// where memory was refused.
int softprompt_rope(
    void *q_out, void *k_out, const void *q, const void *k, const void *cosines, const void *sines, int64_t n,
    int64_t q_row_stride, int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride, int64_t cos_stride,
    int64_t sin_stride, int num_heads, int num_kv_heads, int dim, int dtype, int table_dtype, int num_threads) {
    const int64_t work = n * (num_heads + num_kv_heads) * dim;
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_rope(q_out, k_out, q, k, cosines, sines, n, q_row_stride, q_head_stride, k_row_stride,
                                 k_head_stride, cos_stride, sin_stride, num_heads, num_kv_heads, dim, dtype, table_dtype,
                                 0));
    for (Share s = softprompt_share(n, work); softprompt_next(&s);) {
        const int64_t t = s.pass;
        float cosine[MAX_DIM], sine[MAX_DIM];
        load(cosine, cosines, t * cos_stride, dim, table_dtype);
        load(sine, sines, t * sin_stride, dim, table_dtype);
        for (int h = 0; h < num_heads; h++)
            rotate(q_out, q, (t * num_heads + h) * dim, t * q_row_stride + h * q_head_stride, cosine, sine, dim / 2,
                   dtype);
        for (int h = 0; h < num_kv_heads; h++)
            rotate(k_out, k, (t * num_kv_heads + h) * dim, t * k_row_stride + h * k_head_stride, cosine, sine,
                   dim / 2, dtype);
    }
    return 0;
}

// columns[i]: the first of the largest values of row i, of x [n, size]; -1 where that is not finite, or a value is NaN.
void softprompt_argmax(int64_t *columns, const void *x, int64_t n, int64_t size, int64_t row_stride, int dtype,
                       int num_threads) {
    enum { BLOCK = 512 };
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && n * size > PARALLEL_WORK)
    for (int64_t row = 0; row < n; row++) {
        float values[BLOCK], best = -INFINITY;
        int64_t best_start = 0;
        int is_nan = 0;
        for (int64_t start = 0; start < size; start += BLOCK) {
            const int count = (int)(size - start < BLOCK ? size - start : BLOCK);
            load(values, x, row * row_stride + start, count, dtype);
            float top = -INFINITY;
            int nans = 0;
#pragma omp simd reduction(max : top) reduction(| : nans)
            for (int i = 0; i < count; i++) {
                top = values[i] > top ? values[i] : top;
                nans |= values[i] != values[i];
            }
            is_nan |= nans;
            if (top > best) best = top, best_start = start;
        }
        // OpenMP lets a compiler begin a maximum at the least finite number (clang does): then no element may be it.
        if (is_nan || !(best > -FLT_MAX && best <= FLT_MAX)) {
            columns[row] = -1;
            continue;
        }
        int64_t at = best_start;
        for (;; at++) {
            load(values, x, row * row_stride + at, 1, dtype);
            if (values[0] == best) break;
        }
        columns[row] = at;
    }
}

// `size` elements of x times each of `count` rows of a, which lie `a_row` elements apart: lane j is row j's sum. What is
// behind the last element may be anything.
static inline vec dots(const float *x, const float *a, int64_t a_row, int64_t count, int64_t size) {
    vec products[WIDTH], rest, part;
    const int64_t whole = size / WIDTH * WIDTH, left = size - whole;
    int_vec kept;
    load_padded(&rest, x, whole, (int)left, 1, FLOAT32);
    for (int lane = 0; lane < WIDTH; lane++) kept[lane] = lane < left ? ~0u : 0;
    for (int64_t j = 0; j < WIDTH; j += 4) {
        vec sums[4] = {{0}, {0}, {0}, {0}};
        const float *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = a + (j + i < count ? j + i : count - 1) * a_row;
        if (j < count) {
            for (int64_t k = 0; k < whole; k += WIDTH) {
                const vec values = load_vector(x, k, FLOAT32);
                for (int i = 0; i < 4; i++) sums[i] += values * load_vector(rows[i], k, FLOAT32);
            }
            for (int i = 0; i < 4 && left; i++) {
                if (whole + WIDTH <= a_row)
                    part = (vec)((int_vec)load_vector(rows[i], whole, FLOAT32) & kept);
                else
                    load_padded(&part, rows[i], whole, (int)left, 1, FLOAT32);
                sums[i] += rest * part;
            }
        }
        memcpy(products + j, sums, sizeof sums);
    }
    return sum_lanes(products);
}

// The slot of a place in the tiles' order; -1 where no tile has it.
static inline int64_t slot_at(const int32_t *tiles, int64_t num_tiles, int64_t place) {
    for (int64_t i = 0; i < num_tiles; i++)
        if (place >= tiles[3 * i + 1] && place < tiles[3 * i + 1] + tiles[3 * i + 2]) return tiles[3 * i];
    return -1;
}

// h[place, s, :r] = scales[slot, s] * (x[order[place]] @ a[slot, s, :r].T), r = ranks[slot, s]; h [places, slices,
// max_rank], a [slots, slices, max_rank, size]. Returns 0, or 1 where memory for a row was refused.
int softprompt_lora_shrink_rows(float *h, const void *x, const float *a, const float *scales, const int32_t *ranks,
                                const int64_t *order, const int32_t *tiles, int64_t num_tiles, int64_t places,
                                int64_t slices, int64_t max_rank, int64_t size, int64_t x_row, int dtype,
                                int num_threads) {
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && places * slices * size * WIDTH > PARALLEL_WORK)
    {
        float *row = malloc((size_t)size * sizeof(float));
        if (!row) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < places * slices; task++) {
            const int64_t place = task / slices, slice = task % slices, slot = slot_at(tiles, num_tiles, place);
            const int64_t at = slot * slices + slice, rank = slot < 0 ? 0 : ranks[at];
            if (!row || !rank) continue;
            load(row, x, order[place] * x_row, (int)size, dtype);
            for (int64_t r = 0; r < rank; r += WIDTH) {
                const int64_t count = rank - r < WIDTH ? rank - r : WIDTH;
                const vec sums = dots(row, a + (at * max_rank + r) * size, size, count, size) * scales[at];
                memcpy(h + task * max_rank + r, &sums, (size_t)count * sizeof(float));
            }
        }
        free(row);
    }
    return failed;
}

// out[order[place], columns of s] += h[place, s, :r] @ b[slot, columns of s, :r].T; b [slots, width, max_rank].
void softprompt_lora_expand_rows(void *out, const float *h, const float *b, const int32_t *ranks, const int32_t *starts,
                                 const int64_t *order, const int32_t *tiles, int64_t num_tiles, int64_t places,
                                 int64_t slices, int64_t max_rank, int64_t out_row, int dtype, int num_threads) {
    const int64_t width = starts[slices];
#pragma omp parallel for schedule(static) num_threads(num_threads) \
    if (num_threads > 1 && places * width * WIDTH > PARALLEL_WORK)
    for (int64_t task = 0; task < places * slices; task++) {
        const int64_t place = task / slices, slice = task % slices, slot = slot_at(tiles, num_tiles, place);
        const int64_t rank = slot < 0 ? 0 : ranks[slot * slices + slice];
        for (int64_t column = starts[slice]; rank && column < starts[slice + 1]; column += WIDTH) {
            const int64_t left = starts[slice + 1] - column, count = left < WIDTH ? left : WIDTH;
            const int64_t to = order[place] * out_row + column;
            vec sums = dots(h + task * max_rank, b + (slot * width + column) * max_rank, max_rank, count, rank), held;
            load((float *)&held, out, to, (int)count, dtype);
            held += sums;
            store(out, to, (float *)&held, (int)count, dtype);
        }
    }
}
