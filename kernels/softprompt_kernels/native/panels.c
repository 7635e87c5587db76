// Matrices laid out as the products read them, see panels.py.

#include "native.h"

// One panel: out [units][LANES] of `unit` bytes each, from rows of `row_bytes`. The compiler knows `unit` and, of whole
// panels, `columns`.
static inline __attribute__((always_inline)) void pack(char *out, const char *rows, int64_t columns, int64_t row_bytes,
                                                       int64_t unit) {
    const int64_t whole = row_bytes / unit, rest = row_bytes % unit;
    if (columns < LANES || rest) memset(out, 0, (size_t)((whole + (rest > 0)) * LANES * unit));
    for (int64_t k = 0; k < whole; k++)
        for (int64_t lane = 0; lane < columns; lane++)
            memcpy(out + (k * LANES + lane) * unit, rows + lane * row_bytes + k * unit, (size_t)unit);
    for (int64_t lane = 0; rest && lane < columns; lane++)
        memcpy(out + (whole * LANES + lane) * unit, rows + lane * row_bytes + whole * unit, (size_t)rest);
}

// A matrix [columns][row_bytes] as so many panels, which lie `stride` bytes apart; zeros fill the last ones.
// `unit_bytes`, 2 or 4, of a row stay together.
void softprompt_pack_panels(char *out, const char *matrix, int64_t columns, int64_t row_bytes, int64_t panels,
                            int64_t stride, int unit_bytes, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && columns * row_bytes > PARALLEL_WORK)
    for (int64_t panel = 0; panel < panels; panel++) {
        const int64_t first = panel * LANES, left = columns > first ? columns - first : 0;
        const int64_t count = left < LANES ? left : LANES;
        char *to = out + panel * stride;
        const char *from = matrix + (count ? first * row_bytes : 0);
        if (unit_bytes == 2 && count == LANES) pack(to, from, LANES, row_bytes, 2);
        else if (unit_bytes == 2) pack(to, from, count, row_bytes, 2);
        else if (count == LANES) pack(to, from, LANES, row_bytes, 4);
        else pack(to, from, count, row_bytes, 4);
    }
}
