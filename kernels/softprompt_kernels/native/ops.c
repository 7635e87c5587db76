// CPU kernels: what torch can only do in many small operations, each with its own dispatch and its own copy.
// Plain C for any compiler with OpenMP; the compiler vectorises the inner loops. Sums and softmax in float32.
// Bounds, shapes and dtypes are the caller's duty: see __init__.py.

#include "native.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { MAX_VECTORS = 256 / WIDTH, MAX_HEADS = 4 };

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

// e^x for x <= 0.
static inline float exp_of_negative(float x) { return exp_within(x < -87.0f ? -87.0f : x); }

// A head is padded with zeros to whole vectors.
typedef float vec __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4), may_alias));
typedef uint32_t int_vec __attribute__((vector_size(WIDTH * sizeof(uint32_t))));
typedef uint16_t half_vec __attribute__((vector_size(WIDTH * sizeof(uint16_t)), aligned(2), may_alias));

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

// The elements of a vector, widened.
static inline vec load_vector(const void *from, int64_t offset, int dtype) {
    // Copied with memcpy, GCC takes a vector through memory in pieces.
    if (dtype == FLOAT32) return *(const vec *)((const float *)from + offset);
    return (vec)(__builtin_convertvector(*(const half_vec *)((const uint16_t *)from + offset), int_vec) << 16);
}

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
        int left = length - begin, count = left < WIDTH ? left : WIDTH, ahead = left - count;
        memcpy(rows, next, sizeof rows);
        if (ahead) {
            ahead = ahead < WIDTH ? ahead : WIDTH;
            find_rows(next, head, first + begin + WIDTH, ahead);
            prefetch_rows(head->keys, next, ahead, head->dim, dtype);
        }
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
        int left = length - begin, count = left < WIDTH ? left : WIDTH, ahead = left - count;
        memcpy(rows, next, sizeof rows);
        if (ahead) {
            ahead = ahead < WIDTH ? ahead : WIDTH;
            find_rows(next, head, first + begin + WIDTH, ahead);
            prefetch_rows(head->values, next, ahead, head->dim, dtype);
        }
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

#ifdef __AVX512BF16__

// The same in bfloat16 where the processor multiplies pairs of it: queries and keys as they are; then the weights,
// rounded to bfloat16, times two value rows at once. q [heads] rows of 32 * halves; out [heads][2 * halves]; weights
// like scores.
static inline __attribute__((always_inline)) void attend_pairs(
    const Head *head, vec *restrict out, const uint16_t *q, int64_t q_head_stride, float *restrict scores,
    uint16_t *restrict weights, Start start, int first, int length, int64_t padded, int heads, int halves, float scale,
    float softcap) {
    const uint16_t *keys = head->keys, *values = head->values;
    int64_t rows[WIDTH], next[WIDTH];
    find_rows(next, head, first, length < WIDTH ? length : WIDTH);
    for (int begin = 0; begin < length; begin += WIDTH) {
        int left = length - begin, count = left < WIDTH ? left : WIDTH, ahead = left - count;
        memcpy(rows, next, sizeof rows);
        for (int j = count; j < WIDTH; j++) rows[j] = rows[count - 1];  // what is past the end must be finite
        if (ahead) {
            ahead = ahead < WIDTH ? ahead : WIDTH;
            find_rows(next, head, first + begin + WIDTH, ahead);
            prefetch_rows(keys, next, ahead, head->dim, BFLOAT16);
        }
        for (int g = 0; g < heads; g++) {
            vec products[WIDTH];
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH; j++) {
                __m512 sum = _mm512_setzero_ps();
                for (int c = 0; c < halves; c++)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(keys + rows[j] + c * 2 * WIDTH),
                                           (__m512bh)_mm512_loadu_si512(q + g * q_head_stride + c * 2 * WIDTH));
                products[j] = (vec)sum;
            }
            vec dots = sum_lanes(products) * scale;
            memcpy(scores + g * padded + begin, &dots, sizeof dots);
        }
    }
    float rests[MAX_HEADS];
    for (int g = 0; g < heads; g++) {
        rests[g] = softmax(scores + g * padded, length, seen_by(&start, g), softcap);
        for (int j = length; j < (length + WIDTH - 1) / WIDTH * WIDTH; j++) scores[g * padded + j] = 0;
        for (int j = 0; j < length; j += WIDTH)
            _mm256_storeu_si256((__m256i *)(weights + g * padded + j),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(scores + g * padded + j)));
    }
    // Of a register of 32 elements in each of two rows: quarters 0 of all four lanes' pairs, then quarters 1.
    __m512 sums[MAX_HEADS][4][2];
    for (int g = 0; g < heads; g++)
        for (int c = 0; c < halves; c++) sums[g][c][0] = sums[g][c][1] = _mm512_setzero_ps();
    find_rows(next, head, first, length < WIDTH ? length : WIDTH);
    for (int begin = 0; begin < length; begin += WIDTH) {
        int left = length - begin, count = left < WIDTH ? left : WIDTH, ahead = left - count;
        memcpy(rows, next, sizeof rows);
        if (count < WIDTH) rows[count] = rows[count - 1];
        if (ahead) {
            ahead = ahead < WIDTH ? ahead : WIDTH;
            find_rows(next, head, first + begin + WIDTH, ahead);
            prefetch_rows(values, next, ahead, head->dim, BFLOAT16);
        }
        for (int j = 0; j < count; j += 2) {
            __m512bh pairs[MAX_HEADS];
            for (int g = 0; g < heads; g++) {
                int32_t pair;
                memcpy(&pair, weights + g * padded + begin + j, sizeof pair);
                pairs[g] = (__m512bh)_mm512_set1_epi32(pair);
            }
            for (int c = 0; c < halves; c++) {
                __m512i one = _mm512_loadu_si512(values + rows[j] + c * 2 * WIDTH);
                __m512i other = _mm512_loadu_si512(values + rows[j + 1] + c * 2 * WIDTH);
                __m512bh low = (__m512bh)_mm512_unpacklo_epi16(one, other);
                __m512bh high = (__m512bh)_mm512_unpackhi_epi16(one, other);
                for (int g = 0; g < heads; g++) {
                    sums[g][c][0] = _mm512_dpbf16_ps(sums[g][c][0], low, pairs[g]);
                    sums[g][c][1] = _mm512_dpbf16_ps(sums[g][c][1], high, pairs[g]);
                }
            }
        }
    }
    const __m512i front = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i back = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
    for (int g = 0; g < heads; g++) {
        vec *to = out + g * halves * 2;
        for (int c = 0; c < halves; c++) {
            to[2 * c] = (vec)_mm512_permutex2var_ps(sums[g][c][0], front, sums[g][c][1]);
            to[2 * c + 1] = (vec)_mm512_permutex2var_ps(sums[g][c][0], back, sums[g][c][1]);
        }
        const float *prefix = prefix_of(&start, g);
        for (int c = 0; prefix && c < 2 * halves; c++) to[c] += load_vector(prefix, c * WIDTH, FLOAT32) * rests[g];
    }
}

// As many of the heads as fit the registers; how many that were, or 0 for a dimension that it does not know.
static int attend_some_pairs(const Head *head, vec *out, const uint16_t *q, int64_t q_head_stride, float *scores,
                             uint16_t *weights, Start start, int first, int length, int64_t padded, int heads,
                             float scale, float softcap) {
#define ATTEND_PAIRS(HEADS, HALVES)                                                                               \
    do {                                                                                                          \
        attend_pairs(head, out, q, q_head_stride, scores, weights, start, first, length, padded, HEADS, HALVES,   \
                     scale, softcap);                                                                             \
        return HEADS;                                                                                             \
    } while (0)
    if (head->dim == 64 && heads >= 4) ATTEND_PAIRS(4, 2);
    if (head->dim == 64 && heads == 3) ATTEND_PAIRS(3, 2);
    if (head->dim == 64 && heads == 2) ATTEND_PAIRS(2, 2);
    if (head->dim == 64) ATTEND_PAIRS(1, 2);
    if (head->dim == 128 && heads >= 2) ATTEND_PAIRS(2, 4);
    if (head->dim == 128) ATTEND_PAIRS(1, 4);
    return 0;
}

#else

static int attend_some_pairs(const Head *head, vec *out, const uint16_t *q, int64_t q_head_stride, float *scores,
                             uint16_t *weights, Start start, int first, int length, int64_t padded, int heads,
                             float scale, float softcap) {
    return 0;
}

#endif

// n queries, each by itself. q is read and out written at rows[i]; it sees the first ends[i] positions of sequence
// sequences[i]. Unless `starts` is NULL, those before starts[i] are in `prefix` [rows, num_heads, dim + LANES] already.
// Returns 0, or 1 where memory for the scores was refused.
int softprompt_paged_decode(
    void *out, const void *q, const void *keys, const void *values, const int32_t *page_table,
    const int32_t *ends, const int32_t *rows, const int32_t *sequences, const float *sinks,
    const int32_t *starts, const float *prefix, int64_t n, int64_t table_width, int64_t q_row_stride,
    int64_t q_head_stride, int num_heads, int num_kv_heads, int dim, int page_size, int dtype, int window, float scale,
    float softcap, int num_threads) {
    int group = num_heads / num_kv_heads, vectors = (dim + WIDTH - 1) / WIDTH, longest = 0, failed = 0;
    int64_t work = 0;
    for (int64_t i = 0; i < n; i++) {
        int context = ends[i] - (starts ? starts[i] : 0);
        int length = window > 0 && window < context ? window : context;
        longest = length > longest ? length : longest;
        work += (int64_t)length * num_heads * dim;
    }
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && work > PARALLEL_WORK)
    {
        // The last tile's scores may reach past the longest length.
        int64_t padded = (int64_t)(longest + WIDTH - 1) / WIDTH * WIDTH;
        size_t score_bytes = (size_t)padded * (sizeof(float) + sizeof(uint16_t));
        vec *buffer = malloc((size_t)group * (2 * (size_t)vectors * sizeof(vec) + score_bytes));
        if (!buffer) {
#pragma omp atomic write
            failed = 1;
        }
        // With enough sequences, a thread takes all heads of one: their rows lie side by side.
        int together = n >= 4 * num_threads ? num_kv_heads : 1;
#pragma omp for schedule(dynamic, together)
        for (int64_t task = 0; task < n * num_kv_heads; task++) {
            if (!buffer) continue;
            int64_t i = task / num_kv_heads;
            int kv_head = (int)(task % num_kv_heads), end = ends[i];
            int first = window > 0 && window < end ? end - window : starts ? starts[i] : 0;
            vec *queries = buffer, *answer = queries + group * vectors;
            float *scores = (float *)(answer + group * vectors);
            uint16_t *weights = (uint16_t *)(scores + group * padded);
            for (int g = 0; g < group; g++)
                load_padded(queries + g * vectors, q,
                            rows[i] * q_row_stride + (kv_head * group + g) * q_head_stride, dim, vectors, dtype);
            Head head = {keys, values, page_table + sequences[i] * table_width, (int64_t)num_kv_heads * dim,
                         (int64_t)kv_head * dim, page_size, dtype, dim};
            const float *sink = sinks ? sinks + kv_head * group : NULL, *before = NULL;
            if (starts && starts[i]) before = prefix + (rows[i] * num_heads + kv_head * group) * (int64_t)(dim + LANES);
            // Numbers known to the compiler keep the sums in registers; so many heads at a time as fit there.
            for (int g = 0, count; g < group; g += count) {
                count = group - g;
                Start start = {sink ? sink + g : NULL, before, dim};
                start.prefix = prefix_of(&start, g);
                if (dtype == BFLOAT16) {
                    const int64_t at = rows[i] * q_row_stride + (kv_head * group + g) * q_head_stride;
                    const int done = attend_some_pairs(
                        &head, answer + g * vectors, (const uint16_t *)q + at, q_head_stride, scores + g * padded,
                        weights + g * padded, start, first, end - first, padded, count, scale, softcap);
                    if (done) {
                        count = done;
                        continue;
                    }
                }
#define ATTEND(HEADS, VECTORS, DTYPE)                                                                         \
    attend(&head, answer + g * vectors, queries + g * vectors, scores + g * padded, start, first, end - first, \
           padded, HEADS, VECTORS, DTYPE, scale, softcap)
#define ATTEND_SOME(HEADS, VECTORS)                                            \
    do {                                                                       \
        count = HEADS;                                                         \
        if (dtype == FLOAT32)                                                  \
            ATTEND(HEADS, VECTORS, FLOAT32);                                   \
        else                                                                   \
            ATTEND(HEADS, VECTORS, BFLOAT16);                                  \
    } while (0)
                enum { OF_64 = 64 / WIDTH, OF_128 = 128 / WIDTH };
                if (vectors == OF_64 && count >= 4) ATTEND_SOME(4, OF_64);
                else if (vectors == OF_64 && count == 3) ATTEND_SOME(3, OF_64);
                else if (vectors == OF_64 && count == 2) ATTEND_SOME(2, OF_64);
                else if (vectors == OF_64) ATTEND_SOME(1, OF_64);
                else if (vectors == OF_128 && count >= 2) ATTEND_SOME(2, OF_128);
                else if (vectors == OF_128) ATTEND_SOME(1, OF_128);
                else ATTEND_SOME(1, vectors);
            }
            for (int g = 0; g < group; g++)
                store(out, ((int64_t)rows[i] * num_heads + kv_head * group + g) * dim,
                      (float *)(answer + g * vectors), dim, dtype);
        }
        free(buffer);
    }
    return failed;
}

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
    int64_t count = outer * inner;
    int failed = 0;
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && count * size > PARALLEL_WORK)
    {
        float *restrict h = malloc((size_t)size * 3 * sizeof(float)), *restrict w = h + size, *restrict r = w + size;
        if (!h) {
#pragma omp atomic write
            failed = 1;
        } else {
            load(w, weight, 0, (int)size, dtype);
            if (unit_offset)
                for (int64_t i = 0; i < size; i++) w[i] += 1;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count; row++) {
            if (!h) continue;
            load(h, from.data, row_offset(&from, row, inner), (int)size, dtype);
            if (residual) {
                load(r, plus.data, row_offset(&plus, row, inner), (int)size, dtype);
                for (int64_t i = 0; i < size; i++) h[i] += r[i];
                store(sum, row * size, h, (int)size, dtype);
                load(h, sum, row * size, (int)size, dtype);
            }
            float squares = 0;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < size; i++) squares += h[i] * h[i];
            float scale = 1 / sqrtf(squares / (float)size + eps);
            for (int64_t i = 0; i < size; i++) h[i] = h[i] * scale * w[i];
            store(out, row * size, h, (int)size, dtype);
        }
        free(h);
    }
    return failed;
}

static inline void rotate(void *out, const void *x, int64_t to, int64_t from, const float *restrict cosine,
                          const float *restrict sine, int half, int dtype) {
    float first[MAX_VECTORS * WIDTH / 2], second[MAX_VECTORS * WIDTH / 2], turned[MAX_VECTORS * WIDTH];
    load(first, x, from, half, dtype);
    load(second, x, from + half, half, dtype);
    for (int d = 0; d < half; d++) {
        turned[d] = first[d] * cosine[d] - second[d] * sine[d];
        turned[half + d] = second[d] * cosine[half + d] + first[d] * sine[half + d];
    }
    store(out, to, turned, 2 * half, dtype);
}

// Half-split rotary embedding of q [n, num_heads, dim] and k [n, num_kv_heads, dim] by tables [n, dim].
void softprompt_rope(
    void *q_out, void *k_out, const void *q, const void *k, const void *cosines, const void *sines, int64_t n,
    int64_t q_row_stride, int64_t q_head_stride, int64_t k_row_stride, int64_t k_head_stride, int64_t cos_stride,
    int64_t sin_stride, int num_heads, int num_kv_heads, int dim, int dtype, int table_dtype, int num_threads) {
    int64_t work = n * (num_heads + num_kv_heads) * dim;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && work > PARALLEL_WORK)
    for (int64_t t = 0; t < n; t++) {
        float cosine[MAX_VECTORS * WIDTH], sine[MAX_VECTORS * WIDTH];
        load(cosine, cosines, t * cos_stride, dim, table_dtype);
        load(sine, sines, t * sin_stride, dim, table_dtype);
        for (int h = 0; h < num_heads; h++)
            rotate(q_out, q, (t * num_heads + h) * dim, t * q_row_stride + h * q_head_stride, cosine, sine, dim / 2,
                   dtype);
        for (int h = 0; h < num_kv_heads; h++)
            rotate(k_out, k, (t * num_kv_heads + h) * dim, t * k_row_stride + h * k_head_stride, cosine, sine,
                   dim / 2, dtype);
    }
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
        if (is_nan || !isfinite(best)) {
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
