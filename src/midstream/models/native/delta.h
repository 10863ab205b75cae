// The low-rank deltas of adapters: y += scale * B (A x), for the rows that each adapter owns.
#pragma once

#include "vector.h"

// One adapter's factors of one linear layer, and where its outputs stand in the product's rows.
struct Factor {
    const void* a;    // [rank, in]
    const void* b_t;  // [rank, out]
    int64_t rank, out, offset;
    double scale;
};

// Rows `start` to `end` get the deltas of the factors from `first` on (one for each linear layer in the product).
struct Owned {
    int64_t start, end, first, count;
};

struct Deltas {
    const void* x;  // [rows, in]
    void* y;        // [rows, width]
    const Owned* owned;
    const Factor* factors;
    int64_t num_owned, in, width;
    int32_t threads;
};

constexpr int64_t MAX_RANK = 512;

template <typename T, int COUNT>
inline void dots(const T* a, const T* x, int64_t in, float* out) {
    const int64_t whole = in / LANES * LANES;
    vf total[COUNT] = {};
    for (int64_t d = 0; d < whole; d += LANES) {
        const vf factor = load(a + d);
        for (int i = 0; i < COUNT; i++) total[i] += factor * load(x + i * in + d);
    }
    for (int i = 0; i < COUNT; i++) {
        float rest = 0;
        for (int64_t d = whole; d < in; d++) rest += one(a + d) * one(x + i * in + d);
        out[i] = sum(total[i]) + rest;
    }
}

template <typename T, int COUNT>
void add_factor(const Factor& f, const T* x, int64_t in, T* y, int64_t width) {
    float down[MAX_RANK][COUNT];
    for (int64_t j = 0; j < f.rank; j++) {
        dots<T, COUNT>((const T*)f.a + j * in, x, in, down[j]);
        for (int i = 0; i < COUNT; i++) down[j][i] *= float(f.scale);
    }
    const T* b = (const T*)f.b_t;
    const int64_t whole = f.out / LANES * LANES;
    for (int64_t o = 0; o < whole; o += LANES) {
        vf total[COUNT];
        for (int i = 0; i < COUNT; i++) total[i] = load(y + i * width + f.offset + o);
        for (int64_t j = 0; j < f.rank; j++) {
            const vf factor = load(b + j * f.out + o);
            for (int i = 0; i < COUNT; i++) total[i] += down[j][i] * factor;
        }
        for (int i = 0; i < COUNT; i++) store(y + i * width + f.offset + o, total[i]);
    }
    for (int64_t o = whole; o < f.out; o++)
        for (int i = 0; i < COUNT; i++) {
            float total = one(y + i * width + f.offset + o);
            for (int64_t j = 0; j < f.rank; j++) total += down[j][i] * one(b + j * f.out + o);
            put(y + i * width + f.offset + o, total);
        }
}

template <typename T, int COUNT>
void add_rows(const Deltas& d, const Owned& owned, int64_t row) {
    for (int64_t i = 0; i < owned.count; i++)
        add_factor<T, COUNT>(d.factors[owned.first + i], (const T*)d.x + row * d.in, d.in, (T*)d.y + row * d.width,
                             d.width);
}

template <typename T>
void add_deltas(const Deltas& d) {
    constexpr int64_t TILE_ROWS = 4;
    int64_t units = 0;
    for (int64_t g = 0; g < d.num_owned; g++) units += (d.owned[g].end - d.owned[g].start + TILE_ROWS - 1) / TILE_ROWS;
#pragma omp parallel for num_threads(d.threads) if (units > 1) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t g = 0, before = unit;
        for (;; g++) {
            const int64_t tiles = (d.owned[g].end - d.owned[g].start + TILE_ROWS - 1) / TILE_ROWS;
            if (before < tiles) break;
            before -= tiles;
        }
        const int64_t row = d.owned[g].start + before * TILE_ROWS, left = d.owned[g].end - row;
        if (left >= 4) add_rows<T, 4>(d, d.owned[g], row);
        else if (left == 3) add_rows<T, 3>(d, d.owned[g], row);
        else if (left == 2) add_rows<T, 2>(d, d.owned[g], row);
        else add_rows<T, 1>(d, d.owned[g], row);
    }
}
