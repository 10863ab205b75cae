// Attention of many query vectors to ranges of the pool. Scores and weighted values are products of tiles of query
// vectors with panels of keys and values, which are packed once for all vectors of a block.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "kv.h"
#include "panels.h"

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.69314718055994531f;
// Behind every position, and far enough from what int64_t holds that sums stay within it.
constexpr int64_t NO_END = int64_t(1) << 60;

// 2^x for x <= 0, which is nothing below 2^-126: x = n + r, a polynomial in r, and n put into the exponent. Its
// relative error is below 2e-7; where the result will be rounded to bfloat16, below 1e-4.
template <typename C>
inline vf power_of_two(vf x) {
    const vf lowest = all(-127.0f);
    x = x < lowest ? lowest : x;
    const float shift = 12582912.0f + 127.0f;  // 3 * 2^22: a float this large has no bits for less than one
    const vf moved = x + shift, r = x - (moved - shift);
    vf p;
    if constexpr (sizeof(C) == sizeof(float)) {
        p = all(1.5345812057e-4f);
        p = p * r + 1.3399931347e-3f;
        p = p * r + 9.6184889580e-3f;
        p = p * r + 5.5503287766e-2f;
        p = p * r + 2.4022646891e-1f;
        p = p * r + 6.9314720574e-1f;
        p = p * r + 1.0f;
    } else {
        p = all(5.5171669592e-2f);
        p = p * r + 2.4261113041e-1f;
        p = p * r + 6.9326098607e-1f;
        p = p * r + 9.9992807305e-1f;
    }
    return p * (vf)((vu)moved << 23);  // whose lowest bits are n + 127
}

inline void store_both(float* to, vf left, vf right) {
    store(to, left);
    store(to + LANES, right);
}

#ifdef __AVX512BF16__
inline void store_both(bf16* to, vf left, vf right) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(to, &both, sizeof both);
}
#endif

// Query vectors of one KV head, and the softmax of what they have seen so far. Their rows stand at ascending positions;
// each sees the keys at positions up to its own `last`, of them the nearest `window`. What a vector gets does not
// depend on the others beside it: each has its own maximum, and keys hidden from it weigh exactly nothing.
template <typename T, int DIM>
struct QueryBlock {
    using C = Multiplied<T>;
    static constexpr int KEYS = DIM <= 64 ? 128 : DIM <= 128 ? 64 : 32;  // packed at a time; they stay in the L1 cache
    static constexpr int MOST = 12288 / DIM;                            // vectors: 48 KB of results
    static constexpr int REST = TILE / 3;                               // rows of the tiles that the others leave

    alignas(64) C queries[MOST][DIM];
    alignas(64) float result[MOST][DIM];
    vf total[MOST];  // the sum of weights, lane by lane
    float maximum[MOST];
    int64_t last[MOST];
    alignas(64) C keys[KEYS * DIM];
    alignas(64) C values[KEYS * DIM];
    alignas(64) float factors[KEYS], worths[KEYS];  // of the scores, whose powers are of two, and of the weights
    int64_t window;
    float factor;
    int count = 0;

    QueryBlock(float scale, int64_t window) : window(window), factor(scale * LOG2_E) {
        std::fill_n(factors, KEYS, factor);
        std::fill_n(worths, KEYS, 1.0f);
    }

    void add(const T* query, int64_t position) {
        for (int d = 0; d < DIM; d += LANES) {
            if constexpr (std::is_same_v<C, T>) std::memcpy(queries[count] + d, query + d, LANES * sizeof(T));
            else store(queries[count] + d, load(query + d));
            store(result[count] + d, vf{});
        }
        total[count] = vf{};
        maximum[count] = -FLT_MAX;  // and not infinity, whose difference from a hidden key's score is no number
        last[count++] = position;
    }

    // Fills the last tile up.
    void close() {
        const int64_t position = last[count - 1];
        const T nothing[DIM] = {};
        while (count % REST) add(nothing, position);
    }

    // Compiled once for chunks and blocks, as are the tiles, which keeps compiling short.
    // `length` keys at positions from `position` on, and their values: those that lie in `kv` from `place` on.
    __attribute__((noinline)) void see(const KV& kv, int64_t place, int64_t position, int64_t length) {
        const int64_t end = std::min(length, last[count - 1] + 1 - position);
        // From a multiple of KEYS on, so that keys are taken together no matter which rows see them.
        const int64_t begin = std::max<int64_t>(0, last[0] + 1 - window - position) / KEYS * KEYS;
        for (int64_t at = begin; at < end; at += KEYS) {
            const int found = int(std::min<int64_t>(KEYS, end - at));
            if (kv.key_scales) {
                pack<int8_t>(kv, place + at, found);
                for (int k = 0; k < found; k++) {
                    factors[k] = kv.key_scales[place + at + k] * factor;
                    worths[k] = kv.value_scales[place + at + k];
                }
                std::fill(worths + found, worths + KEYS, 0.0f);  // nothing that is no number stays from others
            } else {
                pack<T>(kv, place + at, found);
            }
            int v = 0;
            for (; v + TILE <= count; v += TILE) see_tile<TILE>(v, position + at, found);
            for (; v < count; v += REST) see_tile<REST>(v, position + at, found);
        }
    }

    template <typename S>
    void pack(const KV& kv, int64_t place, int found) {
        pack_keys<C, DIM>((const S*)kv.keys + place * DIM, found, KEYS, keys);
        pack_values<DIM>((const S*)kv.values + place * DIM, found, KEYS, values, KEYS * PANEL);
    }

    template <int ROWS>
    __attribute__((noinline)) void see_tile(int v, int64_t position, int found) {
        const int64_t end = last[v + ROWS - 1] + 1 - position, begin = last[v] + 1 - window - position;
        if (end <= 0 || begin >= found) return;
        const int seen = int(std::min<int64_t>(found, end)), columns = (seen + PANEL - 1) / PANEL * PANEL;
        alignas(64) float scores[ROWS][KEYS];
        alignas(64) C weights[ROWS][KEYS];
        for (int k = 0; k < columns; k += PANEL)
            multiply_tile<C, ROWS>(queries[v], DIM, keys + k * DIM, DIM, [&](int r, vf left, vf right) {
                store(scores[r] + k, left * load(factors + k));
                store(scores[r] + k + LANES, right * load(factors + k + LANES));
            });
        const bool whole = columns == found && last[v] + 1 - position >= found;
        const bool all_see_all = whole && last[v + ROWS - 1] + 1 - window <= position;
        for (int r = 0; r < ROWS; r++) {
            if (!all_see_all) hide(scores[r], columns, found, last[v + r] + 1 - position);
            weigh(scores[r], weights[r], columns, v + r);
        }
        const int depth = (seen + Step<C>::DEPTH - 1) / Step<C>::DEPTH * Step<C>::DEPTH;
        for (int d = 0; d < DIM; d += PANEL)
            multiply_tile<C, ROWS>(weights[0], KEYS, values + d * KEYS, depth, [&](int r, vf left, vf right) {
                float* to = result[v + r] + d;
                store(to, load(to) + left);
                store(to + LANES, load(to + LANES) + right);
            });
    }

    // All columns but the `window` before `end`, and those behind the keys that were found.
    void hide(float* scores, int columns, int found, int64_t end) const {
        alignas(64) static constexpr int32_t numbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        vi first;
        std::memcpy(&first, numbers, sizeof first);
        const int high = int(std::min<int64_t>(found, std::max<int64_t>(0, end)));
        const int low = int(std::min<int64_t>(found, std::max<int64_t>(0, end - window)));
        for (int k = 0; k < columns; k += LANES) {
            const vi place = first + k;
            const vi shown = (place >= low) & (place < high);
            store(scores + k, shown ? load(scores + k) : all(-std::numeric_limits<float>::infinity()));
        }
    }

    // Scores to weights 2^(score - maximum), which are stored times what their values are worth; what was summed under a
    // smaller maximum before is scaled down.
    void weigh(const float* scores, C* weights, int columns, int v) {
        vf highest = load(scores);
        for (int k = LANES; k < columns; k += LANES) highest = larger(highest, load(scores + k));
        if (any_above(highest, maximum[v])) {
            const float found = largest(highest), shrink = std::exp2(maximum[v] - found);
            total[v] *= shrink;
            for (int d = 0; d < DIM; d += LANES) store(result[v] + d, load(result[v] + d) * shrink);
            maximum[v] = found;
        }
        vf sums = total[v];
        const vf top = all(maximum[v]);
        for (int k = 0; k < columns; k += PANEL) {
            const vf left = power_of_two<C>(load(scores + k) - top);
            const vf right = power_of_two<C>(load(scores + k + LANES) - top);
            sums += left;
            sums += right;
            store_both(weights + k, left * load(worths + k), right * load(worths + k + LANES));
        }
        total[v] = sums;
    }

    // For the merge with what it has seen elsewhere: the sum of weighted values, the maximum in powers of e, the sum.
    void give(int v, float* to) const {
        std::memcpy(to, result[v], sizeof result[v]);
        to[DIM] = maximum[v] * LN_2;
        to[DIM + 1] = sum(total[v]);
    }

    void finish(int v, T* out) const {
        const float weight = sum(total[v]), share = weight > 0 ? 1 / weight : 0;
        for (int d = 0; d < DIM; d += LANES) store(out + d, load(result[v] + d) * share);
    }
};
