// Whole branches of few rows in one call: a norm, a product, what lies between, the last product. With the bits of the
// single calls, which they are made of.
//
// Knows this rank's part of one layer; knows nothing of other ranks. T rows, M numbers of a row, H query heads, G
// key/value heads, D numbers of a head.

#include "between.c"
#include "products.c"

typedef struct {
    const Weight *first, *last;
    int64_t hidden;  // M
    float epsilon;   // of the norm before, of the sum of squares; below 0: there is none
    int32_t cubic;   // see weft_gate
} Mlp;

typedef struct {
    const Weight *first, *last;
    int64_t hidden;
    float epsilon;
    float cap;            // see weft_attend
    int64_t heads, groups, width, rotary;  // H, G, D; rotary: numbers of a head that are turned
    const float *scales;  // [H + G, D], of norms of heads; or nothing
    const float *sinks;   // [H], or nothing
    float head_epsilon;   // of norms of heads
} Attention;

// A branch's input: rows of one size in `room`, or rows as they are.
static const float *input_of(const float *rows, int64_t count, int64_t width, float epsilon, float *room, int threads) {
    if (epsilon < 0) return rows;
    weft_unit(rows, count, width, epsilon, room, threads);
    return room;
}

// out [T, W of the last]: a gated MLP of rows [T, M]. False if there is no memory.
int weft_mlp(const Mlp *m, const float *rows, int64_t count, float *out, int threads) {
    int64_t wide = m->first->outputs, inner = wide / 2;
    float *room = malloc(count * (m->hidden + wide + inner) * sizeof(float));
    if (!room) return 0;
    float *both = room + count * m->hidden, *gated = both + count * wide;
    const float *input = input_of(rows, count, m->hidden, m->epsilon, room, threads);
    int done = weft_product(m->first, input, m->hidden, count, both, threads);
    if (done) {
        weft_gate(both, count, inner, m->cubic, gated, threads);
        done = weft_product(m->last, gated, inner, count, out, threads);
    }
    free(room);
    return done;
}

// out [T, W of the last]: attention of one token of each of some sequences, rows [T, M], whose keys and values are kept
// at `starts` first. The rest as in weft_keep, weft_rotate and weft_attend. False if there is no memory.
int weft_attention(const Attention *a, const Kept *const *each, const int64_t *firsts, const int64_t *starts, const int64_t *counts, const int64_t *ends, int64_t count, const float *angles, const float *rows, float *out, int threads) {
    int64_t row = a->first->outputs, wide = a->heads * a->width, turned = a->heads + a->groups;
    float *room = malloc(count * (a->hidden + row + wide) * sizeof(float));
    if (!room) return 0;
    float *heads = room + count * a->hidden, *attended = heads + count * row;
    const float *input = input_of(rows, count, a->hidden, a->epsilon, room, threads);
    int done = weft_product(a->first, input, a->hidden, count, heads, threads);
    if (done) {
        for (int64_t t = 0; a->scales && t < count; t++) {
            float *own = heads + t * row;
            weft_unit(own, turned, a->width, a->head_epsilon, own, 1);
            for (int64_t i = 0; i < turned * a->width; i++) own[i] *= a->scales[i];
        }
        if (angles) weft_rotate(heads, count, row, turned, a->width, a->rotary, angles, threads);
        weft_keep(each, starts, counts, count, heads + wide, row);
        done = weft_attend(each, firsts, ends, count, heads, row, a->heads, a->cap, a->sinks, attended, threads);
    }
    done = done && weft_product(a->last, attended, wide, count, out, threads);
    free(room);
    return done;
}
