// Attention of decode.h to keys and values in bfloat16: widened, and in pairs where the processor multiplies those.

#include "decode.h"

#ifdef __AVX512BF16__
#include "tile.h"
#endif

int softprompt_attend_bfloat16(const Head *head, vec *out, const vec *q, float *scores, Start start, int first, int length,
                              int64_t padded, int heads, int vectors, float scale, float softcap) {
    return attend_some(head, out, q, scores, start, first, length, padded, heads, vectors, BFLOAT16, scale, softcap);
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
        const int count = take_rows(rows, next, head, keys, first + begin, length - begin, BFLOAT16);
        for (int j = count; j < WIDTH; j++) rows[j] = rows[count - 1];  // what is past the end must be finite
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
        const int count = take_rows(rows, next, head, values, first + begin, length - begin, BFLOAT16);
        if (count < WIDTH) rows[count] = rows[count - 1];
        for (int j = 0; j < count; j += 2) {
            __m512bh pairs[MAX_HEADS];
            for (int g = 0; g < heads; g++) pairs[g] = pair_at(weights + g * padded + begin + j);
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

int softprompt_attend_pairs(const Head *head, vec *out, const uint16_t *q, int64_t q_head_stride, float *scores,
                            uint16_t *weights, Start start, int first, int length, int64_t padded, int heads, float scale,
                            float softcap) {
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

int softprompt_attend_pairs(const Head *head, vec *out, const uint16_t *q, int64_t q_head_stride, float *scores,
                            uint16_t *weights, Start start, int first, int length, int64_t padded, int heads, float scale,
                            float softcap) {
    return 0;
}

#endif
