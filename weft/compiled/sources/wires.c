// Rows on wires of few bits: the bytes of parallel/quantised.py, which says what they are and does what is refused here.
//
// Knows rows of floats and of bytes; knows nothing of messages. T rows, M width, K numbers that share a scale.

#include "vectors.h"

#define SET 128  // neighbouring numbers, of which the largest is kept apart
#define LEAST_SCALE 1.17549435e-38f

INLINE uint32_t bits_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint16_t brief(float number) {  // bfloat16, to the nearest, of two to the even one
    uint32_t bits = bits_of(number);
    return number != number ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float long_of(const uint8_t *two) {
    uint16_t bits;
    memcpy(&bits, two, 2);
    return of_bits((uint32_t)bits << 16);
}

// The last of the largest numbers, nearly: their last bits, `low`, don't count.
INLINE int largest_of(const float *numbers, int count, uint32_t low) {
    int32_t most = 0;
    for (int i = 0; i < count; i++) {
        int32_t tagged = (int32_t)((bits_of(numbers[i]) & 0x7fffffff & ~low) | (uint32_t)i);
        most = tagged > most ? tagged : most;
    }
    return most & (int)low;
}

INLINE float largest_size(const float *numbers, const int group) {  // no number where one is none
    int32_t most = 0;
    for (int i = 0; i < group; i++) {
        int32_t size = (int32_t)(bits_of(numbers[i]) & 0x7fffffff);
        most = size > most ? size : most;
    }
    return of_bits((uint32_t)most);
}

typedef struct {
    int64_t padded, groups, apart, codes, row;  // as in parallel/sizes.py
} Layout;

INLINE Layout layout_of(int64_t width, const int group) {
    int64_t groups = (width + group - 1) / group, padded = groups * group, apart = (width + SET - 1) / SET;
    int64_t codes = group == 64 ? padded : padded / 2, row = codes + 2 * groups + 3 * apart;
    return (Layout){padded, groups, apart, codes, row + row % 2};
}

// What a group is divided by, as it will be read; `signed_`: the code of the largest number is the least one.
INLINE float scale_of_group(const float *numbers, const int group) {
    float most = largest_size(numbers, group);
    if (group == 64) return most / 127;
    float high = numbers[0], low = numbers[0];
    for (int i = 1; i < group; i++) {
        high = numbers[i] > high ? numbers[i] : high;
        low = numbers[i] < low ? numbers[i] : low;
    }
    return copysignf(most, high + low) / -8;
}

// One row; 0 where a scale isn't finite. `room`: for [padded] numbers and as many codes.
INLINE int encode_row(const float *values, int64_t width, const int group, Layout l, float *room, uint8_t *to) {
    int8_t *codes = (int8_t *)(room + l.padded);
    uint8_t *scales = to + l.codes, *apart = scales + 2 * l.groups, *places = apart + 2 * l.apart;
    const int of_set = SET / group;
    to[l.row - 1] = 0;  // a row may end with a byte that holds nothing
    memcpy(room, values, width * sizeof(float));
    memset(room + width, 0, (l.padded - width) * sizeof(float));
    for (int64_t set = 0; set < l.apart; set++) {
        float sizes[4] = {0};
        int64_t first = set * of_set;
        for (int g = 0; g < of_set && first + g < l.groups; g++) sizes[g] = largest_size(room + (first + g) * group, group);
        int64_t own = first + largest_of(sizes, of_set, of_set - 1);
        own = own < l.groups ? own : l.groups - 1;  // where all are zero, what was made up
        int place = largest_of(room + own * group, group, group - 1);
        uint16_t kept = brief(room[own * group + place]);
        memcpy(apart + 2 * set, &kept, 2);
        places[set] = (uint8_t)((own - first) * group + place);
        room[own * group + place] = 0;
    }
    for (int64_t g = 0; g < l.groups; g++) {
        const float *numbers = room + g * group;
        uint16_t told = brief(scale_of_group(numbers, group));
        if ((told & 0x7f80) == 0x7f80) return 0;
        float scale = of_bits((uint32_t)told << 16);
        if (fabsf(scale) < LEAST_SCALE) told = 0, scale = 0;
        memcpy(scales + 2 * g, &told, 2);
        float inverse = scale == 0 ? 0 : 1 / scale;
        for (int i = 0; i < group; i++) {
            float whole = rintf(numbers[i] * inverse);
            codes[g * group + i] = (int8_t)(group == 32 && whole > 7 ? 7 : whole);
        }
    }
    if (group == 64) memcpy(to, codes, l.codes);
    else
        for (int64_t i = 0; i < l.codes; i++) to[i] = (uint8_t)((uint8_t)codes[l.codes + i] << 4 | (codes[i] & 15));
    return 1;
}

// Rows [T, M] to bytes. False, where numbers are there that only Python codes, or no memory is.
int weft_encode(const float *values, int64_t count, int64_t width, int group, uint8_t *encoded) {
    Layout l = layout_of(width, group);
    float *room = malloc(l.padded * (sizeof(float) + 1));
    int done = room != NULL;
    for (int64_t t = 0; done && t < count; t++) {
        const float *from = values + t * width;
        uint8_t *to = encoded + t * l.row;
        done = group == 64 ? encode_row(from, width, 64, l, room, to) : encode_row(from, width, 32, l, room, to);
    }
    free(room);
    return done;
}

INLINE void decode_row(const uint8_t *from, int64_t width, const int group, Layout l, float *numbers) {
    const uint8_t *scales = from + l.codes, *apart = scales + 2 * l.groups, *places = apart + 2 * l.apart;
    for (int64_t g = 0; g < l.groups; g++) {
        float scale = long_of(scales + 2 * g);
        for (int i = 0; i < group; i++) {
            int64_t at = g * group + i;
            int code = group == 64 ? (int8_t)from[at] : at < l.codes ? (int8_t)(from[at] << 4) >> 4 : (int8_t)from[at - l.codes] >> 4;
            numbers[at] = (float)code * scale;
        }
    }
    for (int64_t set = 0; set < l.apart; set++) numbers[set * SET + places[set]] = long_of(apart + 2 * set);
}

// out [T, M] = left, if it is there, plus what the bytes say. False, and nothing is written, where they say what only
// Python reads, or no memory is. `left` may be `out`.
int weft_decode(const uint8_t *encoded, int64_t count, int64_t width, int group, const float *left, float *out) {
    Layout l = layout_of(width, group);
    for (int64_t t = 0; t < count; t++) {
        const uint8_t *scales = encoded + t * l.row + l.codes, *places = scales + 2 * l.groups + 2 * l.apart;
        int marked = 0;
        for (int64_t g = 0; g < l.groups; g++) marked |= (scales[2 * g + 1] & 0x7f) == 0x7f && scales[2 * g] & 0x80;
        for (int64_t set = 0; set < l.apart; set++) marked |= set * SET + places[set] >= l.padded || places[set] >= SET;
        if (marked) return 0;
    }
    float *room = malloc(l.padded * sizeof(float));
    if (!room) return 0;
    for (int64_t t = 0; t < count; t++) {
        if (group == 64) decode_row(encoded + t * l.row, width, 64, l, room);
        else decode_row(encoded + t * l.row, width, 32, l, room);
        float *to = out + t * width;
        const float *by = left ? left + t * width : NULL;
        for (int64_t i = 0; i < width; i++) to[i] = by ? by[i] + room[i] : room[i];
    }
    free(room);
    return 1;
}
