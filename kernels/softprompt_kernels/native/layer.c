// Decoder layers of Llama's shape in bfloat16: one but for its attention, in a call before it and one after; or several
// in a row with their attention over pages, in one call.

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
    float scale;
    int window;  // 0: none
} Layer;

// What the layers of a step have in common; see paged_attention.
typedef struct {
    const int64_t *slots;
    const int32_t *page_table, *context_lens;
    const int32_t *rows, *sequences;  // of those with one query
    const int32_t *starts;            // positions of those with one query that are in prefixes; or NULL
    const int64_t (*chunks)[4];       // of those with more: sequence, first row, row behind the last, context
    const int64_t (*prefixes)[4];     // addresses of the rows and of the pages, number of rows, positions
    float *prefix;                    // room for what prefixes give
    int64_t num_decodes, num_chunks, num_prefixes, table_width;
    int page_size;
} Step;

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

// Writes the new keys and values into their pages, and attends to all of each sequence's.
static int attend(const Layer *layer, const Step *step, void *out, const uint16_t *q, void *keys, void *values,
                  const void *k, const uint16_t *qkv, int64_t rows, int num_threads) {
    const int dim = layer->head_dim, heads = layer->num_heads, kv_heads = layer->num_kv_heads;
    const int64_t q_row = (int64_t)heads * dim;
    softprompt_kv_write(keys, values, k, qkv + q_row + kv_heads * dim, step->slots, rows, kv_heads * dim, dim,
                        layer->qkv.columns, dim, kv_heads, dim, sizeof *q);
    int failed = 0;
    for (int64_t i = 0; i < step->num_prefixes; i++) {
        const int64_t *prefix = step->prefixes[i];
        failed |= softprompt_paged_prefix(step->prefix, q, keys, values, (const int32_t *)prefix[1],
                                          (const int32_t *)prefix[0], prefix[2], prefix[3], q_row, dim, heads, kv_heads,
                                          dim, step->page_size, layer->scale, num_threads);
    }
    if (step->num_decodes)
        failed |= softprompt_paged_decode(
            out, q, keys, values, step->page_table, step->context_lens, step->rows, step->sequences, 0, step->starts,
            step->prefix, step->num_decodes, step->table_width, q_row, dim, heads, kv_heads, dim, step->page_size,
            BFLOAT16, layer->window, layer->scale, 0, num_threads);
    for (int64_t i = 0; i < step->num_chunks; i++) {
        const int64_t *chunk = step->chunks[i], start = chunk[1] * q_row;
        failed |= softprompt_paged_chunk((uint16_t *)out + start, q + start, keys, values,
                                         step->page_table + chunk[0] * step->table_width, chunk[2] - chunk[1],
                                         chunk[3], q_row, dim, heads, kv_heads, dim, step->page_size, layer->window,
                                         layer->scale, num_threads);
    }
    return failed;
}

// Layers of one shape, each with its pages. `scratch` has room for, of each row, twice the queries, the keys, the
// products for them, the gate's product, and three times the hidden states. Returns as above.
int softprompt_layers(const Layer *layers, void *const *keys, void *const *values, int64_t num_layers,
                      const Step *step, void *out, uint16_t *scratch, const void *hidden, const void *cosines,
                      const void *sines, int64_t rows, int64_t cos_stride, int64_t sin_stride, int table_dtype,
                      const LoraStep *loras, int num_threads) {
    const int64_t width = layers->out.columns, q_width = (int64_t)layers->num_heads * layers->head_dim;
    uint16_t *q = scratch, *attended = q + rows * q_width, *qkv = attended + rows * q_width;
    uint16_t *k = qkv + rows * layers->qkv.columns, *normed = k + rows * layers->num_kv_heads * layers->head_dim;
    uint16_t *sum = normed + rows * width, *between = sum + rows * width, *gated = between + rows * width;
    for (int64_t i = 0; i < num_layers; i++) {
        const Layer *layer = layers + i;
        // A layer may write where it read: by then it needs the sum alone.
        void *to = i + 1 < num_layers ? between : out;
        if (softprompt_layer_before(layer, q, k, qkv, normed, hidden, cosines, sines, rows, cos_stride, sin_stride,
                                    table_dtype, loras, num_threads))
            return 1;
        if (attend(layer, step, attended, q, keys[i], values[i], k, qkv, rows, num_threads)) return 1;
        if (softprompt_layer_after(layer, to, sum, normed, gated, attended, hidden, rows, loras, num_threads)) return 1;
        hidden = between;
    }
    return 0;
}
