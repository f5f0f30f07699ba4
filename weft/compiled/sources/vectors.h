// Sixteen numbers at a time, in what this processor has for it.
//
// dot(sums, weights, four): adds to each of 16 sums the products of its four bytes of weights, of -127 to 127, with four
// bytes of a row, of as many, kept plus SHIFT. dot4: of weights of 0 to 15, with bytes of a row as they are. Sums of
// whole numbers are exact: every form has the same bits. `turned`: sums with signs, Sylvester's. sums_of(four quads(of four)): the sums of sixteen times sixteen.

#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#define FORM "AVX-512 VNNI"
#define ROWS 6    // of a tile, which stays in registers
#define BLOCKS 4  // of 16 outputs
#define SHIFT 128  // the instruction takes one side without signs
typedef __m512i ints, bytes;
typedef __m512 floats;
INLINE ints ints_of(int32_t value) { return _mm512_set1_epi32(value); }
INLINE ints load_ints(const int32_t *at) { return _mm512_loadu_si512(at); }
INLINE ints plus(ints one, ints other) { return _mm512_add_epi32(one, other); }
INLINE bytes load(const void *at) { return _mm512_loadu_si512(at); }
INLINE void store_ints(int32_t *at, ints whole) { _mm512_storeu_si512(at, whole); }
INLINE bytes low(bytes two) { return _mm512_and_si512(two, _mm512_set1_epi8(15)); }
INLINE bytes high(bytes two) { return low(_mm512_srli_epi16(two, 4)); }
INLINE ints dot(ints sums, bytes weights, int32_t four) { return _mm512_dpbusd_epi32(sums, ints_of(four), weights); }
INLINE ints dot4(ints sums, bytes weights, int32_t four) { return _mm512_dpbusd_epi32(sums, weights, ints_of(four)); }
INLINE floats floats_of(float value) { return _mm512_set1_ps(value); }
INLINE floats load_floats(const float *at) { return _mm512_loadu_ps(at); }
INLINE floats halves(const uint16_t *at) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at)); }
INLINE floats of_ints(ints sums) { return _mm512_cvtepi32_ps(sums); }
INLINE floats times(floats one, floats other) { return _mm512_mul_ps(one, other); }
INLINE floats times_plus(floats one, floats other, floats sum) { return _mm512_fmadd_ps(one, other, sum); }
INLINE void store(float *at, floats numbers) { _mm512_storeu_ps(at, numbers); }
INLINE floats added(floats one, floats other) { return _mm512_add_ps(one, other); }
INLINE floats less(floats one, floats other) { return _mm512_sub_ps(one, other); }
INLINE ints rounded(floats numbers) { return _mm512_cvtps_epi32(numbers); }
INLINE void store_bytes(void *at, ints whole, int shift) {
    _mm_storeu_si128(at, _mm_xor_si128(_mm512_cvtepi32_epi8(whole), _mm_set1_epi8((char)shift)));
}
INLINE floats turned_with(floats numbers, floats swapped, int minus) {  // sums, and where `minus` has ones, differences
    return _mm512_add_ps(swapped, _mm512_mask_sub_ps(numbers, (__mmask16)minus, _mm512_setzero_ps(), numbers));
}
INLINE floats turned(floats numbers) {
    numbers = turned_with(numbers, _mm512_permute_ps(numbers, 0xb1), 0xaaaa);
    numbers = turned_with(numbers, _mm512_permute_ps(numbers, 0x4e), 0xcccc);
    numbers = turned_with(numbers, _mm512_shuffle_f32x4(numbers, numbers, 0xb1), 0xf0f0);
    return turned_with(numbers, _mm512_shuffle_f32x4(numbers, numbers, 0x4e), 0xff00);
}
INLINE floats quads(floats a, floats b, floats c, floats d) {
    floats ab = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
    floats cd = _mm512_add_ps(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xdd));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
}
INLINE floats sums_of(floats a, floats b, floats c, floats d) {
    floats ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    floats cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
INLINE floats load_codes(const int8_t *at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define ROWS 2
#define BLOCKS 2
typedef struct { __m256i a, b; } ints;
typedef ints bytes;
typedef struct { __m256 a, b; } floats;
INLINE ints ints_of(int32_t value) { return (ints){_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
INLINE bytes load(const void *at) {
    const __m256i *two = at;
    return (bytes){_mm256_loadu_si256(two), _mm256_loadu_si256(two + 1)};
}
INLINE ints load_ints(const int32_t *at) { return load(at); }
INLINE void store_ints(int32_t *at, ints whole) { memcpy(at, &whole, sizeof whole); }
INLINE ints plus(ints one, ints other) {
    return (ints){_mm256_add_epi32(one.a, other.a), _mm256_add_epi32(one.b, other.b)};
}
INLINE __m256i low_half(__m256i two) { return _mm256_and_si256(two, _mm256_set1_epi8(15)); }
INLINE bytes low(bytes two) { return (bytes){low_half(two.a), low_half(two.b)}; }
INLINE bytes high(bytes two) { return low((bytes){_mm256_srli_epi16(two.a, 4), _mm256_srli_epi16(two.b, 4)}); }
#if defined(__AVXVNNI__)
#define FORM "AVX-VNNI"
#define SHIFT 128
INLINE __m256i more(__m256i sums, __m256i one, __m256i other) { return _mm256_dpbusd_avx_epi32(sums, one, other); }
INLINE __m256i more_signed(__m256i sums, __m256i weights, __m256i row) { return more(sums, row, weights); }
#else
#define FORM "AVX2"
#define SHIFT 0
INLINE __m256i more(__m256i sums, __m256i one, __m256i other) {
    __m256i pairs = _mm256_maddubs_epi16(one, other);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE __m256i more_signed(__m256i sums, __m256i weights, __m256i row) {  // pairs: at most 2 * 127 * 127, which 16 bits hold
    return more(sums, _mm256_abs_epi8(row), _mm256_sign_epi8(weights, row));
}
#endif
INLINE ints dot(ints sums, bytes weights, int32_t four) {
    __m256i row = _mm256_set1_epi32(four);
    return (ints){more_signed(sums.a, weights.a, row), more_signed(sums.b, weights.b, row)};
}
INLINE ints dot4(ints sums, bytes weights, int32_t four) {
    __m256i row = _mm256_set1_epi32(four);
    return (ints){more(sums.a, weights.a, row), more(sums.b, weights.b, row)};
}
INLINE floats floats_of(float value) { return (floats){_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
INLINE floats load_floats(const float *at) { return (floats){_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
INLINE floats halves(const uint16_t *at) {
    const __m128i *two = (const __m128i *)at;
    return (floats){_mm256_cvtph_ps(_mm_loadu_si128(two)), _mm256_cvtph_ps(_mm_loadu_si128(two + 1))};
}
INLINE floats of_ints(ints sums) { return (floats){_mm256_cvtepi32_ps(sums.a), _mm256_cvtepi32_ps(sums.b)}; }
INLINE floats times(floats one, floats other) {
    return (floats){_mm256_mul_ps(one.a, other.a), _mm256_mul_ps(one.b, other.b)};
}
INLINE floats times_plus(floats one, floats other, floats sum) {
    return (floats){_mm256_fmadd_ps(one.a, other.a, sum.a), _mm256_fmadd_ps(one.b, other.b, sum.b)};
}
INLINE void store(float *at, floats numbers) {
    _mm256_storeu_ps(at, numbers.a);
    _mm256_storeu_ps(at + 8, numbers.b);
}
INLINE floats added(floats one, floats other) {
    return (floats){_mm256_add_ps(one.a, other.a), _mm256_add_ps(one.b, other.b)};
}
INLINE floats less(floats one, floats other) {
    return (floats){_mm256_sub_ps(one.a, other.a), _mm256_sub_ps(one.b, other.b)};
}
INLINE ints rounded(floats numbers) { return (ints){_mm256_cvtps_epi32(numbers.a), _mm256_cvtps_epi32(numbers.b)}; }
INLINE void store_bytes(void *at, ints whole, int shift) {
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole.a, whole.b), 0xd8);
    __m128i all = _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(at, _mm_xor_si128(all, _mm_set1_epi8((char)shift)));
}
INLINE __m256 turned_half(__m256 numbers) {  // sums, and differences where a blend takes them
    __m256 swapped = _mm256_permute_ps(numbers, 0xb1);
    numbers = _mm256_blend_ps(_mm256_add_ps(swapped, numbers), _mm256_sub_ps(swapped, numbers), 0xaa);
    swapped = _mm256_permute_ps(numbers, 0x4e);
    numbers = _mm256_blend_ps(_mm256_add_ps(swapped, numbers), _mm256_sub_ps(swapped, numbers), 0xcc);
    swapped = _mm256_permute2f128_ps(numbers, numbers, 1);
    return _mm256_blend_ps(_mm256_add_ps(swapped, numbers), _mm256_sub_ps(swapped, numbers), 0xf0);
}
INLINE floats turned(floats numbers) {
    __m256 a = turned_half(numbers.a), b = turned_half(numbers.b);
    return (floats){_mm256_add_ps(a, b), _mm256_sub_ps(a, b)};
}
INLINE floats quads(floats a, floats b, floats c, floats d) {
    __m256 ab = _mm256_hadd_ps(_mm256_add_ps(a.a, a.b), _mm256_add_ps(b.a, b.b));
    __m256 cd = _mm256_hadd_ps(_mm256_add_ps(c.a, c.b), _mm256_add_ps(d.a, d.b));
    return (floats){_mm256_hadd_ps(ab, cd), _mm256_setzero_ps()};
}
INLINE __m256 sums_of_two(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
INLINE floats sums_of(floats a, floats b, floats c, floats d) {
    return (floats){sums_of_two(a.a, b.a), sums_of_two(c.a, d.a)};
}
INLINE __m256 eight_codes(const int8_t *at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
}
INLINE floats load_codes(const int8_t *at) { return (floats){eight_codes(at), eight_codes(at + 8)}; }

#else
#define FORM "plain C"
#define ROWS 2
#define BLOCKS 1
#define SHIFT 0
#define EACH for (int i = 0; i < LANES; i++)
typedef struct { int32_t of[LANES]; } ints;
typedef struct { int8_t of[4 * LANES]; } bytes;
typedef struct { float of[LANES]; } floats;
INLINE ints ints_of(int32_t value) { ints all; EACH all.of[i] = value; return all; }
INLINE ints load_ints(const int32_t *at) { ints all; memcpy(&all, at, sizeof all); return all; }
INLINE void store_ints(int32_t *at, ints whole) { memcpy(at, &whole, sizeof whole); }
INLINE ints plus(ints one, ints other) { EACH one.of[i] += other.of[i]; return one; }
INLINE bytes load(const void *at) { bytes all; memcpy(&all, at, sizeof all); return all; }
INLINE bytes low(bytes two) { for (int i = 0; i < 4 * LANES; i++) two.of[i] &= 15; return two; }
INLINE bytes high(bytes two) { for (int i = 0; i < 4 * LANES; i++) two.of[i] = (uint8_t)two.of[i] >> 4; return two; }
INLINE ints dot(ints sums, bytes weights, int32_t four) {
    int8_t row[4];
    memcpy(row, &four, 4);
    EACH for (int j = 0; j < 4; j++) sums.of[i] += (int32_t)weights.of[4 * i + j] * row[j];
    return sums;
}
INLINE ints dot4(ints sums, bytes weights, int32_t four) { return dot(sums, weights, four); }
INLINE floats floats_of(float value) { floats all; EACH all.of[i] = value; return all; }
INLINE floats load_floats(const float *at) { floats all; memcpy(&all, at, sizeof all); return all; }
INLINE floats of_ints(ints sums) { floats all; EACH all.of[i] = (float)sums.of[i]; return all; }
INLINE floats times(floats one, floats other) { EACH one.of[i] *= other.of[i]; return one; }
INLINE floats times_plus(floats one, floats other, floats sum) { EACH sum.of[i] += one.of[i] * other.of[i]; return sum; }
INLINE void store(float *at, floats numbers) { memcpy(at, &numbers, sizeof numbers); }
INLINE floats added(floats one, floats other) { EACH one.of[i] += other.of[i]; return one; }
INLINE floats less(floats one, floats other) { EACH one.of[i] -= other.of[i]; return one; }
INLINE ints rounded(floats numbers) { ints all; EACH all.of[i] = (int32_t)rintf(numbers.of[i]); return all; }
INLINE void store_bytes(void *at, ints whole, int shift) { EACH ((uint8_t *)at)[i] = (uint8_t)(whole.of[i] ^ shift); }
INLINE floats turned(floats numbers) {
    for (int half = 1; half < LANES; half *= 2) {
        floats next;
        EACH next.of[i] = i & half ? numbers.of[i ^ half] - numbers.of[i] : numbers.of[i] + numbers.of[i ^ half];
        numbers = next;
    }
    return numbers;
}
INLINE floats quads(floats a, floats b, floats c, floats d) {
    floats sums = {0};
    EACH sums.of[0] += a.of[i], sums.of[1] += b.of[i], sums.of[2] += c.of[i], sums.of[3] += d.of[i];
    return sums;
}
INLINE floats sums_of(floats a, floats b, floats c, floats d) {
    floats sums;
    for (int i = 0; i < 4; i++)
        sums.of[i] = a.of[i], sums.of[4 + i] = b.of[i], sums.of[8 + i] = c.of[i], sums.of[12 + i] = d.of[i];
    return sums;
}
INLINE floats load_codes(const int8_t *at) { floats all; EACH all.of[i] = at[i]; return all; }
INLINE floats halves(const uint16_t *at) {
    floats all;
    EACH {
        uint32_t sign = (uint32_t)(at[i] & 0x8000) << 16, rest = at[i] & 0x7fff, bits = sign | ((rest << 13) + 0x38000000);
        float number;
        memcpy(&number, &bits, 4);
        all.of[i] = rest < 0x400 ? (sign ? -1.0f : 1.0f) * (float)rest * 0x1p-24f : number;  // no infinities are stored
    }
    return all;
}
#endif

// Of 16 numbers, in the same order in every form.
INLINE float sum_of(floats numbers) {
    float of[LANES];
    store(of, numbers);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) of[i] += of[i + half];
    return of[0];
}
