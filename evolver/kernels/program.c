/* Runs what program.py recorded of a merge method and encoded.py numbered: a list of steps, each one operation on a run
   of scalars that lies in a core's cache. Every operation is the one that torch does for the same tensors, rounded
   alone, so that the results have the same bits; a loop over the list costs a few nanoseconds for each run. */

#include "native.h"

#include <stdlib.h>
#include <string.h>

/* A run is what a step handles at a time; sums are made run by run. */
enum { RUN = 512, ALIGNED = 64 };

enum code {
    LOAD, DRAW, FILL, ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, LESS, LESS_EQUAL, EQUAL, BOTH, EITHER, NOT, WHERE, SIGN, ABS,
    NUMBER, WIDE, NARROW, WIDE_ADD, WIDE_SUB, WIDE_MUL, WIDE_DIV, SUM, SUM_FLOAT, SUM_PRODUCT, LARGEST, TAKE, STORE
};
enum kind { FLOAT32, BFLOAT16, FLOAT16, FLOAT64, BITS };

/* Registers of a kind are numbered from 0; a negative operand is the constant ~operand. */
struct step {
    int32_t code, to, a, b, c;
};

struct job {
    const struct step *steps;
    int64_t length;
    const double *constants;
    const void *const *sources;
    const int32_t *source_kinds;
    void *const *targets;
    const int32_t *target_kinds;
    const uint32_t *words; /* [draws][4] */
    int64_t draws, first;  /* `first`: the place of scalar 0 among those that are drawn for, whole blocks */
    int64_t size, floats, doubles;
    double *results; /* [sums and largest][runs] */
    const float *lows, *highs; /* [rows][pairs] */
    const uint8_t *single;     /* [rows][pairs] */
    int64_t rows, pairs;
    int64_t *counts;    /* [blocks][rows][2 * pairs + 1] */
    float *const *taken; /* [rows] of [size] */
    int64_t threads;
};

struct memory {
    float *floats, *drawn;
    double *doubles;
};

#define SIMD _Pragma("omp simd")

#ifdef __FLT16_MAX__
int has_float16(void) { return 1; }
#else
int has_float16(void) { return 0; }
#endif

static void load(const void *from, int32_t kind, int64_t at, int64_t n, float *to)
{
    if (kind == FLOAT32) {
        memcpy(to, (const float *)from + at, (size_t)n * sizeof *to);
    } else if (kind == BFLOAT16) {
        const uint16_t *of = (const uint16_t *)from + at;
        uint32_t *bits = (uint32_t *)to;
        SIMD for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)of[i] << 16;
#ifdef __FLT16_MAX__
    } else if (kind == FLOAT16) {
        const _Float16 *of = (const _Float16 *)from + at;
        SIMD for (int64_t i = 0; i < n; i++) to[i] = (float)of[i];
#endif
    } else if (kind == FLOAT64) {
        const double *of = (const double *)from + at;
        SIMD for (int64_t i = 0; i < n; i++) to[i] = (float)of[i];
    } else { /* bits, the first scalar's the lowest of its byte; `at` is a multiple of 8 */
        const uint8_t *of = (const uint8_t *)from + at / 8;
        int32_t *mask = (int32_t *)to;
        int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            uint32_t word;
            memcpy(&word, of + i / 8, sizeof word);
            SIMD for (int bit = 0; bit < 32; bit++) mask[i + bit] = -(int32_t)(word >> bit & 1);
        }
        for (; i < n; i++)
            mask[i] = -(int32_t)(of[i / 8] >> (i % 8) & 1);
    }
}

/* Rounded to the nearest, to the even one of two. */
static void store(const float *from, int64_t n, void *target, int32_t kind, int64_t at)
{
    if (kind == FLOAT32) {
        memcpy((float *)target + at, from, (size_t)n * sizeof *from);
    } else if (kind == BFLOAT16) {
        uint16_t *to = (uint16_t *)target + at;
        const uint32_t *bits = (const uint32_t *)from;
        SIMD for (int64_t i = 0; i < n; i++) {
            const uint32_t rounded = (bits[i] + 0x7FFFu + (bits[i] >> 16 & 1)) >> 16;
            to[i] = (uint16_t)((bits[i] & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
        }
#ifdef __FLT16_MAX__
    } else if (kind == FLOAT16) {
        _Float16 *to = (_Float16 *)target + at;
        SIMD for (int64_t i = 0; i < n; i++) to[i] = (_Float16)from[i];
#endif
    } else {
        double *to = (double *)target + at;
        SIMD for (int64_t i = 0; i < n; i++) to[i] = from[i];
    }
}

/* The sum of a run, the same on every processor: halves are added until one is left, zeros fill up what is short. */
static double halved(double *x, int64_t n, int64_t width)
{
    for (int64_t i = n; i < width; i++)
        x[i] = 0.0;
    for (int64_t half = width / 2; half; half /= 2) {
        SIMD for (int64_t i = 0; i < half; i++) x[i] += x[i + half];
    }
    return x[0];
}

/* The same of floats. The product of two floats has no rounding in float64. */
static double halved_floats(const float *x, int64_t n, double *scratch)
{
    const int64_t half = RUN / 2;
    if (n < RUN) {
        SIMD for (int64_t i = 0; i < n; i++) scratch[i] = x[i];
        return halved(scratch, n, RUN);
    }
    SIMD for (int64_t i = 0; i < half; i++) scratch[i] = (double)x[i] + (double)x[i + half];
    return halved(scratch, half, half);
}

static double halved_products(const float *x, const float *y, int64_t n, double *scratch)
{
    const int64_t half = RUN / 2;
    if (n < RUN) {
        SIMD for (int64_t i = 0; i < n; i++) scratch[i] = (double)x[i] * (double)y[i];
        return halved(scratch, n, RUN);
    }
    SIMD for (int64_t i = 0; i < half; i++)
        scratch[i] = (double)x[i] * (double)y[i] + (double)x[i + half] * (double)y[i + half];
    return halved(scratch, half, half);
}

static float largest(const float *x, int64_t n)
{
    float most = x[0];
    _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

#define OPERANDS(T, BANK)                                                                                              \
    const T *const p = s->a < 0 ? NULL : (BANK) + s->a * RUN, *const q = s->b < 0 ? NULL : (BANK) + s->b * RUN;        \
    const T left = s->a < 0 ? (T)job->constants[~s->a] : 0, right = s->b < 0 ? (T)job->constants[~s->b] : 0

/* One operation on two registers, or on one and a number on either side. */
#define EACH(T, WHAT)                                                                                                  \
    do {                                                                                                               \
        if (p && q) {                                                                                                  \
            SIMD for (int64_t i = 0; i < n; i++) { const T x = p[i], y = q[i]; to[i] = WHAT; }                         \
        } else if (p) {                                                                                                \
            const T y = right;                                                                                         \
            SIMD for (int64_t i = 0; i < n; i++) { const T x = p[i]; to[i] = WHAT; }                                   \
        } else if (q) {                                                                                                \
            const T x = left;                                                                                          \
            SIMD for (int64_t i = 0; i < n; i++) { const T y = q[i]; to[i] = WHAT; }                                   \
        }                                                                                                              \
    } while (0)

static void compare(const struct job *job, const struct step *s, float *bank, int64_t n)
{
    OPERANDS(float, bank);
    int32_t *to = (int32_t *)(bank + s->to * RUN);
    if (s->code == LESS)
        EACH(float, -(int32_t)(x < y));
    else if (s->code == LESS_EQUAL)
        EACH(float, -(int32_t)(x <= y));
    else
        EACH(float, -(int32_t)(x == y));
}

static void masks(const struct step *s, float *bank, int64_t n)
{
    const int32_t *x = (const int32_t *)(bank + s->a * RUN);
    const int32_t *y = s->code == NOT ? x : (const int32_t *)(bank + s->b * RUN);
    int32_t *to = (int32_t *)(bank + s->to * RUN);
    if (s->code == BOTH) {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = x[i] & y[i];
    } else if (s->code == EITHER) {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = x[i] | y[i];
    } else {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = ~x[i];
    }
}

static void where(const struct job *job, const struct step *s, float *bank, int64_t n)
{
    OPERANDS(float, bank);
    const int32_t *mask = (const int32_t *)(bank + s->c * RUN);
    float *to = bank + s->to * RUN;
    if (!p && !q) {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = mask[i] ? left : right;
    } else {
        EACH(float, mask[i] ? x : y);
    }
}

static void one_operand(const struct step *s, float *bank, int64_t n)
{
    const float *x = bank + s->a * RUN;
    const int32_t *mask = (const int32_t *)x;
    float *to = bank + s->to * RUN;
    if (s->code == SIGN) {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = (x[i] > 0.0f ? 1.0f : 0.0f) - (x[i] < 0.0f ? 1.0f : 0.0f);
    } else if (s->code == ABS) {
        SIMD for (int64_t i = 0; i < n; i++) to[i] = __builtin_fabsf(x[i]);
    } else { /* NUMBER: of a mask 1 or 0 */
        SIMD for (int64_t i = 0; i < n; i++) to[i] = mask[i] ? 1.0f : 0.0f;
    }
}

static void arithmetic(const struct job *job, const struct step *s, float *bank, int64_t n)
{
    OPERANDS(float, bank);
    float *to = bank + s->to * RUN;
    if (s->code == ADD)
        EACH(float, x + y);
    else if (s->code == SUB)
        EACH(float, x - y);
    else if (s->code == MUL)
        EACH(float, x * y);
    else if (s->code == DIV)
        EACH(float, x / y);
    else if (s->code == MAXIMUM)
        EACH(float, x > y || x != x ? x : y);
    else
        EACH(float, x < y || x != x ? x : y);
}

static void wide(const struct job *job, const struct step *s, double *bank, int64_t n)
{
    OPERANDS(double, bank);
    double *to = bank + s->to * RUN;
    if (s->code == WIDE_ADD)
        EACH(double, x + y);
    else if (s->code == WIDE_SUB)
        EACH(double, x - y);
    else if (s->code == WIDE_MUL)
        EACH(double, x * y);
    else
        EACH(double, x / y);
}

/* The run of n scalars from `at` on; `taken` goes on after what the block's earlier runs took, counted in `counts`. */
static void run(const struct job *job, const struct memory *m, int64_t at, int64_t n, int64_t *counts)
{
    const int64_t start = at / BLOCK * BLOCK, runs = (job->size + RUN - 1) / RUN;
    double scratch[RUN];
    for (const struct step *s = job->steps; s < job->steps + job->length; s++) {
        float *to = m->floats + s->to * RUN;
        const float *x = m->floats + (s->a < 0 ? 0 : s->a) * RUN;
        double *wide_to = m->doubles + s->to * RUN, *wide_x = m->doubles + (s->a < 0 ? 0 : s->a) * RUN;
        switch (s->code) {
        case LOAD: load(job->sources[s->a], job->source_kinds[s->a], at, n, to); break;
        case DRAW: memcpy(to, m->drawn + s->a * BLOCK + (at - start), (size_t)n * sizeof *to); break;
        case FILL: for (int64_t i = 0; i < n; i++) to[i] = (float)job->constants[~s->a]; break;
        case LESS: case LESS_EQUAL: case EQUAL: compare(job, s, m->floats, n); break;
        case BOTH: case EITHER: case NOT: masks(s, m->floats, n); break;
        case WHERE: where(job, s, m->floats, n); break;
        case SIGN: case ABS: case NUMBER: one_operand(s, m->floats, n); break;
        case WIDE: SIMD for (int64_t i = 0; i < n; i++) wide_to[i] = x[i]; break;
        case NARROW: SIMD for (int64_t i = 0; i < n; i++) to[i] = (float)wide_x[i]; break;
        case WIDE_ADD: case WIDE_SUB: case WIDE_MUL: case WIDE_DIV: wide(job, s, m->doubles, n); break;
        case SUM: job->results[s->to * runs + at / RUN] = halved(wide_x, n, RUN); break;
        case SUM_FLOAT: job->results[s->to * runs + at / RUN] = halved_floats(x, n, scratch); break;
        case SUM_PRODUCT:
            job->results[s->to * runs + at / RUN] = halved_products(x, m->floats + s->b * RUN, n, scratch);
            break;
        case LARGEST: job->results[s->to * runs + at / RUN] = largest(x, n); break;
        case TAKE: {
            int64_t *of = counts + s->to * (2 * job->pairs + 1);
            const int64_t edges = s->to * job->pairs;
            of[2 * job->pairs] += take_stretch(x, n, job->lows + edges, job->highs + edges, job->single + edges,
                                               job->pairs, of, of + job->pairs,
                                               job->taken[s->to] + start + of[2 * job->pairs]);
            break;
        }
        case STORE: store(x, n, job->targets[s->to], job->target_kinds[s->to], at); break;
        default: arithmetic(job, s, m->floats, n);
        }
    }
}

static void *aligned(int64_t bytes)
{
    void *found = NULL;
    return posix_memalign(&found, ALIGNED, (size_t)(bytes > ALIGNED ? bytes : ALIGNED)) ? NULL : found;
}

/* The steps on all scalars. Returns 0, or 1 where there is no memory. */
int run_program(const struct job *job)
{
    int failed = 0;
    const int64_t blocks = (job->size + BLOCK - 1) / BLOCK, per_block = job->rows * (2 * job->pairs + 1);
#pragma omp parallel num_threads((int)job->threads) reduction(| : failed) if (blocks > 1)
    {
        const struct memory m = {
            aligned(job->floats * RUN * (int64_t)sizeof(float)),
            aligned(job->draws * BLOCK * (int64_t)sizeof(float)),
            aligned(job->doubles * RUN * (int64_t)sizeof(double)),
        };
        failed = !m.floats || !m.drawn || !m.doubles;
#pragma omp for schedule(dynamic, 2)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t start = block * BLOCK, end = start + BLOCK < job->size ? start + BLOCK : job->size;
            if (failed)
                continue;
            for (int64_t n = 0; n < job->draws; n++)
                draw_block(job->words + 4 * n, (uint64_t)((job->first + start) / BLOCK), m.drawn + n * BLOCK);
            for (int64_t at = start; at < end; at += RUN)
                run(job, &m, at, end - at < RUN ? end - at : RUN, job->counts + block * per_block);
        }
        free(m.floats), free(m.drawn), free(m.doubles);
    }
    return failed;
}

/* Which scalars stay by the rank of their size in their row, as bits. The program says the sizes by its last step, which
   stores them; it draws nothing. words: of the stream of draws; bits: [(rows * width + 7) / 8]; draws start at scalar 0.
   Returns 0, or 1 where there is no memory. */
int mask_by_rank(const struct job *job, const int32_t *first_kept, int64_t width, const uint32_t *words, uint8_t *bits)
{
    enum { ROWS = 8 }; /* whole bytes of bits */
    const struct chances of = chances_of(first_kept, width);
    const int64_t rows = job->size / width, groups = (rows + ROWS - 1) / ROWS;
    const int64_t at_once = 8 * BLOCK / (ROWS * width) + 1, slots = width / BLOCK + 2;
    int failed = 0;
#pragma omp parallel num_threads((int)job->threads) reduction(| : failed) if (groups > at_once)
    {
        const struct memory m = {aligned(job->floats * RUN * (int64_t)sizeof(float)), NULL,
                                 aligned(job->doubles * RUN * (int64_t)sizeof(double))};
        float *sizes = aligned(width * (int64_t)sizeof *sizes), *draws = aligned(slots * BLOCK * (int64_t)sizeof *draws);
        uint8_t *kept = aligned(ROWS * width);
        void *scratch = aligned(rank_scratch(width)), *targets[1];
        int64_t drawn = -1, first = 0; /* blocks [first, drawn) lie in `draws` */
        struct job mine = *job;
        mine.targets = targets;
        failed = !m.floats || !m.doubles || !sizes || !draws || !kept || !scratch;
#pragma omp for schedule(dynamic, at_once)
        for (int64_t group = 0; group < groups; group++) {
            const int64_t start = group * ROWS, end = start + ROWS < rows ? start + ROWS : rows;
            for (int64_t row = start; row < end && !failed; row++) {
                const int64_t at = row * width, from = at / BLOCK, to = (at + width - 1) / BLOCK + 1;
                if (from < first || from > drawn)
                    first = drawn = from;
                if (from > first) { /* the last block of the row before is the first one of this row */
                    memmove(draws, draws + (from - first) * BLOCK, (size_t)((drawn - from) * BLOCK) * sizeof *draws);
                    first = from;
                }
                for (; drawn < to; drawn++)
                    draw_block(words, (uint64_t)drawn, draws + (drawn - first) * BLOCK);
                targets[0] = (void *)((uintptr_t)sizes - (uintptr_t)at * sizeof *sizes);
                for (int64_t n = 0; n < width; n += RUN)
                    run(&mine, &m, at + n, width - n < RUN ? width - n : RUN, NULL);
                kept_in_row(sizes, draws + (at - first * BLOCK), of, width, kept + (row - start) * width, scratch);
            }
            if (!failed)
                pack(kept, (end - start) * width, bits + start * width / 8);
        }
        free(m.floats), free(m.doubles), free(sizes), free(draws), free(kept), free(scratch);
    }
    return failed;
}

/* What the blocks took, moved to the front of every row; counts[rows][2 * pairs + 1] are added up in the first block's
   place. Returns 0. */
int gather_taken(const struct job *job)
{
    const int64_t each = 2 * job->pairs + 1, per_block = job->rows * each;
    for (int64_t row = 0; row < job->rows; row++) {
        int64_t taken = 0, *total = job->counts + row * each;
        for (int64_t block = 0; block * BLOCK < job->size; block++) {
            const int64_t *of = job->counts + block * per_block + row * each, count = of[2 * job->pairs];
            memmove(job->taken[row] + taken, job->taken[row] + block * BLOCK, (size_t)count * sizeof(float));
            taken += count;
            for (int64_t n = 0; block && n < each; n++)
                total[n] += of[n];
        }
    }
    return 0;
}

/* The sums of a tensor from those of its runs: halves of a piece's runs, then piece by piece. `piece`: runs, whose next
   power of two is `width`; scratch[width]. */
double sum_of_runs(const double *of_runs, int64_t runs, int64_t piece, int64_t width, double *scratch)
{
    double total = 0.0;
    for (int64_t at = 0; at < runs; at += piece) {
        const int64_t n = runs - at < piece ? runs - at : piece;
        memcpy(scratch, of_runs + at, (size_t)n * sizeof *scratch);
        total += halved(scratch, n, width);
    }
    return total;
}
