// LoRA within products over packed weights: for linear.c and wide.c.
//
// h = scale * (a @ x) of every token is made before the product; b @ h joins its sums before they are rounded.
// Both are made for each token by itself, so its answer is the same in every batch.

#ifndef SOFTPROMPT_LORA_H
#define SOFTPROMPT_LORA_H

#include "team.h"

// The tokens of one product. Without a LoRA among them that changes it, h is NULL.
typedef struct {
    const LoraTable *table;
    const int32_t *slots;  // of each row; -1: none
    void *h;               // [rows][slices][max_rank], of the product's dtype
} LoraRows;

// `h` has room as softprompt_lora_room says. Table and step may be NULL: no token has a LoRA.
LoraRows softprompt_lora_rows(const LoraTable *table, const LoraStep *step, void *h);

// Bytes of h for one product, in whole cache lines.
size_t softprompt_lora_room(const LoraTable *table, const LoraStep *step, int64_t rows, int64_t item_bytes);

// Has `step`, unless NULL, be `whole`, a copy that knows the slots of `rows` rows, and `h` have so much room. Both are this
// thread's, until it is called again. Returns 0, or 1 where memory was refused.
int softprompt_lora_prepare(LoraStep *whole, const LoraStep **step, int64_t rows, void **h, size_t room);

// Makes h in bfloat16. To be called by all threads of a team; it is there for all of them when they return.
void softprompt_lora_shrink(const LoraRows *lora, const LoraStep *step, const uint16_t *x, int64_t x_row,
                            int64_t pairs);

// Adds to the sums of so many rows in two panels, [count][2 * LANES], what their LoRAs add, h in bfloat16.
void softprompt_lora_add(float *sums, const LoraRows *lora, int64_t first, int64_t count, int64_t panel);

// What of h one thread makes at a time: of the rows of a tile, the values from `column` on that one panel of a slot's
// matrix gives.
typedef struct {
    const int64_t *rows;
    int64_t count, at, panel, column;  // at: of the slot's matrix for the slice, in the tables
} LoraPart;

static inline int64_t lora_num_parts(const LoraTable *table, const LoraStep *step) {
    return step->num_tiles * table->num_slices * (table->max_rank / LANES);
}

// The parts, shared by a team; `size` is that of a token.
static inline Share lora_share_parts(const LoraTable *table, const LoraStep *step, int64_t size) {
    int64_t rows = 0;
    for (int64_t i = 0; i < step->num_tiles; i++) rows += step->tiles[3 * i + 2];
    return softprompt_share(lora_num_parts(table, step), rows * table->num_slices * table->max_rank * size);
}

// Part `index`; count 0 where the slot's rank is lower.
static inline LoraPart lora_part(const LoraTable *table, const LoraStep *step, int64_t index) {
    const int64_t slices = table->num_slices, panels = table->max_rank / LANES;
    const int32_t *tile = step->tiles + index / (slices * panels) * 3;
    const int64_t slice = index / panels % slices, panel = index % panels, at = tile[0] * slices + slice;
    return (LoraPart){.rows = step->order + tile[1],
                      .count = panel * LANES < table->ranks[at] ? tile[2] : 0,
                      .at = at,
                      .panel = panel,
                      .column = slice * table->max_rank + panel * LANES};
}

// How many of these rows follow one another in the batch, `most` at most.
static inline int64_t lora_run(const int64_t *rows, int64_t count, int64_t most) {
    int64_t n = 1;
    while (n < count && n < most && rows[n] == rows[0] + n) n++;
    return n;
}

// How many rows from `row` on use one slot, `most` at most.
static inline int64_t lora_share(const LoraRows *lora, int64_t row, int64_t most) {
    int64_t n = 1;
    while (n < most && lora->slots[row + n] == lora->slots[row]) n++;
    return n;
}

#endif
