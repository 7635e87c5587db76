// Attention of single queries to the pages of their sequences: of every decode, and of queries that no kernel takes together.

#include "decode.h"
#include "team.h"

// n queries, each by itself. q is read and out written at rows[i]; it sees the first ends[i] positions of sequence
// sequences[i]. Unless `starts` is NULL, those before starts[i] are in `prefix` [rows, num_heads, dim + LANES] already.
// Returns 0, or 1 where memory was refused.
int softprompt_paged_decode(
    void *out, const void *q, const void *keys, const void *values, const int32_t *page_table,
    const int32_t *ends, const int32_t *rows, const int32_t *sequences, const float *sinks,
    const int32_t *starts, const float *prefix, int64_t n, int64_t table_width, int64_t q_row_stride,
    int64_t q_head_stride, int num_heads, int num_kv_heads, int dim, int page_size, int dtype, int window, float scale,
    float softcap, int num_threads) {
    int group = num_heads / num_kv_heads, vectors = (dim + WIDTH - 1) / WIDTH, longest = 0;
    int64_t work = 0;
    for (int64_t i = 0; i < n; i++) {
        int context = ends[i] - (starts ? starts[i] : 0);
        int length = window > 0 && window < context ? window : context;
        longest = length > longest ? length : longest;
        work += (int64_t)length * num_heads * dim;
    }
    if (num_threads)
        TOGETHER(num_threads, work, 1,
                 softprompt_paged_decode(out, q, keys, values, page_table, ends, rows, sequences, sinks, starts, prefix, n,
                                         table_width, q_row_stride, q_head_stride, num_heads, num_kv_heads, dim,
                                         page_size, dtype, window, scale, softcap, 0));
    // The last tile's scores may reach past the longest length.
    int64_t padded = (int64_t)(longest + WIDTH - 1) / WIDTH * WIDTH;
    size_t score_bytes = (size_t)padded * (sizeof(float) + sizeof(uint16_t));
    static _Thread_local Kept kept;
    vec *queries = softprompt_keep(&kept, (size_t)group * (2 * (size_t)vectors * sizeof(vec) + score_bytes));
    if (!queries) return 1;
    vec *answer = queries + group * vectors;
    float *scores = (float *)(answer + group * vectors);
    uint16_t *weights = (uint16_t *)(scores + group * padded);
    for (Share s = softprompt_share(n * num_kv_heads, work); softprompt_next(&s);) {
        int64_t i = s.pass / num_kv_heads;
        int kv_head = (int)(s.pass % num_kv_heads), end = ends[i];
        int first = window > 0 && window < end ? end - window : starts ? starts[i] : 0;
        for (int g = 0; g < group; g++)
            load_padded(queries + g * vectors, q, rows[i] * q_row_stride + (kv_head * group + g) * q_head_stride, dim,
                        vectors, dtype);
        Head head = {keys, values, page_table + sequences[i] * table_width, (int64_t)num_kv_heads * dim,
                     (int64_t)kv_head * dim, page_size, dtype, dim};
        const float *sink = sinks ? sinks + kv_head * group : NULL, *before = NULL;
        if (starts && starts[i]) before = prefix + (rows[i] * num_heads + kv_head * group) * (int64_t)(dim + LANES);
        for (int g = 0, count; g < group; g += count) {
            Start start = {sink ? sink + g : NULL, before, dim};
            start.prefix = prefix_of(&start, g);
            count = 0;
            if (dtype == BFLOAT16)
                count = softprompt_attend_pairs(
                    &head, answer + g * vectors,
                    (const uint16_t *)q + rows[i] * q_row_stride + (kv_head * group + g) * q_head_stride, q_head_stride,
                    scores + g * padded, weights + g * padded, start, first, end - first, padded, group - g, scale,
                    softcap);
            if (!count) {
                AttendSome *some = dtype == FLOAT32 ? softprompt_attend_float32 : softprompt_attend_bfloat16;
                count = some(&head, answer + g * vectors, queries + g * vectors, scores + g * padded, start, first,
                             end - first, padded, group - g, vectors, scale, softcap);
            }
        }
        for (int g = 0; g < group; g++)
            store(out, ((int64_t)rows[i] * num_heads + kv_head * group + g) * dim, (float *)(answer + g * vectors), dim,
                  dtype);
    }
    return 0;
}
