// Attention of decode.h to keys and values in float32.

#include "decode.h"

int softprompt_attend_float32(const Head *head, vec *out, const vec *q, float *scores, Start start, int first, int length,
                              int64_t padded, int heads, int vectors, float scale, float softcap) {
    return attend_some(head, out, q, scores, start, first, length, padded, heads, vectors, FLOAT32, scale, softcap);
}
