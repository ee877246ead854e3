/* What the C files share. */

#ifndef EVOLVER_NATIVE_H
#define EVOLVER_NATIVE_H

#include <stdint.h>

/* Scalars of one call of the random function over LANES places, in the order of their offsets. */
enum { LANES = 1024, HALVES = 8, BLOCK = HALVES * LANES };

void draw_block(const uint32_t *words, uint64_t block, float *out);
int64_t take_stretch(const float *scores, int64_t size, const float *lows, const float *highs, const uint8_t *single,
                     int64_t pairs, int64_t *above, int64_t *inside, float *out);

struct chances {
    const int32_t *first_kept;
    int32_t some, none;
};

struct chances chances_of(const int32_t *first_kept, int64_t width);
void kept_in_row(const float *sizes, const float *draws, struct chances of, int64_t width, uint8_t *kept, void *scratch);
int64_t rank_scratch(int64_t width);
void pack(const uint8_t *bools, int64_t size, uint8_t *bits);

#endif
