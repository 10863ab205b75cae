// Products of a few rows with a panel of a packed matrix: the inner loop of all matrix products here.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vector.h"

// A panel holds PANEL columns of a matrix [depth, columns], in the order in which its numbers are used: float32
// [depth][PANEL]; bfloat16 [depth / 2][PANEL][2], neighbours in depth side by side. Eight-bit weights lie as the numbers
// that they are multiplied with do.
constexpr int PANEL = 2 * LANES;
// Rows whose accumulators fit the registers.
#ifdef __AVX512F__
constexpr int TILE = 12;
#else
constexpr int TILE = 6;
#endif

// Whether these products are worth their packing: where the registers are wide, and multiply the type themselves.
template <typename T>
constexpr bool has_products() {
#if defined(__AVX512BF16__)
    return true;
#elif defined(__AVX512F__)
    return sizeof(T) == sizeof(float);
#else
    return false;
#endif
}

// How far ahead panels are asked for: streamed from memory, the processor's own guesses come too late for many rows.
constexpr int64_t AHEAD = 8192;  // bytes

// One step in depth: total[row] += a[row] · panel, of weights of type W.
template <typename T, typename W = T>
struct Step;

template <typename W>
struct Step<float, W> {
    static constexpr int DEPTH = 1;

    template <int ROWS>
    static inline void add(const float* a, int64_t stride, const W* panel, vf (*total)[2]) {
        const vf left = load(panel), right = load(panel + LANES);
        for (int r = 0; r < ROWS; r++) {
            const vf number = all(a[r * stride]);
            total[r][0] += number * left;
            total[r][1] += number * right;
        }
    }
};

inline void widen(const int8_t* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

#ifdef __AVX512BF16__
inline __m512bh load_pairs(const bf16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Whole numbers up to 127 are bfloat16s without rounding.
inline __m512bh load_pairs(const int8_t* from) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + LANES))));
    return _mm512_cvtne2ps_pbh(high, low);
}

// Eight-bit weights as the numbers that they are multiplied with, `count` of them: a multiple of PANEL.
inline void widen(const int8_t* from, bf16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += PANEL) _mm512_storeu_si512(to + i, (__m512i)load_pairs(from + i));
}

template <typename W>
struct Step<bf16, W> {
    static constexpr int DEPTH = 2;

    template <int ROWS>
    static inline void add(const bf16* a, int64_t stride, const W* panel, vf (*total)[2]) {
        const __m512bh left = load_pairs(panel), right = load_pairs(panel + PANEL);
        for (int r = 0; r < ROWS; r++) {
            int32_t bits;
            std::memcpy(&bits, a + r * stride, sizeof bits);
            const auto pair = (__m512bh)_mm512_set1_epi32(bits);
            total[r][0] = (vf)_mm512_dpbf16_ps((__m512)total[r][0], pair, left);
            total[r][1] = (vf)_mm512_dpbf16_ps((__m512)total[r][1], pair, right);
        }
    }
};
#else
inline void widen(const int8_t* from, bf16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) store(to + i, load(from + i));
}

template <typename W>
struct Step<bf16, W> {
    static constexpr int DEPTH = 2;

    template <int ROWS>
    static inline void add(const bf16* a, int64_t stride, const W* panel, vf (*total)[2]) {
        for (int half = 0; half < 2; half++) {
            const vf low = load(panel + half * PANEL), high = load(panel + half * PANEL + LANES);
            const vf even = evens(low, high), odd = odds(low, high);
            for (int r = 0; r < ROWS; r++)
                total[r][half] += one(a + r * stride) * even + one(a + r * stride + 1) * odd;
        }
    }
};
#endif

// Rows of a [ROWS, depth], `stride` apart, times a panel; done(row, left, right) gets the two halves of each result.
// The result of a row is the same whatever the number of rows.
template <typename T, int ROWS, typename W, typename Done>
inline void multiply_tile(const T* a, int64_t stride, const W* panel, int64_t depth, Done done) {
    vf total[ROWS][2] = {};
    constexpr int STEP = Step<T, W>::DEPTH;
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k += STEP) {
        const W* at = panel + k * PANEL;
        for (size_t line = 0; line < STEP * PANEL * sizeof(W); line += 64)
            __builtin_prefetch((const char*)at + AHEAD + line);
        Step<T, W>::template add<ROWS>(a + k, stride, at, total);
    }
    for (int r = 0; r < ROWS; r++) done(r, total[r][0], total[r][1]);
}

// The same for `count` rows, which is at most ROWS.
template <typename T, int ROWS, typename W, typename Done>
inline void multiply_up_to(int64_t count, const T* a, int64_t stride, const W* panel, int64_t depth, Done done) {
    if constexpr (ROWS > 1) {
        if (count < ROWS) return multiply_up_to<T, ROWS - 1>(count, a, stride, panel, depth, done);
    }
    multiply_tile<T, ROWS>(a, stride, panel, depth, done);
}

// The same for any number of rows: in as few tiles as there can be, of even sizes.
template <typename T, typename W, typename Done>
inline void multiply_rows(const T* a, int64_t stride, int64_t rows, const W* panel, int64_t depth, Done done) {
    for (int64_t row = 0; row < rows;) {
        const int64_t left = rows - row, tiles = (left + TILE - 1) / TILE, count = (left + tiles - 1) / tiles;
        multiply_up_to<T, TILE>(count, a + row * stride, stride, panel, depth,
                                [&](int r, vf low, vf high) { done(row + r, low, high); });
        row += count;
    }
}
