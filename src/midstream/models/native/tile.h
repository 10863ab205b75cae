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

// A step of a panel: its left half of the columns and its right one.
struct Halves {
    __m512bh left, right;
};

inline Halves load_halves(const bf16* from) { return {load_pairs(from), load_pairs(from + PANEL)}; }

#ifdef __AVX512VBMI__
// One byte of each whole number below 128 as a bfloat16: the low one or the high one.
struct ByteTable {
    alignas(64) uint8_t bytes[128];

    constexpr explicit ByteTable(int shift) : bytes() {
        for (int i = 1, top = 0; i < 128; i++) {
            while (i >> top > 1) top++;
            bytes[i] = uint8_t(((127 + top) << 7 | (i << (7 - top) & 127)) >> shift);
        }
    }

    __m512i of(__m512i numbers) const {
        return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), numbers, _mm512_load_si512(bytes + 64));
    }
};

constexpr ByteTable LOW_BYTES(0), HIGH_BYTES(8);

// By tables, which is faster than to convert through float32.
inline Halves load_halves(const int8_t* from) {
    const __m512i places = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);  // unpacking puts them in their order again
    const __m512i numbers = _mm512_permutexvar_epi64(places, _mm512_loadu_si512(from));
    const __m512i sizes = _mm512_abs_epi8(numbers), low = LOW_BYTES.of(sizes);
    const __m512i signs = _mm512_and_si512(numbers, _mm512_set1_epi8(-128));
    const __m512i high = _mm512_or_si512(HIGH_BYTES.of(sizes), signs);
    return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
}
#else
inline Halves load_halves(const int8_t* from) { return {load_pairs(from), load_pairs(from + PANEL)}; }
#endif

// Eight-bit weights as the numbers that they are multiplied with, `count` of them: a multiple of a step.
inline void widen(const int8_t* from, bf16* to, int64_t count) {
    for (int64_t i = 0; i < count; i += 2 * PANEL) {
        const Halves halves = load_halves(from + i);
        _mm512_storeu_si512(to + i, (__m512i)halves.left);
        _mm512_storeu_si512(to + i + PANEL, (__m512i)halves.right);
    }
}

template <typename W>
struct Step<bf16, W> {
    static constexpr int DEPTH = 2;

    template <int ROWS>
    static inline void add(const bf16* a, int64_t stride, const W* panel, vf (*total)[2]) {
        const auto [left, right] = load_halves(panel);
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
