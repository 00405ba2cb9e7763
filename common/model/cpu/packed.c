// Sampling's matrix products, a few rows times a large matrix, with the matrix units (AMX) of newer
// Intel processors: the weights are put into the units' order once, and not at every product.
#include "native.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define INPUTS 32   // a tile of weights: 16 outputs of so many inputs, the units' largest
#define OUTPUTS 32  // two tiles at a time
#define ROWS 32     // and two of rows

// Whether the system lets this process use the units: Linux asks to be asked (arch_prctl,
// ARCH_REQ_XCOMP_PERM, XTILEDATA).
int can_pack(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// weight (outputs, inputs) -> [outputs / 32][inputs / 32][2][inputs 16][outputs 16][inputs 2].
// Outputs that are not there are 0. The last 32 inputs may begin before the others end, so that
// nobody reads beyond a row; there, too, the weights are 0.
void pack(const void *weight, void *packed, long outputs, long inputs) {
    long steps = (inputs + INPUTS - 1) / INPUTS;
#pragma omp parallel for schedule(static)
    for (long first = 0; first < outputs; first += OUTPUTS) {
        uint32_t *to = (uint32_t *)packed + first * steps * (INPUTS / 2);
        for (long k = 0; k < inputs; k += INPUTS) {
            long from = k + INPUTS > inputs ? inputs - INPUTS : k;
            for (long half = first; half < first + OUTPUTS; half += 16)
                for (long i = from; i < from + INPUTS; i += 2)
                    for (long n = half; n < half + 16; n++)
                        *to++ = n < outputs && i >= k
                                    ? ((const uint32_t *)weight)[(n * inputs + i) / 2]
                                    : 0;
        }
    }
}

// y = x weight' + bias: x (rows, inputs), bias (outputs) or NULL, y (rows, outputs), all bf16.
// inputs: even, at least 32.
void packed_linear(const void *x, const void *packed, const void *bias, void *y, long rows,
                   long outputs, long inputs) {
    long steps = (inputs + INPUTS - 1) / INPUTS;
#pragma omp parallel
    {
        // Of the 64 bytes the first is the palette; from 16 on the bytes in a row of each tile,
        // from 48 on its rows.
        __attribute__((aligned(64))) uint8_t configuration[64] = {1};
        for (int tile = 0; tile < 8; tile++)
            configuration[16 + 2 * tile] = 64, configuration[48 + tile] = 16;
        _tile_loadconfig(configuration);
        // The last 32 rows may begin before the others end, too; fewer than that get zeros behind
        // them.
        uint16_t few[rows < ROWS ? ROWS * inputs : 1];
        if (rows < ROWS)
            for (long i = 0; i < ROWS * inputs; i++)
                few[i] = i < rows * inputs ? ((const uint16_t *)x)[i] : 0;
        __attribute__((aligned(64))) float sums[ROWS][OUTPUTS];
#pragma omp for schedule(static)
        for (long first = 0; first < outputs; first += OUTPUTS) {
            long columns = outputs - first < OUTPUTS ? outputs - first : OUTPUTS;
            float base[OUTPUTS] = {0};
            if (bias)
                load(base, AT(bias, 1, first), 1, columns);
            for (long row = 0; row < rows; row += ROWS) {
                long m = row + ROWS <= rows || rows < ROWS ? row : rows - ROWS;
                const uint16_t *from = rows < ROWS ? few : (const uint16_t *)x + m * inputs;
                const uint16_t *weights = (const uint16_t *)packed + first * steps * INPUTS;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (long step = 0; step < steps; step++, weights += 2 * 16 * INPUTS) {
                    long k = (step + 1) * INPUTS > inputs ? inputs - INPUTS : step * INPUTS;
                    _tile_loadd(4, from + k, inputs * 2);
                    _tile_loadd(6, weights, 64);
                    _tile_loadd(7, weights + 16 * INPUTS, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    if (rows <= 16) continue;
                    _tile_loadd(5, from + 16 * inputs + k, inputs * 2);
                    _tile_dpbf16ps(2, 5, 6);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, &sums[0][0], OUTPUTS * 4);
                _tile_stored(1, &sums[0][16], OUTPUTS * 4);
                _tile_stored(2, &sums[16][0], OUTPUTS * 4);
                _tile_stored(3, &sums[16][16], OUTPUTS * 4);
                for (long r = m; r < m + ROWS && r < rows; r++) {
                    uint16_t *to = (uint16_t *)y + r * outputs + first;
                    if (columns == OUTPUTS)
                        for (long n = 0; n < OUTPUTS; n++) to[n] = narrow(sums[r - m][n] + base[n]);
                    else
                        for (long n = 0; n < columns; n++) to[n] = narrow(sums[r - m][n] + base[n]);
                }
            }
        }
        _tile_release();
    }
}
#else
int can_pack(void) { return 0; }
void pack(const void *weight, void *packed, long outputs, long inputs) {}
void packed_linear(const void *x, const void *packed, const void *bias, void *y, long rows,
                   long outputs, long inputs) {}
#endif
