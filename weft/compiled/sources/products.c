// Products of rows with weights of 8 and 4 bits and of floats, for any number of rows: each row has the same bits in all.
//
// Knows one weight at a time. T rows, K inputs, W outputs, both made up to whole blocks by whoever stores weights:
// blocks of 16 outputs, and in each what four inputs of one output weigh beside those of the next output; of floats, one.

#include "vectors.h"

#define GROUP 32  // inputs of 4-bit weights that share a scale and an offset
#define TURN 64   // numbers of a row that are turned together: `turn` has them
#define SMALLEST 1e-30f  // of what a row's scale is made of: rows of zeros have one too
#define FEW_PRODUCTS (1 << 17)  // products that one thread has done before another has heard of them
#define PANEL 4  // blocks that stay in cache while rows pass
#define TOGETHER (16 * ROWS)  // rows that one thread takes at a time

typedef struct {
    int64_t bits;  // 8, 4, or 32: floats, which have codes and a bias alone
    int64_t padded, outputs, blocks;  // padded: inputs in whole turns, or groups; of floats as they are
    const uint8_t *codes;   // int8: [blocks, padded / 4, 16, 4]; int4: [blocks, padded / 32] of Group4; floats: [blocks, padded, 16]
    const float *scales;    // [16 * blocks]
    const int32_t *starts;  // int8: [16 * blocks], minus SHIFT times the sum of an output's weights
    const float *bias;      // [outputs], or nothing
    const float *gains;     // [inputs], by which rows are multiplied first, or nothing
} Weight;

typedef struct {
    uint16_t scales[LANES], offsets[LANES];  // halves, of the output's scale
    uint8_t codes[4][4 * LANES];  // inputs 0 to 3 (the low four bits) and 4 to 7 (the high) of 16 outputs, 8 to 15, ...
} Group4;

#if defined(_OPENMP)
const char *weft_form(void) { return FORM; }
#else
const char *weft_form(void) { return FORM ", one thread"; }
#endif
int weft_shift(void) { return SHIFT; }

// By what whole numbers are multiplied; no number, where one isn't or isn't finite.
INLINE float scale_of(const float *numbers, int64_t count) {
    int32_t most = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;  // sizes of floats are in the order of their bits, and what is not finite comes after all others
        memcpy(&bits, numbers + i, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    memcpy(&largest, &most, 4);
    return most >= 0x7f800000 ? NAN : (largest > SMALLEST ? largest : SMALLEST) / 127;
}

// Sixty-four numbers: sums of them with signs, of which an eighth is an orthogonal turn.
INLINE void turn(float *at) {
    floats a = turned(load_floats(at)), b = turned(load_floats(at + LANES));
    floats c = turned(load_floats(at + 2 * LANES)), d = turned(load_floats(at + 3 * LANES));
    floats ab = added(a, b), a_b = less(a, b), cd = added(c, d), c_d = less(c, d);
    store(at, added(ab, cd));
    store(at + LANES, added(a_b, c_d));
    store(at + 2 * LANES, less(ab, cd));
    store(at + 3 * LANES, less(a_b, c_d));
}

// A row in whole numbers; returns its scale. `turned` is room for `padded` numbers.
static float whole_row(const Weight *w, const float *row, int64_t inputs, float *turned, uint8_t *codes) {
    for (int64_t i = 0; i < inputs; i++) turned[i] = w->gains ? row[i] * w->gains[i] : row[i];
    memset(turned + inputs, 0, (w->padded - inputs) * sizeof(float));
    for (int64_t i = 0; i < w->padded; i += TURN) turn(turned + i);
    float scale = scale_of(turned, w->padded);
    floats inverse = floats_of(scale > 0 ? 1 / scale : 0);
    for (int64_t i = 0; i < w->padded; i += LANES)
        store_bytes(codes + i, rounded(times(load_floats(turned + i), inverse)), SHIFT);
    return scale / 8;
}

// A row in whole numbers by groups: their scales, and what a group's offsets are multiplied with.
static void whole_groups(const Weight *w, const float *row, int64_t inputs, int8_t *codes, float *scales, float *sums) {
    for (int64_t at = 0; at < w->padded; at += GROUP) {
        float numbers[GROUP] = {0};
        int64_t there = inputs - at < GROUP ? inputs - at : GROUP;
        for (int64_t i = 0; i < there; i++) numbers[i] = w->gains ? row[at + i] * w->gains[at + i] : row[at + i];
        float scale = scale_of(numbers, GROUP);
        floats inverse = floats_of(scale > 0 ? 1 / scale : 0);
        ints first = rounded(times(load_floats(numbers), inverse)), second = rounded(times(load_floats(numbers + LANES), inverse));
        int32_t whole[LANES], sum = 0;
        store_ints(whole, plus(first, second));
        for (int i = 0; i < LANES; i++) sum += whole[i];
        store_bytes(codes + at, first, 0);
        store_bytes(codes + at + LANES, second, 0);
        scales[at / GROUP] = scale;
        sums[at / GROUP] = scale * (float)sum;
    }
}

INLINE int32_t four_of(const void *at) {
    int32_t four;
    memcpy(&four, at, 4);
    return four;
}

// Sums of some blocks [rows, 16 * blocks], times their outputs' scales and their rows', and the bias.
static __attribute__((noinline)) void put(const Weight *w, float *out, int rows, int64_t block, int blocks, const float *sums, const float *scales) {
    int64_t first = LANES * block, there = w->outputs - first < LANES * blocks ? w->outputs - first : LANES * blocks;
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < there; i++) {
            float product = sums[r * LANES * blocks + i] * w->scales[first + i] * (scales ? scales[r] : 1.0f);
            out[r * w->outputs + first + i] = w->bias ? product + w->bias[first + i] : product;
        }
}

// A tile's sums are variables of their own, by macros: of an array of them the compiler keeps a copy in memory.
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)

#define START8(r) ints a##r = a, b##r = b, c##r = c, d##r = d;
#define ADD8(r) if (r < rows) { \
    int32_t four = four_of(codes + r * padded + k); \
    a##r = dot(a##r, wa, four); \
    if (blocks > 1) { b##r = dot(b##r, wb, four); } \
    if (blocks > 2) { c##r = dot(c##r, wc, four); d##r = dot(d##r, wd, four); } }
#define KEEP8(r) if (r < rows) { \
    store(sums + LANES * (r * blocks), of_ints(a##r)); \
    if (blocks > 1) { store(sums + LANES * (r * blocks + 1), of_ints(b##r)); } \
    if (blocks > 2) { \
        store(sums + LANES * (r * blocks + 2), of_ints(c##r)); \
        store(sums + LANES * (r * blocks + 3), of_ints(d##r)); } }

INLINE void tile8(const int rows, const int blocks, const Weight *w, int64_t block, const uint8_t *codes, const float *scales, float *out) {
    int64_t padded = w->padded, next = LANES * padded;
    const uint8_t *from = w->codes + block * next;
    const int32_t *starts = w->starts + LANES * block;
    ints zero = ints_of(0), a = load_ints(starts), b = blocks > 1 ? load_ints(starts + LANES) : zero;
    ints c = blocks > 2 ? load_ints(starts + 2 * LANES) : zero, d = blocks > 2 ? load_ints(starts + 3 * LANES) : zero;
    EACH_ROW(START8)
    for (int64_t k = 0; k < padded; k += 4, from += 4 * LANES) {
        bytes wa = load(from), wb = wa, wc = wa, wd = wa;
        if (blocks > 1) wb = load(from + next);
        if (blocks > 2) wc = load(from + 2 * next), wd = load(from + 3 * next);
        EACH_ROW(ADD8)
    }
    float sums[ROWS * BLOCKS * LANES];
    EACH_ROW(KEEP8)
    put(w, out, rows, block, blocks, sums, scales);
}

#define START4(r) floats sum##r = floats_of(0);
#define ZERO4(r) ints even##r = ints_of(0), odd##r = even##r;
#define ADD4(r) if (r < rows) { \
    const uint8_t *row = codes + r * w->padded + GROUP * g + 8 * j; \
    even##r = dot4(even##r, lows, four_of(row)); \
    odd##r = dot4(odd##r, highs, four_of(row + 4)); }
#define GROUP4(r) if (r < rows) { \
    floats whole = of_ints(plus(even##r, odd##r)); \
    sum##r = times_plus(times(steps, floats_of(scales[r * groups + g])), whole, sum##r); \
    sum##r = times_plus(starts, floats_of(offsets[r * groups + g]), sum##r); }
#define KEEP4(r) if (r < rows) store(sums + LANES * r, sum##r);

INLINE void tile4(const int rows, const Weight *w, int64_t block, const uint8_t *codes, const float *scales, const float *offsets, float *out) {
    int64_t groups = w->padded / GROUP;
    const Group4 *group = (const Group4 *)w->codes + block * groups;
    EACH_ROW(START4)
    for (int64_t g = 0; g < groups; g++, group++) {
        EACH_ROW(ZERO4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            bytes two = load(group->codes[j]), lows = low(two), highs = high(two);
            EACH_ROW(ADD4)
        }
        floats steps = halves(group->scales), starts = halves(group->offsets);
        EACH_ROW(GROUP4)
    }
    float sums[ROWS * LANES];
    EACH_ROW(KEEP4)
    put(w, out, rows, block, 1, sums, NULL);
}

#define EACH_BLOCK(DO) DO(0) DO(1) DO(2) DO(3)
#define BEGIN4(b) if (b < BLOCKS) { \
    const Group4 *at = group + b * groups; \
    ints even = ints_of(0), odd = even; \
    for (int j = 0; j < 4; j++) { \
        bytes two = load(at->codes[j]); \
        even = dot4(even, low(two), four_of(codes + GROUP * g + 8 * j)); \
        odd = dot4(odd, high(two), four_of(codes + GROUP * g + 8 * j + 4)); } \
    floats whole = of_ints(plus(even, odd)); \
    sum##b = times_plus(times(halves(at->scales), floats_of(scales[g])), whole, sum##b); \
    sum##b = times_plus(halves(at->offsets), floats_of(offsets[g]), sum##b); }
#define END4(b) if (b < BLOCKS) store(sums + LANES * b, sum##b);

// One row and several blocks: memory gives most to who reads in several places.
static void row4(const Weight *w, int64_t block, const uint8_t *codes, const float *scales, const float *offsets, float *out) {
    int64_t groups = w->padded / GROUP;
    const Group4 *group = (const Group4 *)w->codes + block * groups;
    EACH_BLOCK(START4)
    for (int64_t g = 0; g < groups; g++, group++) { EACH_BLOCK(BEGIN4) }
    float sums[4 * LANES];
    EACH_BLOCK(END4)
    put(w, out, 1, block, BLOCKS, sums, NULL);
}

#define CASE8(n) case n: if (n <= ROWS) tile8(n <= ROWS ? n : 1, BLOCKS_HERE, w, block, codes, scales, out); break;
#define ANY_ROWS8 switch (rows) { CASE8(1) CASE8(2) CASE8(3) CASE8(4) CASE8(5) CASE8(6) }

static void rows8(const Weight *w, int rows, int64_t block, int64_t end, const uint8_t *codes, const float *scales, float *out) {
#if BLOCKS > 1
#define BLOCKS_HERE BLOCKS
    for (; block + BLOCKS <= end; block += BLOCKS) ANY_ROWS8
#undef BLOCKS_HERE
#endif
#define BLOCKS_HERE 1
    for (; block < end; block++) ANY_ROWS8
#undef BLOCKS_HERE
}

static void rows4(const Weight *w, int rows, int64_t block, int64_t end, const uint8_t *codes, const float *scales, const float *offsets, float *out) {
#define CASE4(n) case n: if (n <= ROWS) tile4(n <= ROWS ? n : 1, w, block, codes, scales, offsets, out); break;
    for (; rows == 1 && block + BLOCKS <= end; block += BLOCKS) row4(w, block, codes, scales, offsets, out);
    for (; block < end; block++) switch (rows) { CASE4(1) CASE4(2) CASE4(3) CASE4(4) CASE4(5) CASE4(6) }
}

// out [T, W] = rows [T, K] times the weight of 8 or 4 bits, plus its bias. False if there is no memory.
static int product_of_codes(const Weight *w, const float *rows, int64_t inputs, int64_t count, float *out, int threads) {
    int64_t bits = w->bits, padded = w->padded, scaled = bits == 8 ? 1 : padded / GROUP, panels = (w->blocks + PANEL - 1) / PANEL;
    int64_t groups = (count + TOGETHER - 1) / TOGETHER;
    if (count * w->blocks * LANES * padded < FEW_PRODUCTS) threads = 1;
    float *scales = malloc(count * padded + (2 * count * scaled + threads * padded) * sizeof(float));
    if (!scales) return 0;
    float *offsets = scales + count * scaled, *turned = offsets + count * scaled;
    uint8_t *codes = (uint8_t *)(turned + threads * padded);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; part++)
            for (int64_t row = count * part / threads; row < count * (part + 1) / threads; row++) {
                const float *from = rows + row * inputs;
                uint8_t *to = codes + row * padded;
                if (bits == 8) scales[row] = whole_row(w, from, inputs, turned + part * padded, to);
                else whole_groups(w, from, inputs, (int8_t *)to, scales + row * scaled, offsets + row * scaled);
            }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < panels * groups; task++) {
            int64_t first = task / groups * PANEL, end = first + PANEL < w->blocks ? first + PANEL : w->blocks;
            int64_t start = task % groups * TOGETHER, stop = start + TOGETHER < count ? start + TOGETHER : count;
            for (int64_t row = start; row < stop; row += ROWS) {
                int some = (int)(stop - row < ROWS ? stop - row : ROWS);
                const uint8_t *part = codes + row * padded;
                float *to = out + row * w->outputs;
                if (bits == 8) rows8(w, some, first, end, part, scales + row, to);
                else rows4(w, some, first, end, part, scales + row * scaled, offsets + row * scaled, to);
            }
        }
    }
    free(scales);
    return 1;
}

#define DEPTH 768  // inputs of floats that are gone through at a time, at most: so much of a panel stays in cache

#define STARTF(r) floats a##r = zero, b##r = zero, c##r = zero, d##r = zero; \
    if (r < rows && !fresh) { \
        const float *at = sums + r * LANES * PANEL; \
        a##r = load_floats(at); \
        if (blocks > 1) b##r = load_floats(at + LANES); \
        if (blocks > 2) c##r = load_floats(at + 2 * LANES), d##r = load_floats(at + 3 * LANES); }
#define ADDF(r) if (r < rows) { \
    floats one = floats_of(from[r * inputs + k]); \
    a##r = times_plus(one, wa, a##r); \
    if (blocks > 1) b##r = times_plus(one, wb, b##r); \
    if (blocks > 2) c##r = times_plus(one, wc, c##r), d##r = times_plus(one, wd, d##r); }
#define KEEPF(r) if (r < rows) { \
    float *at = sums + r * LANES * PANEL; \
    store(at, a##r); \
    if (blocks > 1) store(at + LANES, b##r); \
    if (blocks > 2) store(at + 2 * LANES, c##r), store(at + 3 * LANES, d##r); }

// Adds to sums [rows, 16 * PANEL] of some blocks; each in the order of its inputs, whatever is computed beside it.
INLINE void tilef(const int rows, const int blocks, const float *weights, int64_t inputs, const float *from, int64_t first, int64_t end, float *sums) {
    const int fresh = first == 0;
    int64_t next = inputs * LANES;
    floats zero = floats_of(0);
    EACH_ROW(STARTF)
    weights += first * LANES;
    for (int64_t k = first; k < end; k++, weights += LANES) {
        floats wa = load_floats(weights), wb = wa, wc = wa, wd = wa;
        if (blocks > 1) wb = load_floats(weights + next);
        if (blocks > 2) wc = load_floats(weights + 2 * next), wd = load_floats(weights + 3 * next);
        EACH_ROW(ADDF)
    }
    EACH_ROW(KEEPF)
}

#define CASEF(n) case n: if (n <= ROWS) tilef(n <= ROWS ? n : 1, BLOCKS_HERE, weights, inputs, from, first, end, sums); break;
#define ANY_ROWSF switch (rows) { CASEF(1) CASEF(2) CASEF(3) CASEF(4) CASEF(5) CASEF(6) }

static void rowsf(int rows, int blocks, const float *weights, int64_t inputs, const float *from, int64_t first, int64_t end, float *sums) {
#if BLOCKS > 1
#define BLOCKS_HERE BLOCKS
    for (; blocks >= BLOCKS; blocks -= BLOCKS, weights += BLOCKS * inputs * LANES, sums += BLOCKS * LANES) ANY_ROWSF
#undef BLOCKS_HERE
#endif
#define BLOCKS_HERE 1
    for (; blocks; blocks--, weights += inputs * LANES, sums += LANES) ANY_ROWSF
#undef BLOCKS_HERE
}

// The same with floats.
static void product_of_floats(const Weight *w, const float *rows, int64_t count, float *out, int threads) {
    const float *weights = (const float *)w->codes, *bias = w->bias;
    int64_t inputs = w->padded, outputs = w->outputs, panels = (w->blocks + PANEL - 1) / PANEL;
    int64_t passes = (inputs + DEPTH - 1) / DEPTH, groups = (count + TOGETHER - 1) / TOGETHER;
    if (count * outputs * inputs < FEW_PRODUCTS) threads = 1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < panels * groups; task++) {
        float sums[TOGETHER * PANEL * LANES];
        int64_t block = task / groups * PANEL, start = task % groups * TOGETHER, left = w->blocks - block, wide = outputs - block * LANES;
        int some = (int)(left < PANEL ? left : PANEL), width = (int)(wide < PANEL * LANES ? wide : PANEL * LANES);
        int here = (int)(count - start < TOGETHER ? count - start : TOGETHER);
        for (int64_t pass = 0; pass < passes; pass++)
            for (int row = 0; row < here; row += ROWS)
                rowsf(here - row < ROWS ? here - row : ROWS, some, weights + block * inputs * LANES, inputs, rows + (start + row) * inputs,
                      inputs * pass / passes, inputs * (pass + 1) / passes, sums + row * PANEL * LANES);
        for (int row = 0; row < here; row++)
            for (int i = 0; i < width; i++) {
                float sum = sums[row * PANEL * LANES + i];
                out[(start + row) * outputs + block * LANES + i] = bias ? sum + bias[block * LANES + i] : sum;
            }
    }
}

// Four outputs, of some rows: their products with the rows' numbers, sixteen sums each, of which quads are left.
#define STARTD(r) floats a##r = zero, b##r = zero, c##r = zero, d##r = zero;
#define ADDD(r) if (r < rows) { \
    floats some = load_floats(from + r * inputs + k); \
    a##r = times_plus(some, wa, a##r), b##r = times_plus(some, wb, b##r); \
    c##r = times_plus(some, wc, c##r), d##r = times_plus(some, wd, d##r); }
#define KEEPD(r) if (r < rows) out[r * 4] = quads(a##r, b##r, c##r, d##r);
INLINE void four_outputs(const int rows, const float *const *weights, int64_t inputs, const float *from, floats *out) {
    floats zero = floats_of(0);
    EACH_ROW(STARTD)
    for (int64_t k = 0; k < inputs; k += LANES) {
        floats wa = load_floats(weights[0] + k), wb = load_floats(weights[1] + k);
        floats wc = load_floats(weights[2] + k), wd = load_floats(weights[3] + k);
        EACH_ROW(ADDD)
    }
    EACH_ROW(KEEPD)
}

#if ROWS > 4
#define ROWS_OF_FOUR 4
#else
#define ROWS_OF_FOUR 1
#endif

// out [T, W] = rows [T, K] times a weight of floats that lie as they are, [W, K], plus its bias. K is a multiple of 16.
void weft_plain(const float *weights, int64_t inputs, int64_t outputs, const float *bias, const float *rows, int64_t count, float *out, int threads) {
    if (count * outputs * inputs < FEW_PRODUCTS) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < (outputs + LANES - 1) / LANES; block++) {
        int64_t first = block * LANES, there = outputs - first < LANES ? outputs - first : LANES;
        const float *each[LANES];
        for (int i = 0; i < LANES; i++) each[i] = weights + (first + (i < there ? i : there - 1)) * inputs;
        for (int64_t row = 0; row < count; row += ROWS_OF_FOUR) {
            floats quad[ROWS_OF_FOUR * 4];
            int some = (int)(count - row < ROWS_OF_FOUR ? count - row : ROWS_OF_FOUR);
            for (int four = 0; four < 4; four++) {
                const float *from = rows + row * inputs;
                if (some == 1) four_outputs(1, each + 4 * four, inputs, from, quad + four);
#if ROWS_OF_FOUR > 1
                else if (some == 2) four_outputs(2, each + 4 * four, inputs, from, quad + four);
                else if (some == 3) four_outputs(3, each + 4 * four, inputs, from, quad + four);
                else four_outputs(4, each + 4 * four, inputs, from, quad + four);
#endif
            }
            for (int r = 0; r < some; r++) {
                float sums[LANES], *to = out + (row + r) * outputs + first;
                store(sums, sums_of(quad[4 * r], quad[4 * r + 1], quad[4 * r + 2], quad[4 * r + 3]));
                for (int i = 0; i < there; i++) to[i] = bias ? sums[i] + bias[first + i] : sums[i];
            }
        }
    }
}

// out [T, W] = rows [T, K] times a weight, plus its bias. False if there is no memory.
int weft_product(const Weight *w, const float *rows, int64_t inputs, int64_t count, float *out, int threads) {
    if (w->bits != 32) return product_of_codes(w, rows, inputs, count, out, threads);
    product_of_floats(w, rows, count, out, threads);
    return 1;
}
