/* What the C files share. */

#ifndef EVOLVER_NATIVE_H
#define EVOLVER_NATIVE_H

#include <stdint.h>

/* Scalars of one call of the random function over LANES places, in the order of their offsets. */
enum { LANES = 1024, HALVES = 8, BLOCK = HALVES * LANES };

void draw_block(const uint32_t *words, uint64_t block, float *out);
int64_t take_stretch(const float *scores, int64_t size, const float *lows, const float *highs, const uint8_t *single,
                     int64_t pairs, int64_t *above, int64_t *inside, float *out);

#endif
