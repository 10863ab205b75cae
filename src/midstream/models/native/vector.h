// Vectors of floats as wide as the processor's registers, by the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX__
#include <immintrin.h>
#endif

// Wider vectors than the registers would be kept in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef float vf8 __attribute__((vector_size(32)));
typedef float vf4 __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef int16_t vs __attribute__((vector_size(2 * LANES)));
typedef int8_t vc __attribute__((vector_size(LANES)));

// A bfloat16 is the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

inline vf load(const float* from) {
    vf v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline vf load(const bf16* from) {
    vh half;
    std::memcpy(&half, from, sizeof half);
    const vu bits = __builtin_convertvector(half, vu) << 16;
    return (vf)bits;
}

inline vf load(const int8_t* from) {
    vc whole;
    std::memcpy(&whole, from, sizeof whole);
#if defined(__AVX512F__)
    // Asked for a conversion to numbers four times as wide, some compilers take the numbers one by one.
    const vi wide = (vi)_mm512_cvtepi8_epi32((__m128i)whole);
#elif defined(__AVX2__)
    const vi wide = (vi)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((long long)whole));
#else
    const vi wide = __builtin_convertvector(__builtin_convertvector(whole, vs), vi);
#endif
    return __builtin_convertvector(wide, vf);
}

inline void store(float* to, vf v) { std::memcpy(to, &v, sizeof v); }

// Rounds to nearest, ties to even, as torch does; a NaN stays one.
#ifdef __AVX512BF16__
// The processor's own rounding takes numbers below 2^-126 for zero.
inline void store(bf16* to, vf v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(to, &half, sizeof half);
}
#else
inline void store(bf16* to, vf v) {
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const vu quiet = (bits >> 16) | 0x40u;
    const vu is_nan = (vu)(v != v);
    const vh half = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), vh);
    std::memcpy(to, &half, sizeof half);
}
#endif

// Of at most 2^22: rounds to the nearest whole number, ties to even.
inline void store(int8_t* to, vf v) {
    const vi whole = (vi)(v + 12582912.0f) - 0x4b400000;  // 3 * 2^22: a float this large has no bits for less than one
#ifdef __AVX512F__
    const vc narrow = (vc)_mm512_cvtepi32_epi8((__m512i)whole);
#else
    const vc narrow = __builtin_convertvector(__builtin_convertvector(whole, vs), vc);
#endif
    std::memcpy(to, &narrow, sizeof narrow);
}

inline float one(const float* from) { return *from; }

inline float one(const bf16* from) {
    const uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void put(float* to, float value) { *to = value; }

inline void put(bf16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = value != value;
    to->bits = uint16_t(is_nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Every second number of two vectors.
inline vf evens(vf a, vf b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX__)
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}

inline vf odds(vf a, vf b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

inline vf all(float value) { return value - vf{}; }

#ifdef __AVX__
inline vf4 fold(vf8 v) {
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif

#ifdef __AVX512F__
inline vf4 fold(vf v) {
    return fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#elif !defined(__AVX__)
inline vf4 fold(vf v) { return v; }
#endif

inline float sum(vf v) {
    const vf4 b = fold(v);
    const vf4 c = b + __builtin_shufflevector(b, b, 2, 3, 0, 1);
    return c[0] + c[1];
}

// The sums of four vectors.
inline vf4 sums(vf a, vf b, vf c, vf d) {
#ifdef __AVX512F__
    constexpr auto low = [](vf x, vf y) {
        return __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    };
    constexpr auto high = [](vf x, vf y) {
        return __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    };
    const vf ab = low(a, b) + high(a, b), cd = low(c, d) + high(c, d);
    const vf v = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                 __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return fold(v);
#else
    constexpr auto pairs = [](vf4 x, vf4 y) {
        return __builtin_shufflevector(x, y, 0, 4, 1, 5) + __builtin_shufflevector(x, y, 2, 6, 3, 7);
    };
    const vf4 ab = pairs(fold(a), fold(b)), cd = pairs(fold(c), fold(d));
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

inline vf larger(vf a, vf b) { return a > b ? a : b; }

inline float largest(vf v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = v[i] > found ? v[i] : found;
    return found;
}

inline bool any_above(vf v, float bound) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_GT_OQ) != 0;
#else
    const vi above = v > bound;
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= above[i];
    return found != 0;
#endif
}

// e^x for x <= some 88: x = n ln 2 + r, a polynomial in r of relative error below 2e-7, and n put into the exponent.
inline vf exponential(vf x) {
    const vf low = all(-87.0f), high = all(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vf n_float = x * 1.44269504088896341f;
    const vi n = __builtin_convertvector(n_float + (n_float >= 0.0f ? all(0.5f) : all(-0.5f)), vi);
    const vf whole = __builtin_convertvector(n, vf);
    const vf r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    vf p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const vi power = (n + 127) << 23;
    return p * (vf)power;
}
