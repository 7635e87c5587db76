// The same products as tile.h's in the processor's tiles of AMX, some eight times as many at once.
//
// A tile has up to 16 rows of 64 bytes. Of the left factor it holds 16 rows and 16 pairs; of a panel, which lies in
// memory as the instruction wants it, 16 pairs of all its columns.

#ifndef SOFTPROMPT_AMX_H
#define SOFTPROMPT_AMX_H

#include "native.h"

enum { AMX_PAIRS = 16, AMX_TILE_ROWS = 16, AMX_ROWS = 2 * AMX_TILE_ROWS };

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Tiles 0 to 3 hold sums, of both halves of the rows times both panels; 4 and 5 those rows; 6 and 7 the panels.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} AmxShapes;

// Whether the system lets this process use tiles: Linux must be asked, once, before their first use.
static inline int amx_request(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Lets this thread's tiles hold so many rows of the left factor, 1 to AMX_ROWS, until amx_release().
static inline void amx_shape(int64_t rows) {
    AmxShapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.row_bytes[i] = 64;
        shapes.rows[i] = AMX_TILE_ROWS;
    }
    const uint8_t upper = (uint8_t)(rows < AMX_TILE_ROWS ? rows : AMX_TILE_ROWS);
    const uint8_t lower = (uint8_t)(rows > AMX_TILE_ROWS ? rows - AMX_TILE_ROWS : 1);
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = upper;
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = lower;
    _tile_loadconfig(&shapes);
}

static inline void amx_release(void) { _tile_release(); }

// sums[m * sums_row] = x[m] times two panels that lie `panel` elements apart, for as many rows as the tiles were shaped
// for; pairs is a multiple of AMX_PAIRS. `next`, unless NULL, is fetched into the cache meanwhile: so much of two panels
// from there on.
static inline __attribute__((always_inline)) void amx_multiply(int64_t rows, float *sums, int64_t sums_row,
                                                               const uint16_t *x, int64_t x_row,
                                                               const uint16_t *panels, int64_t panel, int64_t pairs,
                                                               const uint16_t *next) {
    const int64_t step = AMX_PAIRS * 2 * LANES;
    const int both = rows > AMX_TILE_ROWS;
    const uint16_t *lower = both ? x + AMX_TILE_ROWS * x_row : x;
    const size_t stride = (size_t)x_row * sizeof *x;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < pairs; k += AMX_PAIRS) {
        const uint16_t *at = panels + k * 2 * LANES;
        for (int64_t i = 0; next && i < step; i += 2 * LANES) {
            _mm_prefetch((const char *)(next + k * 2 * LANES + i), _MM_HINT_T0);
            _mm_prefetch((const char *)(next + panel + k * 2 * LANES + i), _MM_HINT_T0);
        }
        _tile_loadd(4, x + 2 * k, stride);
        _tile_loadd(6, at, 64);
        _tile_loadd(7, at + panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (both) {
            _tile_loadd(5, lower + 2 * k, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    const size_t width = (size_t)sums_row * sizeof *sums;
    _tile_stored(0, sums, width);
    _tile_stored(1, sums + LANES, width);
    if (both) {
        _tile_stored(2, sums + AMX_TILE_ROWS * sums_row, width);
        _tile_stored(3, sums + AMX_TILE_ROWS * sums_row + LANES, width);
    }
}

#else

static inline int amx_request(void) { return 0; }
static inline void amx_shape(int64_t rows) {}
static inline void amx_release(void) {}
static inline void amx_multiply(int64_t rows, float *sums, int64_t sums_row, const uint16_t *x, int64_t x_row,
                                const uint16_t *panels, int64_t panel, int64_t pairs, const uint16_t *next) {}

#endif
#endif
