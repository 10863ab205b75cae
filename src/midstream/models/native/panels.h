// Keys and values of a range, packed as the panels that tile.h multiplies with.
#pragma once

#include <type_traits>
#include <utility>

#include "tile.h"

// The type in which panels are multiplied: bfloat16 where the processor does that itself, else float32.
#ifdef __AVX512BF16__
template <typename T>
using Multiplied = T;
#else
template <typename T>
using Multiplied = float;
#endif

// Four bytes in each lane: one float32, or two neighbours of bfloat16.
template <typename C, typename T>
inline vu words(const T* from) {
    vu found;
    if constexpr (std::is_same_v<C, T>) std::memcpy(&found, from, sizeof found);
    else if constexpr (std::is_same_v<C, float>) found = (vu)load(from);
    else found = (vu)load_pairs(from);
    return found;
}

// The blocks of S x S words off the diagonal change places.
template <int S, int... LANE>
inline void exchange(vu& a, vu& b, std::integer_sequence<int, LANE...>) {
    const vu first = __builtin_shufflevector(a, b, (LANE & S ? LANES + LANE - S : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & S ? LANES + LANE : LANE + S)...);
    a = first;
}

template <int S = LANES / 2>
inline void transpose(vu (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, LANES>());
    if constexpr (S > 1) transpose<S / 2>(rows);
}

// Asks for the row that lies `rows` of them behind this one: the processor's own guesses end with each page.
template <int DIM, typename T>
inline void ask_for(const T* row, int rows) {
    for (int line = 0; line < int(DIM * sizeof(T)); line += 64)
        __builtin_prefetch((const char*)(row + int64_t(rows) * DIM) + line, 0, 2);
}

// keys [length, DIM] to one panel for every PANEL of them, over all of DIM. The last is filled up with nought. The
// `next` keys behind these are asked for.
template <typename C, int DIM, typename T>
void pack_keys(const T* keys, int length, int next, C* panels) {
    constexpr int DEPTH = Step<C>::DEPTH, WORDS = DIM / DEPTH;
    const int whole = (length + PANEL - 1) / PANEL * PANEL;
    for (int from = 0; from < whole; from += LANES) {
        C* to = panels + from / PANEL * PANEL * DIM + from % PANEL * DEPTH;
        for (int i = 0; i < LANES; i++) ask_for<DIM>(keys + (from + i) * DIM, next);
        for (int word = 0; word < WORDS; word += LANES) {
            vu rows[LANES];
            for (int i = 0; i < LANES; i++)
                rows[i] = from + i < length ? words<C>(keys + (from + i) * DIM + word * DEPTH) : vu{};
            transpose(rows);
            for (int i = 0; i < LANES; i++) std::memcpy(to + (word + i) * PANEL * DEPTH, &rows[i], sizeof rows[i]);
        }
    }
}

// values [length, DIM] to one panel for every PANEL numbers of them, over all keys; `stride` numbers lie between two.
template <int DIM, typename T>
void pack_values(const T* values, int length, int next, float* panels, int64_t stride) {
    for (int k = 0; k < length; k++) {
        ask_for<DIM>(values + k * DIM, next);
        for (int d = 0; d < DIM; d += LANES)
            store(panels + d / PANEL * stride + k * PANEL + d % PANEL, load(values + k * DIM + d));
    }
}

#ifdef __AVX512BF16__
template <int DIM, typename T>
void pack_values(const T* values, int length, int next, bf16* panels, int64_t stride) {
    alignas(64) static constexpr uint16_t pairs[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(pairs), high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    for (int k = 0; k < length; k += 2) {
        ask_for<2 * DIM>(values + k * DIM, next / 2);
        for (int d = 0; d < DIM; d += PANEL) {
            const __m512i even = (__m512i)load_pairs(values + k * DIM + d);
            const __m512i odd = k + 1 < length ? (__m512i)load_pairs(values + (k + 1) * DIM + d) : __m512i{};
            bf16* to = panels + d / PANEL * stride + k * PANEL;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + PANEL, _mm512_permutex2var_epi16(even, high, odd));
        }
    }
}
#endif
