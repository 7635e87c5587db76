// A decoder layer of Llama's shape but for its attention, in bfloat16: one call before it and one after.

#include "native.h"

typedef struct {
    const void *weight;
    float eps;
    int unit_offset;
} Norm;

typedef struct {
    const void *weights;  // packed, see linear.c
    const float *bias;    // or NULL
    int64_t columns, size;
    const LoraTable *loras;
} Linear;

typedef struct {
    Norm before, between;
    Linear qkv, out, gated, down;
    int activation, num_heads, num_kv_heads, head_dim;
} Layer;

static int norm(void *out, const void *x, const Norm *n, int64_t rows, int64_t size, int num_threads) {
    return softprompt_rms_norm(out, 0, x, 0, n->weight, 1, rows, size, rows * size, size, 0, 0, BFLOAT16,
                               n->unit_offset, n->eps, num_threads);
}

static int product(void *out, const void *x, const Linear *l, const void *addend, int64_t rows, int activation,
                   int gated, const LoraStep *step, int num_threads) {
    return softprompt_linear(out, x, l->weights, l->bias, addend, rows, l->size, l->columns, l->size / 2, activation,
                             gated, l->loras, step, num_threads);
}

// From hidden [rows, hidden]: norm, q/k/v in qkv [rows, heads + 2 * kv heads, dim], q [rows, heads, dim] and
// k [rows, kv heads, dim] rotated; the values stay in qkv. `step` may be NULL: then no row has a LoRA. Returns 0, or 1
// where memory for a row was refused.
int softprompt_layer_before(const Layer *layer, void *q, void *k, void *qkv, void *normed, const void *hidden,
                            const void *cosines, const void *sines, int64_t rows, int64_t cos_stride,
                            int64_t sin_stride, int table_dtype, const LoraStep *step, int num_threads) {
    if (norm(normed, hidden, &layer->before, rows, layer->qkv.size, num_threads)) return 1;
    if (product(qkv, normed, &layer->qkv, 0, rows, 0, 0, step, num_threads)) return 1;
    const uint16_t *keys = (const uint16_t *)qkv + layer->num_heads * layer->head_dim;
    softprompt_rope(q, k, qkv, keys, cosines, sines, rows, layer->qkv.columns, layer->head_dim, layer->qkv.columns,
                    layer->head_dim, cos_stride, sin_stride, layer->num_heads, layer->num_kv_heads, layer->head_dim,
                    BFLOAT16, table_dtype, num_threads);
    return 0;
}

// out = sum + mlp(norm(sum)), sum = hidden + attended @ out.T; attended [rows, heads * dim], the rest [rows, hidden]
// but for the gate's product [rows, intermediate]. Returns as above.
int softprompt_layer_after(const Layer *layer, void *out, void *sum, void *normed, void *gated, const void *attended,
                           const void *hidden, int64_t rows, const LoraStep *step, int num_threads) {
    return product(sum, attended, &layer->out, hidden, rows, 0, 0, step, num_threads) ||
           norm(normed, sum, &layer->between, rows, layer->out.columns, num_threads) ||
           product(gated, normed, &layer->gated, 0, rows, layer->activation, 1, step, num_threads) ||
           product(out, gated, &layer->down, sum, rows, 0, 0, step, num_threads);
}
