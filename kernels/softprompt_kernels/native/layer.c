// Decoder layers of Llama's shape, in bfloat16 or float32: one but for its attention, in a call before it and one after;
// or several in a row with their attention over pages, in one call.

#include "lora.h"

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
    int64_t num_decodes, num_chunks, num_prefixes, table_width;
    int page_size;
} Step;

// As many layers have a room of their own as fit these bytes, and stay in a cache: so far may a thread be behind the others.
enum { ROOMS_BYTES = 1 << 20 };

static inline int64_t item_bytes(const Layer *layer) { return layer->dtype == FLOAT32 ? 4 : 2; }

static int norm(void *out, const void *x, const Norm *n, int64_t rows, int64_t size, int dtype) {
    return softprompt_rms_norm(out, 0, x, 0, n->weight, 1, rows, size, rows * size, size, 0, 0, dtype, n->unit_offset,
                               n->eps, 0);
}

static int product(void *out, const void *x, const Linear *l, const void *addend, int64_t rows, int activation,
                   int gated, int dtype, const LoraStep *step, void *h) {
    if (dtype == FLOAT32)
        return softprompt_wide_linear(out, x, l->weights, l->bias, addend, rows, l->size, l->columns, l->size,
                                      activation, gated, l->loras, step, h, 0);
    return softprompt_linear(out, x, l->weights, l->bias, addend, rows, l->size, l->columns, l->size / 2, activation,
                             gated, l->loras, step, h, 0);
}

static size_t lora_room(const Linear *l, const LoraStep *step, int64_t rows, const Layer *layer) {
    return softprompt_lora_room(l->loras, step, rows, item_bytes(layer));
}

static size_t lora_room_after(const Layer *layer, const LoraStep *step, int64_t rows) {
    return lora_room(&layer->out, step, rows, layer) + lora_room(&layer->gated, step, rows, layer) +
           lora_room(&layer->down, step, rows, layer);
}

// Loops of a layer but for its attention.
enum { LOOPS_BEFORE = 4, LOOPS_AFTER = 7 };

static int64_t work_of(const Layer *layer, int64_t rows) { return rows * layer->gated.columns * layer->gated.size; }

// From hidden [rows, hidden]: norm, q/k/v in qkv [rows, heads + 2 * kv heads, dim], q [rows, heads, dim] and
// k [rows, kv heads, dim] rotated; the values stay in qkv. `step` may be NULL: then no row has a LoRA. A team has room for
// its `h`. Returns 0, or 1 where memory was refused.
int softprompt_layer_before(const Layer *layer, void *q, void *k, void *qkv, void *normed, const void *hidden,
                            const void *cosines, const void *sines, int64_t rows, int64_t cos_stride,
                            int64_t sin_stride, int table_dtype, const LoraStep *step, void *h, int num_threads) {
    if (num_threads) {
        LoraStep whole;
        if (softprompt_lora_prepare(&whole, &step, rows, &h, lora_room(&layer->qkv, step, rows, layer))) return 1;
        TOGETHER(num_threads, work_of(layer, rows), LOOPS_BEFORE,
                 softprompt_layer_before(layer, q, k, qkv, normed, hidden, cosines, sines, rows, cos_stride, sin_stride,
                                         table_dtype, step, h, 0));
    }
    const int dtype = layer->dtype;
    const char *keys = (const char *)qkv + layer->num_heads * layer->head_dim * item_bytes(layer);
    return norm(normed, hidden, &layer->before, rows, layer->qkv.size, dtype) ||
           product(qkv, normed, &layer->qkv, 0, rows, 0, 0, dtype, step, h) ||
           softprompt_rope(q, k, qkv, keys, cosines, sines, rows, layer->qkv.columns, layer->head_dim,
                           layer->qkv.columns, layer->head_dim, cos_stride, sin_stride, layer->num_heads,
                           layer->num_kv_heads, layer->head_dim, dtype, table_dtype, 0);
}

// out = sum + mlp(norm(sum)), sum = hidden + attended @ out.T; attended [rows, heads * dim], the rest [rows, hidden]
// but for the gate's product [rows, intermediate]. As above.
int softprompt_layer_after(const Layer *layer, void *out, void *sum, void *normed, void *gated, const void *attended,
                           const void *hidden, int64_t rows, const LoraStep *step, void *h, int num_threads) {
    if (num_threads) {
        LoraStep whole;
        if (softprompt_lora_prepare(&whole, &step, rows, &h, lora_room_after(layer, step, rows))) return 1;
        TOGETHER(num_threads, work_of(layer, rows), LOOPS_AFTER,
                 softprompt_layer_after(layer, out, sum, normed, gated, attended, hidden, rows, step, h, 0));
    }
    const int dtype = layer->dtype;
    char *h_of_gated = (char *)h + lora_room(&layer->out, step, rows, layer);
    char *h_of_down = h_of_gated + lora_room(&layer->gated, step, rows, layer);
    return product(sum, attended, &layer->out, hidden, rows, 0, 0, dtype, step, h) ||
           norm(normed, sum, &layer->between, rows, layer->out.columns, dtype) ||
           product(gated, normed, &layer->gated, 0, rows, layer->activation, 1, dtype, step, h_of_gated) ||
           product(out, gated, &layer->down, sum, rows, 0, 0, dtype, step, h_of_down);
}

// What a layer writes but for its pages and its answer.
typedef struct {
    char *q, *k, *qkv, *normed, *attended, *normed_sum, *sum, *gated, *h_before, *h_after;
    float *prefix;
} Room;

// A room in memory, which may be NULL; its bytes.
static size_t lay_out(Room *room, char *memory, const Layer *layer, const Step *step, int64_t rows,
                      const LoraStep *loras) {
    const size_t each = (size_t)rows * item_bytes(layer), heads = (size_t)layer->num_heads * layer->head_dim;
    const size_t prefix = (size_t)rows * layer->num_heads * (layer->head_dim + LANES) * sizeof(float);
    char *prefixes;
    struct {
        char **place;
        size_t bytes;
    } parts[] = {{&room->q, each * heads},
                 {&room->k, each * layer->num_kv_heads * layer->head_dim},
                 {&room->qkv, each * layer->qkv.columns},
                 {&room->normed, each * layer->qkv.size},
                 {&room->attended, each * heads},
                 {&room->normed_sum, each * layer->out.columns},
                 {&room->sum, each * layer->out.columns},
                 {&room->gated, each * layer->gated.columns},
                 {&room->h_before, lora_room(&layer->qkv, loras, rows, layer)},
                 {&room->h_after, lora_room_after(layer, loras, rows)},
                 {&prefixes, step->num_prefixes ? prefix : 0}};
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        *parts[i].place = memory + bytes;
        bytes += whole_lines(parts[i].bytes);
    }
    room->prefix = (float *)prefixes;
    return bytes;
}

// Layers of one shape, each with its pages, and what they have in common.
typedef struct {
    const Layer *layers;
    void *const *keys, *const *values;
    int64_t num_layers, num_rooms;
    size_t room_bytes, answer_bytes;
    char *rooms, *answers;
    const Step *step;
    void *out;
    const void *hidden, *cosines, *sines;
    int64_t rows, cos_stride, sin_stride;
    int table_dtype;
    const LoraStep *loras;
} Layers;

// Loops of a layer's attention: its write, and those of attend().
static int64_t loops_of_attention(const Step *step) { return 2 + step->num_prefixes + step->num_chunks; }

// Writes the new keys and values into their pages, and attends to all of each sequence's.
static int attend(const Layers *all, int64_t index, const Room *room) {
    const Layer *layer = all->layers + index;
    const Step *step = all->step;
    void *keys = all->keys[index], *values = all->values[index];
    const int dim = layer->head_dim, heads = layer->num_heads, kv_heads = layer->num_kv_heads;
    const int64_t q_row = (int64_t)heads * dim, kv_row = (int64_t)kv_heads * dim, bytes = item_bytes(layer);
    for (Share s = softprompt_share(all->rows, 2 * all->rows * kv_row); softprompt_next(&s);)
        softprompt_kv_write(keys, values, room->k + s.pass * kv_row * bytes,
                            room->qkv + (s.pass * layer->qkv.columns + q_row + kv_row) * bytes, step->slots + s.pass, 1, 0,
                            dim, 0, dim, kv_heads, dim, (int)bytes);
    const int is_wide = layer->dtype == FLOAT32;
    for (int64_t i = 0; i < step->num_prefixes; i++) {
        const int64_t *prefix = step->prefixes[i];
        if ((is_wide ? softprompt_wide_prefix : softprompt_paged_prefix)(
                room->prefix, room->q, keys, values, (const int32_t *)prefix[1], (const int32_t *)prefix[0], prefix[2],
                prefix[3], q_row, dim, heads, kv_heads, dim, step->page_size, layer->scale, 0))
            return 1;
    }
    if (step->num_decodes &&
        softprompt_paged_decode(room->attended, room->q, keys, values, step->page_table, step->ends, step->rows,
                                step->sequences, 0, step->starts, room->prefix, step->num_decodes, step->table_width,
                                q_row, dim, heads, kv_heads, dim, step->page_size, layer->dtype, layer->window,
                                layer->scale, 0, 0))
        return 1;
    for (int64_t i = 0; i < step->num_chunks; i++) {
        const int64_t *chunk = step->chunks[i], start = chunk[1] * q_row * bytes;
        if ((is_wide ? softprompt_wide_chunk : softprompt_paged_chunk)(
                room->attended + start, room->q + start, keys, values, step->page_table + chunk[0] * step->table_width,
                chunk[2] - chunk[1], chunk[3], q_row, dim, heads, kv_heads, dim, step->page_size, layer->window,
                layer->scale, 0))
            return 1;
    }
    return 0;
}

static int run(const Layers *all) {
    const void *hidden = all->hidden;
    // A layer reads the answer of the one before, so one more is kept than there are rooms.
    for (int64_t i = 0; i < all->num_layers; i++) {
        const Layer *layer = all->layers + i;
        Room room;
        lay_out(&room, all->rooms + i % all->num_rooms * all->room_bytes, layer, all->step, all->rows, all->loras);
        void *out = i + 1 < all->num_layers ? all->answers + i % (all->num_rooms + 1) * all->answer_bytes : all->out;
        softprompt_begin_stage(i + 1, all->num_rooms);
        if (softprompt_layer_before(layer, room.q, room.k, room.qkv, room.normed, hidden, all->cosines, all->sines,
                                    all->rows, all->cos_stride, all->sin_stride, all->table_dtype, all->loras,
                                    room.h_before, 0) ||
            attend(all, i, &room) ||
            softprompt_layer_after(layer, out, room.sum, room.normed_sum, room.gated, room.attended, hidden, all->rows,
                                   all->loras, room.h_after, 0))
            return 1;
        hidden = out;
    }
    return 0;
}

// Layers of one shape, each with its pages. Returns as above.
int softprompt_layers(const Layer *layers, void *const *keys, void *const *values, int64_t num_layers,
                      const Step *step, void *out, const void *hidden, const void *cosines, const void *sines,
                      int64_t rows, int64_t cos_stride, int64_t sin_stride, int table_dtype, const LoraStep *loras,
                      int num_threads) {
    static _Thread_local Kept kept;
    LoraStep whole;
    void *no_room;
    if (softprompt_lora_prepare(&whole, &loras, rows, &no_room, 0)) return 1;
    Layers all = {.layers = layers, .keys = keys, .values = values, .num_layers = num_layers, .step = step, .out = out,
                  .hidden = hidden, .cosines = cosines, .sines = sines, .rows = rows, .cos_stride = cos_stride,
                  .sin_stride = sin_stride, .table_dtype = table_dtype, .loras = loras};
    for (int64_t i = 0; i < num_layers; i++) {
        Room room;
        const size_t bytes = lay_out(&room, 0, layers + i, step, rows, loras);
        if (bytes > all.room_bytes) all.room_bytes = bytes;
    }
    const int64_t most = ROOMS_BYTES / all.room_bytes;
    all.num_rooms = most < 1 ? 1 : most < num_layers ? most : num_layers;
    all.answer_bytes = whole_lines((size_t)rows * layers->out.columns * item_bytes(layers));
    all.rooms = softprompt_keep(&kept, all.num_rooms * all.room_bytes + (all.num_rooms + 1) * all.answer_bytes);
    if (!all.rooms) return 1;
    all.answers = all.rooms + all.num_rooms * all.room_bytes;
    TOGETHER(num_threads, work_of(layers, rows), num_layers * (LOOPS_BEFORE + LOOPS_AFTER + loops_of_attention(step)),
             run(&all));
}
