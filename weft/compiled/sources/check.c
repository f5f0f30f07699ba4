// All kernels as one library, and whether they come out right on this processor: against sums in doubles.

#include "stages.c"

#include "wires.c"

#define CHECKED 96  // inputs of the weight that is tried, 37 outputs, 13 rows

static int check_few_bits(void) {  // with the largest numbers that there are
    static int8_t weights[48][2 * TURN];
    static float rows[13][CHECKED], out[13][37], one[37], scales[48], turned[2 * TURN];
    static uint8_t codes8[3 * 2 * TURN * LANES];
    static int32_t starts[48];
    uint32_t chance = 1;
    for (int o = 0; o < 48; o++)
        for (int k = 0; k < 2 * TURN; k++) {
            chance = chance * 1664525 + 1013904223;
            weights[o][k] = o < 8 ? (o % 2 ? -127 : 127) : (int8_t)((int)(chance >> 24) % 255 - 127);
            starts[o] -= SHIFT * weights[o][k];
            codes8[((o / LANES * 2 * TURN + k / 4 * 4) * LANES) + o % LANES * 4 + k % 4] = (uint8_t)weights[o][k];
        }
    for (int o = 0; o < 48; o++) scales[o] = 1.0f / (float)(o + 1);
    for (int r = 0; r < 13; r++)
        for (int k = 0; k < CHECKED; k++) {
            chance = chance * 1664525 + 1013904223;
            rows[r][k] = r < 2 ? (k % TURN ? 0 : 1) : (float)(chance >> 8) / (1 << 23) - 1;
        }
    Weight w = {8, 2 * TURN, 37, 3, codes8, scales, starts, NULL, NULL};
    for (int threads = 1; threads <= 2; threads++) {
        if (!weft_product(&w, rows[0], CHECKED, 13, out[0], threads)) return 1;
        for (int r = 0; r < 13; r++) {
            uint8_t codes[2 * TURN];
            double scale = whole_row(&w, rows[r], CHECKED, turned, codes);
            if (!weft_product(&w, rows[r], CHECKED, 1, one, 1) || memcmp(one, out[r], sizeof one)) return 2;
            for (int o = 0; o < 37; o++) {
                double sum = 0;
                for (int k = 0; k < 2 * TURN; k++) sum += (double)weights[o][k] * (int8_t)(codes[k] - SHIFT);
                double expected = sum * scale / (o + 1);
                if (fabs(expected - out[r][o]) > 1e-5 * (fabs(expected) + scale)) return 3;
            }
        }
    }
    Group4 groups[3 * CHECKED / GROUP];
    for (size_t i = 0; i < sizeof groups / sizeof *groups; i++)
        for (int o = 0; o < LANES; o++) {
            groups[i].scales[o] = (uint16_t)(0x3c00 + 16 * o);  // 1 + o / 64
            groups[i].offsets[o] = (uint16_t)(0xc800 + i);      // -8 - i / 128
            for (int j = 0; j < 4; j++)
                for (int b = 0; b < 4; b++) {
                    chance = chance * 1664525 + 1013904223;
                    groups[i].codes[j][4 * o + b] = o < 4 ? 255 : (uint8_t)(chance >> 24);
                }
        }
    w = (Weight){4, CHECKED, 37, 3, (const uint8_t *)groups, scales, NULL, NULL, NULL};
    for (int threads = 1; threads <= 2; threads++) {
        if (!weft_product(&w, rows[0], CHECKED, 13, out[0], threads)) return 4;
        for (int r = 0; r < 13; r++) {
            if (!weft_product(&w, rows[r], CHECKED, 1, one, 1) || memcmp(one, out[r], sizeof one)) return 5;
            for (int o = 0; o < 37; o++) {
                double sum = 0, size = 0;
                for (int k = 0; k < CHECKED; k++) {
                    int i = o / LANES * CHECKED / GROUP + k / GROUP, l = o % LANES;
                    uint8_t two = groups[i].codes[k % GROUP / 8][4 * l + k % 4];
                    double number = (1 + l / 64.0) * (k / 4 % 2 ? two >> 4 : two & 15) - 8 - i / 128.0;
                    sum += number * rows[r][k];
                    size += number * number;
                }
                if (fabs(sum / (o + 1) - out[r][o]) > 0.02 * sqrt(size) / (o + 1)) return 6;
            }
        }
    }
    return 0;
}

static float draw(uint32_t *chance) {
    *chance = *chance * 1664525 + 1013904223;
    return (float)(*chance >> 8) / (1 << 23) - 1;
}

static void fill(float *numbers, int count, float size, uint32_t *chance) {
    for (int i = 0; i < count; i++) numbers[i] = size * draw(chance);
}

static int far(double expected, float got, double size) { return !(fabs(expected - got) <= 1e-5 * size); }

static int check_floats(void) {
    static float weights[3 * 50 * LANES], rows[13][50], bias[37], out[13][37], one[37];
    uint32_t chance = 2;
    fill(weights, 3 * 50 * LANES, 1, &chance);
    fill(&rows[0][0], 13 * 50, 1, &chance);
    fill(bias, 37, 1, &chance);
    Weight w = {32, 50, 37, 3, (const uint8_t *)weights, NULL, NULL, bias, NULL};
    for (int threads = 1; threads <= 2; threads++) {
        if (!weft_product(&w, rows[0], 50, 13, out[0], threads)) return 7;
        for (int r = 0; r < 13; r++) {
            if (!weft_product(&w, rows[r], 50, 1, one, 1) || memcmp(one, out[r], sizeof one)) return 7;
            for (int o = 0; o < 37; o++) {
                double sum = bias[o];
                for (int k = 0; k < 50; k++) sum += (double)rows[r][k] * weights[(o / LANES * 50 + k) * LANES + o % LANES];
                if (far(sum, out[r][o], 8)) return 8;
            }
        }
        weft_plain(weights, 48, 37, bias, rows[0], 13, out[0], threads);  // of rows of 48, which lie behind each other
        for (int r = 0; r < 13; r++) {
            const float *row = &rows[0][0] + r * 48;
            weft_plain(weights, 48, 37, bias, row, 1, one, 1);
            if (memcmp(one, out[r], sizeof one)) return 7;
            for (int o = 0; o < 37; o++) {
                double sum = bias[o];
                for (int k = 0; k < 48; k++) sum += (double)row[k] * weights[o * 48 + k];
                if (far(sum, out[r][o], 8)) return 8;
            }
        }
    }
    return 0;
}

static int check_rows(void) {
    static float rows[3][90], out[3][90], gated[3][45], angles[3][40];
    uint32_t chance = 3;
    fill(&rows[0][0], 3 * 90, 4, &chance);
    fill(&angles[0][0], 3 * 40, 1, &chance);
    weft_unit(rows[0], 3, 90, 0.5f, out[0], 2);
    for (int r = 0; r < 3; r++) {
        double squares = 0.5;
        for (int i = 0; i < 90; i++) squares += (double)rows[r][i] * rows[r][i];
        for (int i = 0; i < 90; i++)
            if (far(rows[r][i] / sqrt(squares), out[r][i], 1)) return 9;
    }
    for (int cubic = 0; cubic < 2; cubic++) {
        weft_gate(rows[0], 3, 45, cubic, gated[0], 2);
        for (int i = 0; i < 3 * 45; i++) {
            double x = rows[i / 45][i % 45], y = rows[i / 45][45 + i % 45];
            double inner = cubic ? 1.5957691216057308 * (x + 0.044715 * x * x * x) : x;
            if (far(x / (1 + exp(-inner)) * y, gated[i / 45][i % 45], 16)) return 10;
        }
    }
    memcpy(out, rows, sizeof rows);
    weft_rotate(out[0], 3, 90, 2, 45, 40, angles[0], 2);
    for (int t = 0; t < 3; t++)
        for (int i = 0; i < 90; i++) {
            int at = i % 45, pair = at & ~1;
            double a = rows[t][i - at + pair], b = rows[t][i - at + (pair < 44 ? pair + 1 : pair)];
            double cosine = pair < 40 ? angles[t][pair] : 1, sine = pair < 40 ? angles[t][pair + 1] : 0;
            double expected = at >= 40 ? rows[t][i] : at % 2 ? a * sine + b * cosine : a * cosine - b * sine;
            if (far(expected, out[t][i], 8)) return 11;
        }
    return 0;
}

static int check_attention(void) {  // two sequences of other lengths, 34 heads over two, a past of more than one span
    enum { WIDTH = 80, LENGTH = 300, ALL = 34, ROW = (ALL + 4) * WIDTH };
    static float floats[2][4 * LENGTH * WIDTH], scales[2][4 * LENGTH], rows[2][ROW], out[2][ALL * WIDTH], one[ALL * WIDTH], sinks[ALL];
    static int8_t whole[2][4 * LENGTH * WIDTH];
    uint32_t chance = 4;
    int64_t starts[2] = {LENGTH - 1, 130}, ends[2] = {LENGTH, 131}, firsts[2] = {0, 29}, single[2] = {1, 1};
    fill(sinks, ALL, 1, &chance);
    fill(&rows[0][0], 2 * ROW, 3, &chance);
    for (int coded = 0; coded < 2; coded++) {
        Kept kept[2];
        const Kept *each[2] = {&kept[0], &kept[1]};
        for (int s = 0; s < 2; s++) {
            void *at = coded ? (void *)whole[s] : (void *)floats[s];
            size_t half = 2 * LENGTH * WIDTH * (coded ? 1 : sizeof(float));
            float *scale = coded ? scales[s] : NULL;
            kept[s] = (Kept){at, (char *)at + half, scale, coded ? scale + 2 * LENGTH : NULL, 2, WIDTH, LENGTH * WIDTH, LENGTH};
            for (int64_t t = 0, many = 1; t < LENGTH; t++) {
                float token[4 * WIDTH];
                fill(token, 4 * WIDTH, 1, &chance);
                weft_keep(&each[s], &t, &many, 1, token, 4 * WIDTH);
            }
        }
        weft_keep(each, starts, single, 2, rows[0] + ALL * WIDTH, ROW);
        if (!weft_attend(each, firsts, ends, 2, rows[0], ROW, ALL, 5, sinks, out[0], 2)) return 12;
        for (int s = 0; s < 2; s++) {
            if (!weft_attend(each + s, firsts + s, ends + s, 1, rows[s], ROW, ALL, 5, sinks, one, 1)) return 12;
            if (memcmp(one, out[s], sizeof one)) return 13;
            for (int h = 0; h < ALL; h++) {
                double all = exp(sinks[h]), sums[WIDTH] = {0};
                for (int64_t t = firsts[s]; t < ends[s]; t++) {
                    int64_t at = (h / 17 * LENGTH + t) * WIDTH, value = at + 2 * LENGTH * WIDTH;
                    double k = coded ? scales[s][h / 17 * LENGTH + t] : 1, v = coded ? scales[s][(2 + h / 17) * LENGTH + t] : 1, score = 0;
                    for (int d = 0; d < WIDTH; d++) score += (double)rows[s][h * WIDTH + d] * k * (coded ? whole[s][at + d] : floats[s][at + d]);
                    double weight = exp(5 * tanh(score / sqrt(WIDTH) / 5));
                    all += weight;
                    for (int d = 0; d < WIDTH; d++) sums[d] += weight * v * (coded ? whole[s][value + d] : floats[s][value + d]);
                }
                for (int d = 0; d < WIDTH; d++)
                    if (far(sums[d] / all, out[s][h * WIDTH + d], 4)) return 14;
            }
        }
    }
    return 0;
}

static int check_wires(void) {  // one row alone and beside others, and with what it was summed
    static float rows[3][300], out[3][300], sums[3][300];
    static uint8_t coded[3][512], one[512];
    uint32_t chance = 5;
    fill(&rows[0][0], 3 * 300, 1, &chance);
    for (int group = 32; group <= 64; group *= 2) {
        int64_t row = layout_of(300, group).row;
        if (!weft_encode(rows[0], 3, 300, group, coded[0]) || !weft_decode(coded[0], 3, 300, group, NULL, out[0])) return 15;
        if (!weft_decode(coded[0], 3, 300, group, rows[0], sums[0])) return 15;
        for (int r = 0; r < 3; r++) {
            if (!weft_encode(rows[r], 1, 300, group, one) || memcmp(one, coded[0] + r * row, row)) return 16;
            for (int i = 0; i < 300; i++) {
                if (fabsf(rows[r][i] - out[r][i]) > (group == 64 ? 0.51 / 127 : 1.01 / 8)) return 17;
                if (sums[r][i] != rows[r][i] + out[r][i]) return 18;
            }
        }
    }
    return 0;
}

int weft_check(void) {
    int found = check_few_bits();
    if (!found) found = check_floats();
    if (!found) found = check_rows();
    if (!found) found = check_wires();
    return found ? found : check_attention();
}
