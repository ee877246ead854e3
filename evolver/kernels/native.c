/* The innermost loops that no compiler makes fast out of tensor operations. Each has a plain twin in Python that gives
   the same results: draws() is random.fill, take() is order.take, kept_by_rank() is operators.kept_by_rank.
   Threads are those of torch, whose OpenMP runtime is the one that is loaded. */

#include "native.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

enum { ROUNDS = 10, STRETCH = 1 << 14, BUCKETS = 512, WIDE_ROW = 4096, DRAWS = 1 << 16 };

/* Draws for one block of scalars, to out[HALVES][LANES]. words: k0, k1, c2, c3. */
void draw_block(const uint32_t *words, uint64_t block, float *out)
{
    const uint64_t place = block * LANES;
    for (uint32_t lane = 0; lane < LANES; lane++) {
        uint32_t c[4] = {(uint32_t)place + lane, (uint32_t)(place >> 32), words[2], words[3]};
        uint32_t k0 = words[0], k1 = words[1];
        for (int round = 0; round < ROUNDS; round++) {
            const uint64_t product0 = (uint64_t)c[0] * 0xD2511F53u, product1 = (uint64_t)c[2] * 0xCD9E8D57u;
            c[0] = (uint32_t)(product1 >> 32) ^ c[1] ^ k0;
            c[1] = (uint32_t)product1;
            c[2] = (uint32_t)(product0 >> 32) ^ c[3] ^ k1;
            c[3] = (uint32_t)product0;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int word = 0; word < 4; word++) {
            out[2 * word * LANES + lane] = (float)(int32_t)(c[word] & 0xFFFF);
            out[(2 * word + 1) * LANES + lane] = (float)(int32_t)(c[word] >> 16);
        }
    }
}

/* Draws for whole blocks of scalars from block `first` on, to out[blocks][HALVES][LANES]. */
void draws(const uint32_t *words, uint64_t first, int64_t blocks, float *out)
{
#pragma omp parallel for
    for (int64_t block = 0; block < blocks; block++)
        draw_block(words, first + (uint64_t)block, out + block * BLOCK);
}

/* One stretch of one row of scores, for take(): adds to `above` and `inside`, and returns how many it took. Nothing is
   written beyond out[size - 1]. */
int64_t take_stretch(const float *scores, int64_t size, const float *lows, const float *highs,
                     const uint8_t *single, int64_t pairs, int64_t *above, int64_t *inside, float *out)
{
    int64_t place = 0, taken = 0;
#ifdef __AVX512F__
    for (; place + 16 <= size; place += 16) {
        const __m512 score = _mm512_loadu_ps(scores + place);
        __mmask16 wanted = 0;
        for (int64_t pair = 0; pair < pairs; pair++) {
            const __mmask16 over = _mm512_cmp_ps_mask(score, _mm512_set1_ps(highs[pair]), _CMP_GT_OQ);
            const __mmask16 within = _mm512_cmp_ps_mask(score, _mm512_set1_ps(lows[pair]), _CMP_GT_OQ) & ~over;
            above[pair] += __builtin_popcount(over);
            inside[pair] += __builtin_popcount(within);
            wanted |= single[pair] ? 0 : within;
        }
        _mm512_storeu_ps(out + taken, _mm512_maskz_compress_ps(wanted, score));
        taken += __builtin_popcount(wanted);
    }
#endif
    for (; place < size; place++) {
        int wanted = 0;
        for (int64_t pair = 0; pair < pairs; pair++) {
            const int over = scores[place] > highs[pair], within = scores[place] > lows[pair] && !over;
            above[pair] += over;
            inside[pair] += within;
            wanted |= within && !single[pair];
        }
        if (wanted)
            out[taken++] = scores[place];
    }
    return taken;
}

/* Counts the scores above each upper edge and those inside each pair, above its lower and not above its upper edge, and
   moves to the front of `out` those inside any pair but the single ones, which hold one value.
   scores, out: [size]; lows, highs, single: [pairs]; counts: [2][pairs]. Returns how many were moved, or -1 where there
   is no memory. */
int64_t take(const float *scores, int64_t size, const float *lows, const float *highs, const uint8_t *single,
             int64_t pairs, int64_t *counts, float *out)
{
    const int64_t stretches = (size + STRETCH - 1) / STRETCH, each = 2 * pairs + 1;
    int64_t *mine = calloc((size_t)(stretches * each) + 1, sizeof *mine), taken = 0;
    if (!mine)
        return -1;
#pragma omp parallel for
    for (int64_t at = 0; at < stretches; at++) {
        const int64_t start = at * STRETCH, length = size - start < STRETCH ? size - start : STRETCH;
        int64_t *of = mine + at * each;
        of[2 * pairs] = take_stretch(scores + start, length, lows, highs, single, pairs, of, of + pairs, out + start);
    }
    memset(counts, 0, (size_t)pairs * 2 * sizeof *counts);
    for (int64_t at = 0; at < stretches; at++) {
        const int64_t *of = mine + at * each;
        for (int64_t n = 0; n < 2 * pairs; n++)
            counts[n] += of[n];
        memmove(out + taken, out + at * STRETCH, (size_t)of[2 * pairs] * sizeof *out);
        taken += of[2 * pairs];
    }
    free(mine);
    return taken;
}

/* How many scalars of a row are smaller than the one of these bits. Floats that are not negative order as their bits. */
static int32_t rank_of(uint32_t wanted, const uint32_t *row, int64_t width)
{
    int32_t rank = 0;
#pragma omp simd reduction(+ : rank)
    for (int64_t column = 0; column < width; column++)
        rank += row[column] < wanted;
    return rank;
}

/* What draws say about ranks: draw d keeps the ranks from first_kept[d] on. Below `some` it keeps all of a row, from
   `none` on none of it. */
struct chances chances_of(const int32_t *first_kept, int64_t width)
{
    struct chances of = {first_kept, 0, DRAWS};
    while (of.some < DRAWS && first_kept[of.some] == 0)
        of.some++;
    while (of.none > of.some && first_kept[of.none - 1] >= width)
        of.none--;
    return of;
}

/* Which scalars of a row have draws that their ranks decide about, to places[width]; of the others `kept` says all.
   Returns how many. */
static int64_t undecided(const float *draws, struct chances of, int64_t width, uint8_t *kept, int32_t *places)
{
    const float some = (float)of.some, none = (float)of.none;
    int64_t count = 0, column = 0;
#pragma omp simd
    for (int64_t n = 0; n < width; n++)
        kept[n] = draws[n] < some;
#ifdef __AVX512F__
    __m512i here = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (; column + 16 <= width; column += 16) {
        const __m512 draw = _mm512_loadu_ps(draws + column);
        const __mmask16 open = _mm512_cmp_ps_mask(draw, _mm512_set1_ps(some), _CMP_GE_OQ) &
                               _mm512_cmp_ps_mask(draw, _mm512_set1_ps(none), _CMP_LT_OQ);
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(open, here));
        count += __builtin_popcount(open);
        here = _mm512_add_epi32(here, _mm512_set1_epi32(16));
    }
#endif
    for (; column < width; column++) {
        places[count] = (int32_t)column;
        count += draws[column] >= some && draws[column] < none;
    }
    return count;
}

/* Which scalars of a row stay, each with the probability of its rank, the number of smaller ones. A count of scalars by
   their leading bits says between which ranks each one lies, and that decides about nearly all that their draws do not
   decide about; for the others the rank is counted, once for equal ones.
   row (not negative), draws, kept: [width]; scratch: rank_scratch(width) bytes. */
void kept_in_row(const float *sizes, const float *draws, struct chances of, int64_t width, uint8_t *kept, void *scratch)
{
    const uint32_t *row = (const uint32_t *)sizes;
    int32_t *places = scratch;
    uint16_t *bucket = (uint16_t *)(places + width + 16);
    const int64_t open = undecided(draws, of, width, kept, places);
    if (!open)
        return;
    const int shift = width < WIDE_ROW ? 19 : 17, count = width < WIDE_ROW ? BUCKETS / 4 : BUCKETS;
    int32_t below[BUCKETS + 1], beside[BUCKETS + 1], rank[BUCKETS];
    uint32_t ranked[BUCKETS], top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t column = 0; column < width; column++)
        top = row[column] > top ? row[column] : top;
    memset(below, 0, (size_t)(count + 1) * sizeof *below);
    memset(beside, 0, (size_t)(count + 1) * sizeof *beside);
    memset(ranked, 0xFF, (size_t)count * sizeof *ranked); /* the bits of no number */
    const int32_t lowest = (int32_t)(top >> shift) - (count - 1);
#pragma omp simd
    for (int64_t column = 0; column < width; column++) {
        const int32_t place = (int32_t)(row[column] >> shift) - lowest;
        bucket[column] = (uint16_t)(place > 0 ? place : 0);
    }
    for (int64_t column = 0; column + 1 < width; column += 2) { /* two counts, so that equal neighbours do not wait */
        below[bucket[column] + 1]++;
        beside[bucket[column + 1] + 1]++;
    }
    if (width % 2)
        below[bucket[width - 1] + 1]++;
    for (int n = 0; n < count; n++)
        below[n + 1] += below[n] + beside[n + 1];
    for (int64_t n = 0; n < open; n++) {
        const int32_t column = places[n], bin = bucket[column], first = of.first_kept[(int32_t)draws[column]];
        const int32_t least = below[bin], more = below[bin + 1];
        kept[column] = first <= least;
        if ((uint32_t)(first - least - 1) < (uint32_t)(more - least - 1)) { /* least < first < more, as one branch */
            if (ranked[bin] != row[column])
                ranked[bin] = row[column], rank[bin] = rank_of(row[column], row, width);
            kept[column] = first <= rank[bin];
        }
    }
}

int64_t rank_scratch(int64_t width) { return (width + 16) * (int64_t)sizeof(int32_t) + width * (int64_t)sizeof(uint16_t); }

/* kept_in_row() of many rows. sizes, draws, kept: [rows][width]. Returns 0, or 1 where there is no memory. */
int kept_by_rank(const float *sizes, const float *draws, const int32_t *first_kept, int64_t rows, int64_t width,
                 uint8_t *kept)
{
    const struct chances of = chances_of(first_kept, width);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        void *scratch = malloc((size_t)rank_scratch(width));
        failed = !scratch;
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = row * width;
            if (scratch)
                kept_in_row(sizes + at, draws + at, of, width, kept + at, scratch);
        }
        free(scratch);
    }
    return failed;
}

/* Bools as bits, the first one's the lowest of its byte; bits: [(size + 7) / 8]. */
void pack(const uint8_t *bools, int64_t size, uint8_t *bits)
{
    for (int64_t byte = 0; byte < (size + 7) / 8; byte++) {
        const int64_t left = size - 8 * byte;
        uint64_t eight = 0;
        memcpy(&eight, bools + 8 * byte, (size_t)(left < 8 ? left : 8));
        /* The lowest bits of eight bytes, moved beside each other at the top. */
        bits[byte] = (uint8_t)(eight * 0x0102040810204080u >> 56);
    }
}

/* The score of a rank, 0 for the smallest; scores are not negative, and such floats order as their bits do. The row is
   narrowed down by twelve, twelve and seven bits. scratch: [size]. */
float select_rank(const float *row, int64_t size, int64_t rank, uint32_t *scratch)
{
    static const int shifts[] = {19, 7, 0}, bits[] = {12, 12, 7};
    const uint32_t *from = (const uint32_t *)row;
    for (int level = 0; level < 3; level++) {
        uint32_t counts[1 << 12] = {0};
        int64_t kept = 0;
        const uint32_t mask = (1u << bits[level]) - 1;
        for (int64_t n = 0; n < size; n++)
            counts[(from[n] & 0x7FFFFFFFu) >> shifts[level] & mask]++;
        uint32_t bin = 0;
        while (rank >= (int64_t)counts[bin])
            rank -= (int64_t)counts[bin++];
        for (int64_t n = 0; n < size; n++) { /* what was kept before lies further on, or here */
            const uint32_t score = from[n] & 0x7FFFFFFFu;
            scratch[kept] = score;
            kept += (score >> shifts[level] & mask) == bin;
        }
        from = scratch;
        size = kept;
    }
    float found;
    memcpy(&found, scratch, sizeof found);
    return found;
}

/* Whether no number is NaN or infinite: no exponent has all bits set. Numbers of 2 or 4 bytes. */
int all_finite16(const uint16_t *numbers, int64_t size, uint16_t exponent)
{
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t n = 0; n < size; n++)
        found |= (numbers[n] & exponent) == exponent;
    return !found;
}

int all_finite32(const uint32_t *numbers, int64_t size, uint32_t exponent)
{
    int found = 0;
#pragma omp simd reduction(| : found)
    for (int64_t n = 0; n < size; n++)
        found |= (numbers[n] & exponent) == exponent;
    return !found;
}
