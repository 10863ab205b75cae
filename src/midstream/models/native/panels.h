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

// keys [length, DIM] to one panel for every PANEL of them, over all of DIM. The last is filled up with nought.
template <typename C, int DIM, typename T>
void pack_keys(const T* keys, int length, C* panels) {
    constexpr int DEPTH = Step<C>::DEPTH, WORDS = DIM / DEPTH;
    const int whole = (length + PANEL - 1) / PANEL * PANEL;
    for (int from = 0; from < whole; from += LANES) {
        C* to = panels + from / PANEL * PANEL * DIM + from % PANEL * DEPTH;
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
void pack_values(const T* values, int length, float* panels, int64_t stride) {
    for (int k = 0; k < length; k++)
        for (int d = 0; d < DIM; d += LANES)
            store(panels + d / PANEL * stride + k * PANEL + d % PANEL, load(values + k * DIM + d));
}

template <int DIM, typename T>
void pack_values(const T* values, int length, bf16* panels, int64_t stride) {
    for (int k = 0; k < length; k += 2)
        for (int d = 0; d < DIM; d += LANES) {
            const vf even = load(values + k * DIM + d), odd = k + 1 < length ? load(values + (k + 1) * DIM + d) : vf{};
            const vu pairs = (vu)even >> 16 | (vu)odd;  // bfloat16s, whose lower halves are nought
            std::memcpy(panels + d / PANEL * stride + k * PANEL + d % PANEL * 2, &pairs, sizeof pairs);
        }
}
