// Products with bfloat16 weights that were laid out once, for processors that multiply pairs of bfloat16 themselves
// (AVX512-BF16). Elsewhere `softprompt_has_linear` says no, and oneDNN does it.
//
// Up to MAX_ROWS rows of two panels are computed in registers, or up to AMX_ROWS in the tiles of AMX where the processor
// has them, so that weights are read from memory once for so many rows, and one row's sums are made in the same order in
// every batch.

#include "native.h"

#ifndef __AVX512BF16__

int softprompt_has_linear(void) { return 0; }

int softprompt_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                      int64_t rows, int64_t x_row, int64_t columns, int64_t pairs, int activation, int gated,
                      const LoraTable *table, const LoraStep *step, void *h, int num_threads) {
    return 0;
}

#else

#include "amx.h"
#include "lora.h"
#include "team.h"
#include "tile.h"

enum { IDENTITY = 0, SILU = 1, GELU_TANH = 2 };

int softprompt_has_linear(void) { return 1; }

typedef struct {
    const uint16_t *weights;  // of these two panels
    const float *bias;        // of these two panels, or NULL
    int64_t pairs;            // K / 2
    const uint16_t *next;     // is fetched into the cache meanwhile; or NULL
    int activation, gated;
    const LoraRows *lora;  // or NULL
    int64_t row, panel;    // the first row, and of these panels the first, as LoRA counts them
} Panels;

// SiLU is x * sigmoid(x); GELU by tanh is x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
static inline __m512 activate(__m512 x, int activation) {
    if (activation == IDENTITY) return x;
    __m512 z = x, one = _mm512_set1_ps(1.0f);
    if (activation == GELU_TANH) {
        __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_mul_ps(x, _mm512_set1_ps(0.044715f)));
        z = _mm512_mul_ps(_mm512_add_ps(x, cube), _mm512_set1_ps(1.59576912f));
    }
    __m512 e = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), z));
    return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

static inline void put(uint16_t *out, const uint16_t *addend, __m512 sums, int64_t columns) {
    if (columns <= 0) return;
    __mmask16 mask = columns < LANES ? (__mmask16)((1u << columns) - 1) : (__mmask16)0xffff;
    if (addend) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, addend));
        sums = _mm512_add_ps(sums, (__m512)_mm512_slli_epi32(wide, 16));
    }
    _mm256_mask_storeu_epi16(out, mask, (__m256i)_mm512_cvtneps_pbh(sums));
}

// One row of two panels: bias, activation, what is added.
static inline void finish(__m512 a, __m512 b, const Panels *w, uint16_t *out, const uint16_t *addend,
                          int64_t columns) {
    if (w->bias) {
        a = _mm512_add_ps(a, _mm512_loadu_ps(w->bias));
        b = _mm512_add_ps(b, _mm512_loadu_ps(w->bias + LANES));
    }
    if (w->gated) {
        put(out, addend, _mm512_mul_ps(activate(a, w->activation), b), columns);
    } else {
        put(out, addend, activate(a, w->activation), columns);
        put(out + LANES, addend ? addend + LANES : 0, activate(b, w->activation), columns - LANES);
    }
}

// Through memory of its own, so that sums without LoRA stay in registers.
static inline __attribute__((always_inline)) void add_lora(int rows, __m512 sums[MAX_ROWS][PANELS], const Panels *w) {
    float added[MAX_ROWS][PANELS][LANES];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < PANELS; v++) _mm512_storeu_ps(added[m][v], sums[m][v]);
    softprompt_lora_add(added[0][0], w->lora, w->row, rows, w->panel);
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < PANELS; v++) sums[m][v] = _mm512_loadu_ps(added[m][v]);
}

// `rows` is a number the compiler knows, so the sums stay in registers.
static inline __attribute__((always_inline)) void tile(int rows, const uint16_t *x, int64_t x_row, const Panels *w,
                                                       uint16_t *out, const uint16_t *addend, int64_t out_row,
                                                       int64_t columns) {
    __m512 sums[MAX_ROWS][PANELS];
    multiply(rows, sums, x, x_row, w->weights, w->pairs * 2 * LANES, w->pairs, w->next);
    if (w->lora) add_lora(rows, sums, w);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
        finish(sums[m][0], sums[m][1], w, out + m * out_row, addend ? addend + m * out_row : 0, columns);
}

static void some_rows(int64_t rows, const uint16_t *x, int64_t x_row, const Panels *w, uint16_t *out,
                      const uint16_t *addend, int64_t out_row, int64_t columns) {
    switch (rows) {
#define CASE(n) \
    case n: tile(n, x, x_row, w, out, addend, out_row, columns); break;
        FOR_ROWS(CASE)
#undef CASE
    }
}

static int has_amx;
__attribute__((constructor)) static void find_amx(void) { has_amx = amx_request(); }

int softprompt_has_amx(void) { return has_amx; }

static void amx_rows(int64_t rows, const uint16_t *x, int64_t x_row, const Panels *w, uint16_t *out,
                     const uint16_t *addend, int64_t out_row, int64_t columns) {
    float sums[AMX_ROWS][2 * LANES];
    amx_multiply(rows, sums[0], 2 * LANES, x, x_row, w->weights, w->pairs * 2 * LANES, w->pairs, w->next);
    if (w->lora) softprompt_lora_add(sums[0], w->lora, w->row, rows, w->panel);
    for (int64_t m = 0; m < rows; m++)
        finish(_mm512_loadu_ps(sums[m]), _mm512_loadu_ps(sums[m] + LANES), w, out + m * out_row,
               addend ? addend + m * out_row : 0, columns);
}

// out [rows, columns] = act(x [rows, K] @ w.T + bias) + addend (like out, or NULL); gated: act(x @ gate.T + bias) *
// (x @ up.T + bias), where gate's and up's panels take turns. The weights' columns, and the bias in float32, are padded
// to pairs of panels. `table` and `step`: LoRA, or NULL; a team has room for `h` then, see softprompt_lora_room. Returns
// 0, or 1 where memory was refused.
int softprompt_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                      int64_t rows, int64_t x_row, int64_t columns, int64_t pairs, int activation, int gated,
                      const LoraTable *table, const LoraStep *step, void *h, int num_threads) {
    const int64_t width = gated ? LANES : PANELS * LANES, both = pairs * 2 * LANES * PANELS;
    const int amx = has_amx && pairs % AMX_PAIRS == 0, most = amx ? AMX_ROWS : MAX_ROWS;
    const int64_t groups = (columns + width - 1) / width, blocks = (rows + most - 1) / most;
    const int64_t work = rows * groups * both;
    if (num_threads) {
        LoraStep whole;
        const size_t room = softprompt_lora_room(table, step, rows, sizeof(uint16_t));
        if (softprompt_lora_prepare(&whole, &step, rows, &h, room)) return 1;
        TOGETHER(num_threads, work, 2,
                 softprompt_linear(out, x, weights, bias, addend, rows, x_row, columns, pairs, activation, gated, table,
                                   step, h, 0));
    }
    const LoraRows lora = softprompt_lora_rows(table, step, h);
    if (lora.h) softprompt_lora_shrink(&lora, step, x, x_row, pairs);
    int64_t shaped = 0;
    for (Share s = softprompt_share(groups, work); softprompt_next(&s);) {
        const int64_t group = s.pass;
        Panels w = {.pairs = pairs, .activation = activation, .gated = gated, .panel = group * PANELS};
        w.lora = lora.h ? &lora : 0;
        w.weights = (const uint16_t *)weights + group * both;
        w.bias = bias ? bias + group * PANELS * LANES : 0;
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = rows * block / blocks, count = rows * (block + 1) / blocks - start;
            const uint16_t *from = (const uint16_t *)x + start * x_row;
            const int64_t place = start * columns + group * width, rest = columns - group * width;
            uint16_t *to = (uint16_t *)out + place;
            const uint16_t *plus = addend ? (const uint16_t *)addend + place : 0;
            w.row = start;
            // The last pass over a group fetches the next one.
            w.next = block == blocks - 1 && group + 1 < groups ? w.weights + both : 0;
            if (amx) {
                if (count != shaped) amx_shape(shaped = count);
                amx_rows(count, from, x_row, &w, to, plus, columns, rest);
            } else {
                some_rows(count, from, x_row, &w, to, plus, columns, rest);
            }
        }
    }
    if (shaped) amx_release();
    return 0;
}

#endif
