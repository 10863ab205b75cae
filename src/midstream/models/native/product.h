// The base model's matrix products: y = x Wᵀ + bias, of weights packed into panels.
#pragma once

#include <vector>

#include "team.h"
#include "tile.h"

// A packed weight [out, in]. Eight-bit ones have a scale for each output; other ones have no scales.
struct Weight {
    const void* panels;
    const void* bias;  // [out], or none
    const float* scales;
    int64_t in, out;
    int64_t wide;  // whether y is of float32 where x is not
};

constexpr int64_t CACHED = 512 * 1024;  // bytes of x that stay in a core's cache while panels pass by

// What of a panel stands in the result: all but the last panel's columns that only fill it.
template <typename T>
inline void put_panel(T* to, vf left, vf right, int64_t columns) {
    if (columns >= PANEL) {
        store(to, left);
        store(to + LANES, right);
        return;
    }
    T both[PANEL];
    store(both, left);
    store(both + LANES, right);
    std::memcpy(to, both, sizeof(T) * columns);
}

template <typename T>
inline void get_panel(const T* from, int64_t columns, vf& left, vf& right) {
    T both[PANEL] = {};
    if (columns < PANEL) {
        std::memcpy(both, from, sizeof(T) * columns);
        from = both;
    }
    left = load(from);
    right = load(from + LANES);
}

template <typename T>
inline void times_panel(const Weight& w, const T* x, void* y, int64_t rows, int64_t panel) {
    const int64_t column = panel * PANEL, columns = w.out - column;
    const auto put = [&](int64_t r, vf left, vf right) {
        const int64_t place = r * w.out + column;
        w.wide ? put_panel((float*)y + place, left, right, columns) : put_panel((T*)y + place, left, right, columns);
    };
    vf bias[2] = {}, scale[2];
    if (w.bias) get_panel((const T*)w.bias + column, columns, bias[0], bias[1]);
    if (!w.scales) {
        const auto done = [&](int64_t r, vf left, vf right) {
            put(r, left + bias[0], right + bias[1]);
        };
        multiply_rows(x, w.in, rows, (const T*)w.panels + panel * PANEL * w.in, w.in, done);
        return;
    }
    get_panel(w.scales + column, columns, scale[0], scale[1]);
    const auto done = [&](int64_t r, vf left, vf right) {
        put(r, left * scale[0] + bias[0], right * scale[1] + bias[1]);
    };
    const int8_t* eight = (const int8_t*)w.panels + panel * PANEL * w.in;
    if (rows <= 2 * TILE) {
        multiply_rows(x, w.in, rows, eight, w.in, done);
        return;
    }
    // Whole numbers are exact in both types, so the results are those of few rows.
    thread_local std::vector<T> wide;
    wide.resize(size_t(PANEL * w.in));
    widen(eight, wide.data(), PANEL * w.in);
    multiply_rows(x, w.in, rows, wide.data(), w.in, done);
}

// For all threads of a team: x [rows, in] → y [rows, out].
template <typename T>
void product_in_team(Team& team, const Weight& w, const T* x, void* y, int64_t rows) {
    const int64_t size = w.wide ? sizeof(float) : sizeof(T);
    if (!rows) return;
    const int64_t panels = (w.out + PANEL - 1) / PANEL;
    const int64_t most = CACHED / int64_t(w.in * sizeof(T)) / TILE * TILE, cached = most < TILE ? TILE : most;
    const int64_t blocks = (rows + cached - 1) / cached, even = (rows + blocks - 1) / blocks;
    const int64_t block = (even + TILE - 1) / TILE * TILE;
    team.each(blocks * panels, [&](int64_t unit) {
        const int64_t first = unit / panels * block, left = rows - first;
        if (left <= 0) return;
        void* to = (char*)y + first * w.out * size;
        times_panel(w, x + first * w.in, to, left < block ? left : block, unit % panels);
    });
}
