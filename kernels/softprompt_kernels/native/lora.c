// LoRA within products over packed weights, see lora.h.

#include "lora.h"

LoraRows softprompt_lora_rows(const LoraTable *table, const LoraStep *step, void *h) {
    int changes = 0;
    for (int64_t i = 0; table && step && table->max_rank && i < step->num_tiles; i++)
        for (int64_t slice = 0; slice < table->num_slices; slice++)
            changes |= step->tiles[3 * i + 2] && table->ranks[step->tiles[3 * i] * table->num_slices + slice];
    return (LoraRows){.table = table, .slots = changes ? step->slots : 0, .h = changes ? h : 0};
}

size_t softprompt_lora_room(const LoraTable *table, const LoraStep *step, int64_t rows, int64_t item_bytes) {
    if (!table || !step) return 0;
    return whole_lines((size_t)rows * table->num_slices * table->max_rank * (size_t)item_bytes);
}

int softprompt_lora_prepare(LoraStep *whole, const LoraStep **step, int64_t rows, void **h, size_t room) {
    static _Thread_local Kept kept;
    if (!*step) return 0;
    *h = softprompt_keep(&kept, room + (size_t)rows * sizeof(int32_t));
    if (!*h) return 1;
    int32_t *slots = (int32_t *)((char *)*h + room);
    for (int64_t row = 0; row < rows; row++) slots[row] = -1;
    for (int64_t i = 0; i < (*step)->num_tiles; i++) {
        const int32_t *tile = (*step)->tiles + 3 * i;
        for (int32_t place = tile[1]; place < tile[1] + tile[2]; place++) slots[(*step)->order[place]] = tile[0];
    }
    *whole = **step;
    whole->slots = slots;
    *step = whole;
    return 0;
}

#ifdef __AVX512BF16__

#include "amx.h"
#include "tile.h"

static inline __m512 dot_pair(__m512 sums, const uint16_t *pair, const uint16_t *panel) {
    return _mm512_dpbf16_ps(sums, pair_at(pair), (__m512bh)_mm512_loadu_si512(panel));
}

// One row times a panel. Four sums, as each waits for its last addition.
static inline __m512 shrink_row(const uint16_t *x, const uint16_t *panel, int64_t pairs) {
    __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = 0;
    for (; k + 4 <= pairs; k += 4)
        for (int i = 0; i < 4; i++) sums[i] = dot_pair(sums[i], x + 2 * (k + i), panel + (k + i) * 2 * LANES);
    for (; k < pairs; k++) sums[0] = dot_pair(sums[0], x + 2 * k, panel + k * 2 * LANES);
    return _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
}

// Up to AMX_ROWS rows times a panel, in two sums for the same reason.
static void shrink_tiles(int64_t rows, float sums[2][AMX_ROWS][LANES], const uint16_t *x, int64_t x_row,
                         const uint16_t *panel, int64_t pairs) {
#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
    const int both = rows > AMX_TILE_ROWS;
    const uint16_t *lower = both ? x + AMX_TILE_ROWS * x_row : x;
    const size_t stride = (size_t)x_row * sizeof *x, width = LANES * sizeof(float);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < pairs; k += 2 * AMX_PAIRS) {
        _tile_loadd(6, panel + k * 2 * LANES, 64);
        _tile_loadd(4, x + 2 * k, stride);
        _tile_dpbf16ps(0, 4, 6);
        if (both) {
            _tile_loadd(5, lower + 2 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
        }
        const int64_t next = k + AMX_PAIRS;
        if (next == pairs) break;
        _tile_loadd(7, panel + next * 2 * LANES, 64);
        _tile_loadd(4, x + 2 * next, stride);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, lower + 2 * next, stride);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], width);
    _tile_stored(1, sums[1], width);
    if (both) {
        _tile_stored(2, sums[0] + AMX_TILE_ROWS, width);
        _tile_stored(3, sums[1] + AMX_TILE_ROWS, width);
    }
#endif
}

static inline void put(uint16_t *h, __m512 sums, float scale) {
    sums = _mm512_mul_ps(sums, _mm512_set1_ps(scale));
    _mm256_storeu_si256((__m256i *)h, (__m256i)_mm512_cvtneps_pbh(sums));
}

void softprompt_lora_shrink(const LoraRows *lora, const LoraStep *step, const uint16_t *x, int64_t x_row,
                            int64_t pairs) {
    const LoraTable *table = lora->table;
    const int64_t h_row = table->num_slices * table->max_rank;
    const int amx = softprompt_has_amx() && pairs % AMX_PAIRS == 0;
    int64_t shaped = 0;
    for (Share s = lora_share_parts(table, step, 2 * pairs); softprompt_next(&s);) {
        const LoraPart part = lora_part(table, step, s.pass);
        const uint16_t *a = (const uint16_t *)table->a[part.at] + part.panel * pairs * 2 * LANES;
        for (int64_t i = 0, count; i < part.count; i += count) {
            uint16_t *h = (uint16_t *)lora->h + part.rows[i] * h_row + part.column;
            const uint16_t *from = x + part.rows[i] * x_row;
            count = lora_run(part.rows + i, part.count - i, amx ? AMX_ROWS : 1);
            if (amx) {
                float sums[2][AMX_ROWS][LANES];
                if (count != shaped) amx_shape(shaped = count);
                shrink_tiles(count, sums, from, x_row, a, pairs);
                for (int64_t m = 0; m < count; m++)
                    put(h + m * h_row, _mm512_add_ps(_mm512_loadu_ps(sums[0][m]), _mm512_loadu_ps(sums[1][m])),
                        table->scales[part.at]);
            } else {
                put(h, shrink_row(from, a, pairs), table->scales[part.at]);
            }
        }
    }
    if (shaped) amx_release();
}

// Adds b @ h to the sums of rows with the same LoRA in one panel. `rows` is a number the compiler knows.
static inline __attribute__((always_inline)) void expand(int rows, float *sums, const uint16_t *h, int64_t h_row,
                                                         const uint16_t *b, int64_t pairs) {
#define BEGIN(m) __m512 sum##m = rows > m ? _mm512_loadu_ps(sums + m * PANELS * LANES) : _mm512_setzero_ps();
#define ADD(m) \
    if (rows > m) sum##m = dot_pair(sum##m, h + m * h_row + 2 * k, b + k * 2 * LANES);
#define GIVE(m) \
    if (rows > m) _mm512_storeu_ps(sums + m * PANELS * LANES, sum##m);
    EACH_ROW(BEGIN)
    for (int64_t k = 0; k < pairs; k++) {
        EACH_ROW(ADD)
    }
    EACH_ROW(GIVE)
#undef BEGIN
#undef ADD
#undef GIVE
}

static void add_panel(float *sums, const LoraRows *lora, int64_t first, int64_t count, int64_t panel) {
    const LoraTable *table = lora->table;
    const int64_t slice = table->slices[panel], h_row = table->num_slices * table->max_rank;
    for (int64_t i = 0, n; slice >= 0 && i < count; i += n) {
        const int32_t slot = lora->slots[first + i];
        n = lora_share(lora, first + i, count - i < MAX_ROWS ? count - i : MAX_ROWS);
        const int64_t at = slot * table->num_slices + slice;
        if (slot < 0 || !table->ranks[at]) continue;
        const int64_t pairs = (table->ranks[at] + 1) / 2;
        const uint16_t *h = (const uint16_t *)lora->h + (first + i) * h_row + slice * table->max_rank;
        const uint16_t *b = (const uint16_t *)table->b[at] + table->places[panel] * pairs * 2 * LANES;
        float *to = sums + i * PANELS * LANES;
        // The next group of columns.
        for (int64_t k = 0; k < pairs; k++)
            _mm_prefetch((const char *)(b + (table->stride * pairs + k) * 2 * LANES), _MM_HINT_T0);
        switch (n) {
#define CASE(rows) \
    case rows: expand(rows, to, h, h_row, b, pairs); break;
            FOR_ROWS(CASE)
#undef CASE
        }
    }
}

void softprompt_lora_add(float *sums, const LoraRows *lora, int64_t first, int64_t count, int64_t panel) {
    for (int v = 0; v < PANELS; v++) add_panel(sums + v * LANES, lora, first, count, panel + v);
}

#endif
