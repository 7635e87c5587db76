// What the sources beside this file share.

#ifndef SOFTPROMPT_NATIVE_H
#define SOFTPROMPT_NATIVE_H

#include <math.h>
#include <stdint.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { LANES = 16 };
enum { MAX_DIM = 256 };  // of a head

// Floats in a vector: one register, or two where registers hold four.
#ifdef __AVX512F__
enum { WIDTH = 16 };
#else
enum { WIDTH = 8 };
#endif

// Rows by number, for sums that have a name each: what stands in an array goes through memory at every step of a loop, with
// one compiler or another.
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

// e^x for x from -87 to 88: range reduction to |r| <= ln(2)/2 and a polynomial of degree 6, relative error below 3e-7. A
// NaN stays one.
static inline float exp_within(float x) {
    float n = rintf(x * 1.44269504f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// Below so many multiplications, a second thread costs more than it saves.
static const int64_t PARALLEL_WORK = 150000;

int softprompt_paged_decode(void *out, const void *q, const void *keys, const void *values, const int32_t *page_table,
                            const int32_t *ends, const int32_t *rows, const int32_t *sequences,
                            const float *sinks, const int32_t *starts, const float *prefix, int64_t n,
                            int64_t table_width, int64_t q_row_stride, int64_t q_head_stride, int num_heads,
                            int num_kv_heads, int dim, int page_size, int dtype, int window, float scale,
                            float softcap, int num_threads);

int softprompt_paged_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                            const int32_t *rows, int64_t n, int64_t length, int64_t q_row, int64_t q_head,
                            int num_heads, int num_kv_heads, int dim, int page_size, float scale, int num_threads);

int softprompt_paged_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                           int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads);

int softprompt_wide_prefix(float *prefix, const void *q, const void *keys, const void *values, const int32_t *pages,
                           const int32_t *rows, int64_t n, int64_t length, int64_t q_row, int64_t q_head, int num_heads,
                           int num_kv_heads, int dim, int page_size, float scale, int num_threads);

int softprompt_wide_chunk(void *out, const void *q, const void *keys, const void *values, const int32_t *pages,
                          int64_t num_queries, int64_t context, int64_t q_row, int64_t q_head, int num_heads,
                          int num_kv_heads, int dim, int page_size, int window, float scale, int num_threads);

void softprompt_kv_write(void *keys, void *values, const void *k, const void *v, const int64_t *slots, int64_t n,
                         int64_t k_row_stride, int64_t k_head_stride, int64_t v_row_stride, int64_t v_head_stride,
                         int num_kv_heads, int dim, int item_bytes);

int softprompt_rms_norm(void *out, void *sum, const void *x, const void *residual, const void *weight, int64_t outer,
                        int64_t inner, int64_t size, int64_t x_outer_stride, int64_t x_inner_stride,
                        int64_t residual_outer_stride, int64_t residual_inner_stride, int dtype, int unit_offset,
                        float eps, int num_threads);

int softprompt_rope(void *q_out, void *k_out, const void *q, const void *k, const void *cosines, const void *sines,
                    int64_t n, int64_t q_row_stride, int64_t q_head_stride, int64_t k_row_stride,
                    int64_t k_head_stride, int64_t cos_stride, int64_t sin_stride, int num_heads, int num_kv_heads,
                    int dim, int dtype, int table_dtype, int num_threads);

int softprompt_has_linear(void);

int softprompt_has_wide(void);

// Whether this process may use the tiles of AMX.
int softprompt_has_amx(void);

// The LoRAs of one product, by slot; for what a slot does not change, ranks are 0. A product may compute several linears:
// its slices. All of it in the product's dtype, and laid out as its weights are; in float32, without pairs.
typedef struct {
    const void *const *a;    // [slots][slices], each [rank / LANES][K / 2][LANES][2]
    const void *const *b;    // [slots][slices], each [panels of the slice][rank / 2][LANES][2]
    const int32_t *ranks;    // [slots][slices]
    const float *scales;     // [slots][slices]
    const int32_t *slices;   // of the product's panels; -1: padding
    const int32_t *places;   // of the product's panels, among those of their slices
    int32_t num_slices, stride;  // from one group of panels to the next, so many places
    int32_t max_rank;            // a multiple of LANES; 0: no slot changes the product
} LoraTable;

// Which slots the rows of a step use: rows order[first] and the `count - 1` behind it use one slot.
typedef struct {
    const int64_t *order;
    const int32_t *tiles;  // [num_tiles][3]: slot, first, count
    int64_t num_tiles;
    const int32_t *slots;  // of each row, -1: none; see softprompt_lora_prepare
} LoraStep;

int softprompt_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                      int64_t rows, int64_t x_row, int64_t columns, int64_t pairs, int activation, int gated,
                      const LoraTable *table, const LoraStep *step, void *h, int num_threads);

int softprompt_wide_linear(void *out, const void *x, const void *weights, const float *bias, const void *addend,
                           int64_t rows, int64_t x_row, int64_t columns, int64_t size, int activation, int gated,
                           const LoraTable *table, const LoraStep *step, void *h, int num_threads);

#endif
