// LoRA within products over packed weights: for linear.c.
//
// h = scale * (a @ x) of every token is made before the product; b @ h joins the product's sums before they are rounded.
// Both are made for each token by itself, so its answer is the same in every batch.

#ifndef SOFTPROMPT_LORA_H
#define SOFTPROMPT_LORA_H

#include "native.h"

// The tokens of one product. Without a LoRA among them that changes it, h is NULL.
typedef struct {
    const LoraTable *table;
    int32_t *slots;  // of each row; -1: none
    uint16_t *h;     // [rows][slices][max_rank] bfloat16
} LoraRows;

// Returns 0, or 1 where memory was refused. Table and step may be NULL: then no token has a LoRA. `slots` is to be freed.
int softprompt_lora_begin(LoraRows *lora, const LoraTable *table, const LoraStep *step, int64_t rows);

// Makes h. To be called by all threads of a team; it is there for all of them when they return.
void softprompt_lora_shrink(const LoraRows *lora, const LoraStep *step, const uint16_t *x, int64_t x_row,
                            int64_t pairs);

#ifdef __AVX512BF16__
#include <immintrin.h>

// The sums of one row in one panel, with what its LoRA adds to them.
__m512 softprompt_lora_add(__m512 sums, const LoraRows *lora, int64_t row, int64_t panel);
#endif

#endif
