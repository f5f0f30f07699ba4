// What lies between products: norms, gates, rotary turns, and the attention of one token. Each row on its own.
//
// Knows rows of floats; knows nothing of layers. T rows, H query heads, G key/value heads, D numbers of a head.

#include "vectors.h"

#define FEW_NUMBERS (1 << 14)  // numbers that one thread has done before another has heard of them
#define SPAN 128         // keys that are looked at together: with their values they stay in cache
#define HEADS 16         // query heads that share keys and are looked at together

// exp, to two units in the last place; a plain formula, which is the same wherever a number stands.
INLINE float exp_of(float x) {
    int far = x > 88;
    x = x < -87 ? -87 : x;
    float whole = rintf(x * 1.44269504f), rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return far ? INFINITY : sum * power;
}

// out [T, K]: rows over the root of their sum of squares plus `epsilon`.
void weft_unit(const float *rows, int64_t count, int64_t width, float epsilon, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1 && count * width > FEW_NUMBERS)
    for (int64_t row = 0; row < count; row++) {
        const float *from = rows + row * width;
        float *to = out + row * width;
        int64_t whole = width / LANES * LANES;
        floats squares = floats_of(0);
        for (int64_t i = 0; i < whole; i += LANES) {
            floats some = load_floats(from + i);
            squares = times_plus(some, some, squares);
        }
        float sum = sum_of(squares);
        for (int64_t i = whole; i < width; i++) sum += from[i] * from[i];
        float scale = 1 / sqrtf(sum + epsilon);
        for (int64_t i = 0; i < width; i++) to[i] = from[i] * scale;
    }
}

// out [T, W]: the first half of rows [T, 2W], through an activation, times the second. Of sigmoids: x of silu; with
// `cubic`, of the GELU by tanh.
void weft_gate(const float *rows, int64_t count, int64_t width, int cubic, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1 && count * width > FEW_NUMBERS)
    for (int64_t row = 0; row < count; row++) {
        const float *first = rows + 2 * row * width, *second = first + width;
        float *to = out + row * width;
        for (int64_t i = 0; i < width; i++) {
            float x = first[i], inner = cubic ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
            to[i] = x / (1 + exp_of(-inner)) * second[i];
        }
    }
}

// Rotary embedding in place: of the first heads of each row [T, row], their first `rotary` numbers as pairs, times
// angles [T, rotary / 2], complex numbers of size one.
void weft_rotate(float *rows, int64_t count, int64_t row, int64_t heads, int64_t width, int64_t rotary, const float *angles, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && count > 1 && count * heads * rotary > FEW_NUMBERS)
    for (int64_t t = 0; t < count; t++)
        for (int64_t head = 0; head < heads; head++) {
            float *pairs = rows + t * row + head * width;
            const float *angle = angles + t * rotary;
            for (int64_t i = 0; i < rotary; i += 2) {
                float one = pairs[i], other = pairs[i + 1];
                pairs[i] = one * angle[i] - other * angle[i + 1];
                pairs[i + 1] = one * angle[i + 1] + other * angle[i];
            }
        }
}

// Keys and values of one sequence and layer. Floats, or codes whose scales are one a position.
typedef struct {
    void *keys, *values;               // of the first head and position
    float *key_scales, *value_scales;  // of codes; else nothing
    int64_t heads, width, head, scale; // from one head to the next: in numbers, in scales
} Kept;

static void keep_one(void *to, float *scale, int64_t at, int64_t scaled, const float *from, int64_t width) {
    if (!scale) {
        memcpy((float *)to + at, from, width * sizeof(float));
        return;
    }
    float most = 0;
    for (int64_t i = 0; i < width; i++) most = fabsf(from[i]) > most || from[i] != from[i] ? fabsf(from[i]) : most;
    float step = scale[scaled] = most * (1.0f / 127), divisor = step > 1.17549435e-38f ? step : 1.17549435e-38f;
    for (int64_t i = 0; i < width; i++) {
        float whole = rintf(from[i] / divisor);
        ((int8_t *)to)[at + i] = whole >= -127 && whole <= 127 ? (int8_t)whole : 0;
    }
}

// Keeps keys [heads, D] and then values of each row's token: of some sequences, `counts` of each, from position `starts`.
void weft_keep(const Kept *const *each, const int64_t *starts, const int64_t *counts, int64_t sequences, const float *rows, int64_t row) {
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t t = 0; t < counts[s]; t++, rows += row) {
            const Kept *k = each[s];
            for (int64_t head = 0; head < k->heads; head++) {
                int64_t at = head * k->head + (starts[s] + t) * k->width, scaled = head * k->scale + starts[s] + t;
                keep_one(k->keys, k->key_scales, at, scaled, rows + head * k->width, k->width);
                keep_one(k->values, k->value_scales, at, scaled, rows + (k->heads + head) * k->width, k->width);
            }
        }
}

INLINE floats kept(const void *numbers, const int coded, int64_t at) {
    return coded ? load_codes((const int8_t *)numbers + at) : load_floats((const float *)numbers + at);
}

// Four scores: of one query with the keys of four positions.
INLINE floats four_scores(const int coded, const Kept *k, const float *query, int64_t at, int i, int last) {
    int64_t width = k->width, a = at + (i < last ? i : last) * width, b = at + (i + 1 < last ? i + 1 : last) * width;
    int64_t c = at + (i + 2 < last ? i + 2 : last) * width, d = at + (i + 3 < last ? i + 3 : last) * width;
    floats one = floats_of(0), two = one, three = one, four = one;
    for (int64_t n = 0; n < width; n += LANES) {
        floats some = load_floats(query + n);
        one = times_plus(kept(k->keys, coded, a + n), some, one);
        two = times_plus(kept(k->keys, coded, b + n), some, two);
        three = times_plus(kept(k->keys, coded, c + n), some, three);
        four = times_plus(kept(k->keys, coded, d + n), some, four);
    }
    return quads(one, two, three, four);
}

// Sums of values times what their positions weigh: of some vectors of a head's numbers.
#define VECTORS(DO) DO(0) DO(1) DO(2) DO(3)
#define NONE(n) floats even##n = floats_of(0), odd##n = even##n;
#define ADD_TWO(n) if (n < vectors) { \
    even##n = times_plus(kept(k->values, coded, at + n * LANES), one, even##n); \
    odd##n = times_plus(kept(k->values, coded, at + width + n * LANES), other, odd##n); }
#define ADD_ONE(n) if (n < vectors) even##n = times_plus(kept(k->values, coded, at + n * LANES), one, even##n);
#define KEEP(n) if (n < vectors) store(sums + n * LANES, times_plus(floats_of(1), even##n, odd##n));
INLINE void add_values(const int coded, const int vectors, const Kept *k, int64_t at, const float *scores, int count, float *sums) {
    int64_t width = k->width;
    VECTORS(NONE)
    for (int i = 0; i + 1 < count; i += 2, at += 2 * width) {
        floats one = floats_of(scores[i]), other = floats_of(scores[i + 1]);
        VECTORS(ADD_TWO)
    }
    if (count % 2) {
        floats one = floats_of(scores[count - 1]);
        VECTORS(ADD_ONE)
    }
    VECTORS(KEEP)
}

// Attention of some heads over a span of keys that they share: their sums of values [heads, D], largest scores, weights.
INLINE void attend_span(const int coded, const Kept *k, float cap, int64_t head, int heads, const float *query, int64_t first, int64_t end, float *sums, float *most, float *weights) {
    int64_t width = k->width, at = head * k->head + first * width, scaled = head * k->scale + first;
    int count = (int)(end - first), last = count - 1;
    float scale = 1 / sqrtf((float)width), scores[SPAN];
    for (int h = 0; h < heads; h++) {
        const float *own = query + h * width;
        float lanes[LANES], largest = -INFINITY, weight = 0;
        for (int i = 0; i < count; i += LANES) {
            floats a = four_scores(coded, k, own, at, i, last), b = four_scores(coded, k, own, at, i + 4, last);
            floats c = four_scores(coded, k, own, at, i + 8, last), d = four_scores(coded, k, own, at, i + 12, last);
            store(scores + i, times(sums_of(a, b, c, d), floats_of(scale)));
        }
        if (coded)
            for (int i = 0; i < count; i++) scores[i] *= k->key_scales[scaled + i];
        if (cap > 0)
            for (int i = 0; i < count; i++) scores[i] = cap - 2 * cap / (exp_of(2 / cap * scores[i]) + 1);
        for (int i = count; i % LANES; i++) scores[i] = -INFINITY;
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = -INFINITY;
        for (int i = 0; i < count; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] = scores[i + lane] > lanes[lane] ? scores[i + lane] : lanes[lane];
        for (int lane = 0; lane < LANES; lane++) largest = lanes[lane] > largest ? lanes[lane] : largest;
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = 0;
        for (int i = 0; i < count; i += LANES)
            for (int lane = 0; lane < LANES; lane++) lanes[lane] += scores[i + lane] = exp_of(scores[i + lane] - largest);
        for (int lane = 0; lane < LANES; lane++) weight += lanes[lane];
        if (coded)
            for (int i = 0; i < count; i++) scores[i] *= k->value_scales[scaled + i];
        most[h] = largest;
        weights[h] = weight;
        int64_t d = 0;
        for (; d + 4 * LANES <= width; d += 4 * LANES) add_values(coded, 4, k, at + d, scores, count, sums + h * width + d);
        for (; d < width; d += LANES) add_values(coded, 1, k, at + d, scores, count, sums + h * width + d);
    }
}

// out [T, H, D]: attention of one token of each of some sequences, queries [T, row], over the positions `firsts` to
// `ends` - 1. cap: scores s become cap * tanh(s / cap), if it is above 0. sinks [H], or nothing: a score a head that
// counts in the denominator alone. Heads are as wide and as many in all; D is a multiple of 16. False if there is no
// memory.
int weft_attend(const Kept *const *each, const int64_t *firsts, const int64_t *ends, int64_t count, const float *queries, int64_t row, int64_t heads, float cap, const float *sinks, float *out, int threads) {
    int64_t width = each[0]->width, groups = each[0]->heads, shared = heads / groups, parts = (shared + HEADS - 1) / HEADS;
    int64_t *before = malloc((count + 1) * sizeof(int64_t)), total = 0;  // spans of all tokens before each
    if (!before) return 0;
    for (int64_t t = 0; t < count; t++) {
        before[t] = total;
        total += (ends[t] - firsts[t] + SPAN - 1) / SPAN;
    }
    before[count] = total;
    float *sums = malloc(total * heads * (width + 2) * sizeof(float));
    if (!sums) {
        free(before);
        return 0;
    }
    float *most = sums + total * heads * width, *weights = most + total * heads;
    if (total * heads * SPAN * width < 8 * FEW_NUMBERS) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < total * groups * parts; task++) {
            int64_t t = 0, span = task / parts / groups, group = task / parts % groups, part = task % parts;
            while (before[t + 1] <= span) t++;
            int64_t head = group * shared + part * HEADS, place = span * heads + head;
            int64_t first = firsts[t] + (span - before[t]) * SPAN, end = first + SPAN < ends[t] ? first + SPAN : ends[t];
            int some = (int)(shared - part * HEADS < HEADS ? shared - part * HEADS : HEADS);
            const float *own = queries + t * row + head * width;
            if (each[t]->key_scales) attend_span(1, each[t], cap, group, some, own, first, end, sums + place * width, most + place, weights + place);
            else attend_span(0, each[t], cap, group, some, own, first, end, sums + place * width, most + place, weights + place);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < count * heads; at++) {
            int64_t t = at / heads, head = at % heads;
            float largest = sinks ? sinks[head] : -INFINITY, all = 0, *to = out + at * width;
            for (int64_t span = before[t]; span < before[t + 1]; span++) {
                float here = most[span * heads + head];
                largest = here > largest ? here : largest;
            }
            if (sinks) all = exp_of(sinks[head] - largest);
            for (int64_t d = 0; d < width; d++) to[d] = 0;
            for (int64_t span = before[t]; span < before[t + 1]; span++) {
                int64_t place = span * heads + head;
                float share = exp_of(most[place] - largest);
                all += share * weights[place];
                for (int64_t d = 0; d < width; d++) to[d] += share * sums[place * width + d];
            }
            for (int64_t d = 0; d < width; d++) to[d] /= all;
        }
    }
    free(before);
    free(sums);
    return 1;
}
