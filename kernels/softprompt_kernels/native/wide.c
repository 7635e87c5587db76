// Products in float32 with weights that are kept in bfloat16, where that loses nothing: half the bytes to read, and the
// same sums. For processors that add products of 8 or 16 floats in one instruction; elsewhere `softprompt_has_wide` says
// no, and oneDNN does it.
//
// Each sum is made of the sums of CUT inputs, all in the order of the inputs, however many rows there are and however they
// are cut: a single sum of all products would be off by two or three times as much.

#include "lora.h"
#include "team.h"
#include "wide.h"

#ifdef SOFTPROMPT_HAS_WIDE

enum { FEW_ROWS = 2 * MAX_ROWS, BLOCK_ROWS = 240 };
enum { IDENTITY = 0, SILU = 1, GELU_TANH = 2 };

int softprompt_has_wide(void) { return 1; }

static void some_rows(int64_t rows, float *sums, int first, const float *x, int64_t x_row, const void *panel,
                      int64_t size, int dtype, const uint16_t *next) {
    // Asked here, `next` is not asked for at each step of the loop; left to GCC, that made one copy of it move all sums about.
    switch (rows) {
#define CASE(n)                                                                                   \
    case n:                                                                                       \
        if (dtype == FLOAT32) multiply(n, LANES, sums, first, x, x_row, panel, size, FLOAT32, 0); \
        else if (next) multiply(n, LANES, sums, first, x, x_row, panel, size, BFLOAT16, next);    \
        else multiply(n, LANES, sums, first, x, x_row, panel, size, BFLOAT16, 0);                 \
        break;
        FOR_ROWS(CASE)
#undef CASE
    }
}

// sums [rows][LANES] = x times one panel, in blocks of rows.
static void product(float *sums, const float *x, int64_t x_row, int64_t rows, const uint16_t *panel, int64_t size,
                    const uint16_t *next) {
    const int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    vec wide[CUT * PARTS] __attribute__((aligned(64)));
    // Few rows read the panel as it lies; for many, each part of it is widened once.
    const int is_few = rows <= FEW_ROWS;
    for (int64_t k = 0; k < size; k += CUT) {
        const int64_t length = size - k < CUT ? size - k : CUT;
        const uint16_t *part = panel + k * LANES;
        for (int64_t i = 0; !is_few && i < length * PARTS; i++) wide[i] = widen(part + i * WIDTH);
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = rows * block / blocks, count = rows * (block + 1) / blocks - start;
            some_rows(count, sums + start * LANES, k == 0, x + start * x_row + k, x_row,
                      is_few ? (const void *)part : wide, length, is_few ? BFLOAT16 : FLOAT32,
                      next && block == blocks - 1 ? next + k * LANES : 0);
        }
    }
}

// e^x; infinity above 88.
static inline float exp_of(float x) {
    const float within = exp_within(x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x);
    return x > 88.0f ? INFINITY : within;
}

// SiLU is x * sigmoid(x); GELU by tanh is x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
static inline void activate(float *values, int activation) {
    for (int j = 0; activation == SILU && j < LANES; j++) values[j] = values[j] / (1 + exp_of(-values[j]));
    for (int j = 0; activation == GELU_TANH && j < LANES; j++) {
        const float x = values[j], z = (x + x * x * (x * 0.044715f)) * 1.59576912f;
        values[j] = x / (1 + exp_of(-z));
    }
}

// One row of a panel, or of gate's and up's: bias, activation, gate times up, what is added.
static inline void finish(float *out, const float *addend, const float *sums, const float *up, const float *bias,
                          int64_t columns, int activation) {
    float added[LANES] = {0};
    const int64_t count = columns < LANES ? columns : LANES;
    if (addend && count < LANES) memcpy(added, addend, (size_t)count * sizeof *addend), addend = added;
    vec v[PARTS];
    for (int p = 0; p < PARTS; p++) {
        v[p] = ((const vec *)sums)[p];
        if (bias) v[p] += ((const vec *)bias)[p];
    }
    if (activation != IDENTITY) activate((float *)v, activation);
    for (int p = 0; up && p < PARTS; p++) {
        vec sum = ((const vec *)up)[p];
        if (bias) sum += ((const vec *)bias)[PARTS + p];
        v[p] *= sum;
    }
    for (int p = 0; addend && p < PARTS; p++) v[p] += ((const vec *)addend)[p];
    if (count == LANES) memcpy(out, v, sizeof v);
    else memcpy(out, v, (size_t)count * sizeof *out);
}

// Makes h of every token, see lora.h. To be called by all threads of a team.
static void shrink(const LoraRows *lora, const LoraStep *step, const float *x, int64_t x_row, int64_t size) {
    const LoraTable *table = lora->table;
    const int64_t h_row = table->num_slices * table->max_rank;
    for (Share s = lora_share_parts(table, step, size); softprompt_next(&s);) {
        const LoraPart part = lora_part(table, step, s.pass);
        const float *a = (const float *)table->a[part.at] + part.panel * size * LANES;
        for (int64_t i = 0, count; i < part.count; i += count) {
            float sums[MAX_ROWS * LANES];
            float *h = (float *)lora->h + part.rows[i] * h_row + part.column;
            count = lora_run(part.rows + i, part.count - i, MAX_ROWS);
            for (int64_t k = 0; k < size; k += CUT)
                some_rows(count, sums, k == 0, x + part.rows[i] * x_row + k, x_row, a + k * LANES,
                          size - k < CUT ? size - k : CUT, FLOAT32, 0);
            for (int64_t m = 0; m < count; m++)
                for (int j = 0; j < LANES; j++) h[m * h_row + j] = table->scales[part.at] * sums[m * LANES + j];
        }
    }
}

// Adds to the sums of so many rows in one panel, [count][LANES], what their LoRAs add.
static void expand(float *sums, const LoraRows *lora, int64_t first, int64_t count, int64_t panel) {
    const LoraTable *table = lora->table;
    const int64_t slice = table->slices[panel], h_row = table->num_slices * table->max_rank;
    for (int64_t i = 0, n; i < count; i += n) {
        const int32_t slot = lora->slots[first + i];
        n = lora_share(lora, first + i, count - i < MAX_ROWS ? count - i : MAX_ROWS);
        const int64_t at = slot * table->num_slices + slice;
        if (slot < 0 || !table->ranks[at]) continue;
        const int64_t rank = table->ranks[at];
        const float *h = (const float *)lora->h + (first + i) * h_row + slice * table->max_rank;
        const float *b = (const float *)table->b[at] + table->places[panel] * rank * LANES;
        some_rows(n, sums + i * LANES, 0, h, h_row, b, rank, FLOAT32, 0);
    }
}

// out [rows, columns] = act(x [rows, size] @ w.T + bias) + addend (like out, or NULL); gated: act(x @ gate.T + bias) *
// (x @ up.T + bias), where gate's and up's panels take turns. The weights are [panels][size][LANES] in bfloat16; their
// columns, and the bias, are padded to whole panels. `table`, `step`, `h` and what it returns: as of softprompt_linear.
int softprompt_wide_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                           int64_t rows, int64_t x_row, int64_t columns, int64_t size, int activation, int gated,
                           const LoraTable *table, const LoraStep *step, void *h, int num_threads) {
    const int64_t panels = (columns + LANES - 1) / LANES, each = gated ? 2 : 1, whole = size * LANES;
    const int64_t work = rows * panels * each * whole;
    if (num_threads) {
        LoraStep all;
        const size_t room = softprompt_lora_room(table, step, rows, sizeof(float));
        if (softprompt_lora_prepare(&all, &step, rows, &h, room)) return 1;
        TOGETHER(num_threads, work, 2,
                 softprompt_wide_linear(out, x, weights, bias, addend, rows, x_row, columns, size, activation, gated,
                                        table, step, h, 0));
    }
    const LoraRows lora = softprompt_lora_rows(table, step, h);
    if (lora.h) shrink(&lora, step, x, x_row, size);
    for (Share s = softprompt_share(panels, work); softprompt_next(&s);) {
        const int64_t panel = s.pass;
        float sums[2][BLOCK_ROWS * LANES];
        const uint16_t *mine = (const uint16_t *)weights + panel * each * whole;
        for (int64_t start = 0; start < rows; start += BLOCK_ROWS) {
            const int64_t count = rows - start < BLOCK_ROWS ? rows - start : BLOCK_ROWS;
            for (int64_t part = 0; part < each; part++) {
                const int is_last = panel + 1 == panels && part + 1 == each;
                product(sums[part], (const float *)x + start * x_row, x_row, count, mine + part * whole, size,
                        is_last ? 0 : mine + (part + 1) * whole);
                if (lora.h) expand(sums[part], &lora, start, count, panel * each + part);
            }
            for (int64_t m = 0; m < count; m++) {
                const int64_t place = (start + m) * columns + panel * LANES;
                finish((float *)out + place, addend ? (const float *)addend + place : 0, sums[0] + m * LANES,
                       gated ? sums[1] + m * LANES : 0, bias ? bias + panel * each * LANES : 0, columns - panel * LANES,
                       activation);
            }
        }
    }
    return 0;
}

#else

int softprompt_has_wide(void) { return 0; }

int softprompt_wide_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                           int64_t rows, int64_t x_row, int64_t columns, int64_t size, int activation, int gated,
                           const LoraTable *table, const LoraStep *step, void *h, int num_threads) {
    return 0;
}

#endif
