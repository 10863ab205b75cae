// Products of a few rows with a panel of a packed matrix: the inner loop of all matrix products here.
#pragma once

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "vector.h"

// A panel holds PANEL columns of a matrix [depth, columns], in the order in which its numbers are used: float32
// [depth][PANEL]; bfloat16 [depth / 2][PANEL][2], neighbours in depth side by side.
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

// One step in depth: total[row] += a[row] · panel.
template <typename T>
struct Step;

template <>
struct Step<float> {
    static constexpr int DEPTH = 1;

    template <int ROWS>
    static inline void add(const float* a, int64_t stride, const float* panel, vf (*total)[2]) {
        const vf left = load(panel), right = load(panel + LANES);
        for (int r = 0; r < ROWS; r++) {
            const vf number = all(a[r * stride]);
            total[r][0] += number * left;
            total[r][1] += number * right;
        }
    }
};

template <>
struct Step<bf16> {
    static constexpr int DEPTH = 2;

#ifdef __AVX512BF16__
    template <int ROWS>
    static inline void add(const bf16* a, int64_t stride, const bf16* panel, vf (*total)[2]) {
        const auto left = (__m512bh)_mm512_loadu_si512(panel), right = (__m512bh)_mm512_loadu_si512(panel + PANEL);
        for (int r = 0; r < ROWS; r++) {
            int32_t bits;
            std::memcpy(&bits, a + r * stride, sizeof bits);
            const auto pair = (__m512bh)_mm512_set1_epi32(bits);
            total[r][0] = (vf)_mm512_dpbf16_ps((__m512)total[r][0], pair, left);
            total[r][1] = (vf)_mm512_dpbf16_ps((__m512)total[r][1], pair, right);
        }
    }
#else
    template <int ROWS>
    static inline void add(const bf16* a, int64_t stride, const bf16* panel, vf (*total)[2]) {
        for (int half = 0; half < 2; half++) {
            vu pairs;
            std::memcpy(&pairs, panel + half * PANEL, sizeof pairs);
            const vf even = (vf)(pairs << 16), odd = (vf)(pairs & 0xffff0000u);
            for (int r = 0; r < ROWS; r++)
                total[r][half] += one(a + r * stride) * even + one(a + r * stride + 1) * odd;
        }
    }
#endif
};

// Rows of a [ROWS, depth], `stride` apart, times a panel; done(row, left, right) gets the two halves of each result.
template <typename T, int ROWS, typename Done>
inline void multiply_tile(const T* a, int64_t stride, const T* panel, int64_t depth, Done done) {
    vf total[ROWS][2] = {};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k += Step<T>::DEPTH)
        Step<T>::template add<ROWS>(a + k, stride, panel + k * PANEL, total);
    for (int r = 0; r < ROWS; r++) done(r, total[r][0], total[r][1]);
}
