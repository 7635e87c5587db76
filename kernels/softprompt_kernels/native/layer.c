// Decoder layers of Llama's shape, in bfloat16 or float32: one but for its attention, in a call before it and one after;
// or several in a row with their attention over pages, in one call.

#include "native.h"

typedef struct {
    const void *weight;
    float eps;
    int unit_offset;
} Norm;

typedef struct {
    const void *weights;  // packed, see linear.c, and wide.c for float32
    const float *bias;    // or NULL
    int64_t columns, size;
    const LoraTable *loras;  // or NULL: none
} Linear;

typedef struct {
    Norm before, between;
    Linear qkv, out, gated, down;
    int activation, num_heads, num_kv_heads, head_dim, dtype;
    float scale;
    int window;  // 0: none
} Layer;

// What the layers of a step have in common; see paged_attention.
typedef struct {
    const int64_t *slots;
    const int32_t *page_table;
    const int32_t *rows, *sequences, *ends;  // of queries that are answered by themselves, see softprompt_paged_decode
    const int32_t *starts;                   // positions of these that are in prefixes; or NULL
    const int64_t (*chunks)[4];              // of others: sequence, first row, row behind the last, context
    const int64_t (*prefixes)[4];            // addresses of the rows and of the pages, number of rows, positions
    float *prefix;                           // room for what prefixes give
    int64_t num_decodes, num_chunks, num_prefixes, table_width;
    int page_size;
} Step;

static inline int64_t item_bytes(const Layer *layer) { return layer->dtype == FLOAT32 ? 4 : 2; }

static int norm(void *out, const void *x, const Norm *n, int64_t rows, int64_t size, int dtype, int num_threads) {
    return softprompt_rms_norm(out, 0, x, 0, n->weight, 1, rows, size, rows * size, size, 0, 0, dtype, n->unit_offset,
                               n->eps, num_threads);
}

static int product(void *out, const void *x, const Linear *l, const void *addend, int64_t rows, int activation,
                   int gated, int dtype, const LoraStep *step, int num_threads) {
    if (dtype == FLOAT32)
        return softprompt_wide_linear(out, x, l->weights, l->bias, addend, rows, l->size, l->columns, l->size,
                                      activation, gated, l->loras, step, num_threads);
    return softprompt_linear(out, x, l->weights, l->bias, addend, rows, l->size, l->columns, l->size / 2, activation,
                             gated, l->loras, step, num_threads);
}

// From hidden [rows, hidden]: norm, q/k/v in qkv [rows, heads + 2 * kv heads, dim], q [rows, heads, dim] and
// k [rows, kv heads, dim] rotated; the values stay in qkv. `step` may be NULL: then no row has a LoRA. Returns 0, or 1
// where memory for a row was refused.
int softprompt_layer_before(const Layer *layer, void *q, void *k, void *qkv, void *normed, const void *hidden,
                            const void *cosines, const void *sines, int64_t rows, int64_t cos_stride,
                            int64_t sin_stride, int table_dtype, const LoraStep *step, int num_threads) {
    const int dtype = layer->dtype;
    if (norm(normed, hidden, &layer->before, rows, layer->qkv.size, dtype, num_threads)) return 1;
    if (product(qkv, normed, &layer->qkv, 0, rows, 0, 0, dtype, step, num_threads)) return 1;
    const char *keys = (const char *)qkv + layer->num_heads * layer->head_dim * item_bytes(layer);
    softprompt_rope(q, k, qkv, keys, cosines, sines, rows, layer->qkv.columns, layer->head_dim, layer->qkv.columns,
                    layer->head_dim, cos_stride, sin_stride, layer->num_heads, layer->num_kv_heads, layer->head_dim,
                    dtype, table_dtype, num_threads);
    return 0;
}

// out = sum + mlp(norm(sum)), sum = hidden + attended @ out.T; attended [rows, heads * dim], the rest [rows, hidden]
// but for the gate's product [rows, intermediate]. Returns as above.
int softprompt_layer_after(const Layer *layer, void *out, void *sum, void *normed, void *gated, const void *attended,
                           const void *hidden, int64_t rows, const LoraStep *step, int num_threads) {
    const int dtype = layer->dtype;
    return product(sum, attended, &layer->out, hidden, rows, 0, 0, dtype, step, num_threads) ||
           norm(normed, sum, &layer->between, rows, layer->out.columns, dtype, num_threads) ||
           product(gated, normed, &layer->gated, 0, rows, layer->activation, 1, dtype, step, num_threads) ||
           product(out, gated, &layer->down, sum, rows, 0, 0, dtype, step, num_threads);
}

// Writes the new keys and values into their pages, and attends to all of each sequence's.
static int attend(const Layer *layer, const Step *step, char *out, const char *q, void *keys, void *values,
                  const void *k, const char *qkv, int64_t rows, int num_threads) {
    const int dim = layer->head_dim, heads = layer->num_heads, kv_heads = layer->num_kv_heads;
    const int64_t q_row = (int64_t)heads * dim, bytes = item_bytes(layer);
    softprompt_kv_write(keys, values, k, qkv + (q_row + kv_heads * dim) * bytes, step->slots, rows, kv_heads * dim, dim,
                        layer->qkv.columns, dim, kv_heads, dim, (int)bytes);
    const int is_wide = layer->dtype == FLOAT32;
    int failed = 0;
    for (int64_t i = 0; i < step->num_prefixes; i++) {
        const int64_t *prefix = step->prefixes[i];
        failed |= (is_wide ? softprompt_wide_prefix : softprompt_paged_prefix)(
            step->prefix, q, keys, values, (const int32_t *)prefix[1], (const int32_t *)prefix[0], prefix[2], prefix[3],
            q_row, dim, heads, kv_heads, dim, step->page_size, layer->scale, num_threads);
    }
    if (step->num_decodes)
        failed |= softprompt_paged_decode(
            out, q, keys, values, step->page_table, step->ends, step->rows, step->sequences, 0, step->starts,
            step->prefix, step->num_decodes, step->table_width, q_row, dim, heads, kv_heads, dim, step->page_size,
            layer->dtype, layer->window, layer->scale, 0, num_threads);
    for (int64_t i = 0; i < step->num_chunks; i++) {
        const int64_t *chunk = step->chunks[i], start = chunk[1] * q_row * bytes;
        failed |= (is_wide ? softprompt_wide_chunk : softprompt_paged_chunk)(
            out + start, q + start, keys, values, step->page_table + chunk[0] * step->table_width, chunk[2] - chunk[1],
            chunk[3], q_row, dim, heads, kv_heads, dim, step->page_size, layer->window, layer->scale, num_threads);
    }
    return failed;
}

// Layers of one shape, each with its pages. `scratch` has room for, of each row, twice the queries, the keys, the
// products for them, the gate's product, and three times the hidden states. Returns as above.
int softprompt_layers(const Layer *layers, void *const *keys, void *const *values, int64_t num_layers,
                      const Step *step, void *out, char *scratch, const void *hidden, const void *cosines,
                      const void *sines, int64_t rows, int64_t cos_stride, int64_t sin_stride, int table_dtype,
                      const LoraStep *loras, int num_threads) {
    const int64_t each = rows * item_bytes(layers), width = each * layers->out.columns;
    const int64_t q_width = each * layers->num_heads * layers->head_dim;
    char *q = scratch, *attended = q + q_width, *qkv = attended + q_width;
    char *k = qkv + each * layers->qkv.columns, *normed = k + each * layers->num_kv_heads * layers->head_dim;
    char *sum = normed + width, *between = sum + width, *gated = between + width;
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
