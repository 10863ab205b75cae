// What stands between a layer's matrix products: norms, rotary positions, the gated activation. All functions are for
// all threads of a team.
#pragma once

#include <cmath>

#include "kv.h"
#include "team.h"
#include "vector.h"

// residual += alpha * update (where there is one); out = residual / rms(residual) * weight. All [rows, dim].
struct Norm {
    void* residual;
    const void* update;
    const void* weight;
    void* out;
    int64_t rows, dim;
    float alpha, eps;
};

template <typename T>
void add_norm_in_team(Team& team, const Norm& n) {
    const int64_t dim = n.dim;
    const float alpha = n.alpha;
    const T* weight = (const T*)n.weight;
    team.rows(n.rows, [&](int64_t r) {
        T *x = (T*)n.residual + r * dim, *y = (T*)n.out + r * dim;
        const T* u = n.update ? (const T*)n.update + r * dim : nullptr;
        const int64_t whole = dim / LANES * LANES;
        vf squares = {};
        float rest = 0;
        for (int64_t d = 0; d < whole; d += LANES) {
            if (u) store(x + d, load(x + d) + alpha * load(u + d));
            const vf v = load(x + d);
            squares += v * v;
        }
        for (int64_t d = whole; d < dim; d++) {
            if (u) put(x + d, one(x + d) + alpha * one(u + d));
            rest += one(x + d) * one(x + d);
        }
        const float scale = 1 / std::sqrt((sum(squares) + rest) / float(dim) + n.eps);
        for (int64_t d = 0; d < whole; d += LANES) store(y + d, load(x + d) * scale * load(weight + d));
        for (int64_t d = whole; d < dim; d++) put(y + d, one(x + d) * scale * one(weight + d));
    });
}

// What one layer's rotary embedding reads and writes.
struct Rotary {
    const void* qkv;     // [rows, heads + 2 kv_heads, dim]: queries, keys, values
    const void* cosine;  // [rows, dim], of a layout whose two halves are the same
    const void* sine;
    void* query;  // [heads, rows, dim]
    KV kv;
    const int64_t* write;  // by row: its slot
    int64_t rows, heads, kv_heads, dim, slots;
};

constexpr int64_t LARGEST_HEAD = 256;

template <typename T, typename To>
inline void rotate(const T* from, const T* cosine, const T* sine, To* to, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d += LANES) {
        const vf a = load(from + d), b = load(from + half + d);
        store(to + d, a * load(cosine + d) - b * load(sine + d));
        store(to + half + d, b * load(cosine + half + d) + a * load(sine + half + d));
    }
}

template <typename T>
inline void put_key(const KV& kv, int64_t place, const T* from, const T* cosine, const T* sine, int64_t dim) {
    if (!kv.key_scales) return rotate(from, cosine, sine, (T*)kv.keys + place * dim, dim);
    alignas(64) float turned[LARGEST_HEAD];
    rotate(from, cosine, sine, turned, dim);
    kv.key_scales[place] = quantize(turned, (int8_t*)kv.keys + place * dim, dim);
}

template <typename T>
inline void put_value(const KV& kv, int64_t place, const T* from, int64_t dim) {
    if (kv.value_scales) kv.value_scales[place] = quantize(from, (int8_t*)kv.values + place * dim, dim);
    else std::memcpy((T*)kv.values + place * dim, from, sizeof(T) * dim);
}

template <typename T>
void rotate_in_team(Team& team, const Rotary& r) {
    const int64_t width = (r.heads + 2 * r.kv_heads) * r.dim;
    team.rows(r.rows, [&](int64_t row) {
        const T* from = (const T*)r.qkv + row * width;
        const T *cosine = (const T*)r.cosine + row * r.dim, *sine = (const T*)r.sine + row * r.dim;
        for (int64_t h = 0; h < r.heads; h++, from += r.dim)
            rotate(from, cosine, sine, (T*)r.query + (h * r.rows + row) * r.dim, r.dim);
        for (int64_t h = 0; h < r.kv_heads; h++, from += r.dim)
            put_key(r.kv, h * r.slots + r.write[row], from, cosine, sine, r.dim);
        for (int64_t h = 0; h < r.kv_heads; h++, from += r.dim)
            put_value(r.kv, h * r.slots + r.write[row], from, r.dim);
    });
}

// out = silu(gate) * up, of [rows, 2 width] that holds both side by side.
template <typename T>
void gated_in_team(Team& team, const T* both, T* out, int64_t rows, int64_t width) {
    const int64_t whole = width / LANES * LANES;
    team.rows(rows, [&](int64_t r) {
        const T *gate = both + 2 * r * width, *up = gate + width;
        T* to = out + r * width;
        for (int64_t d = 0; d < whole; d += LANES) {
            const vf g = larger(all(-87.0f), load(gate + d));  // below it silu is nothing, and e^-g no float
            store(to + d, g / (exponential(-g) + 1.0f) * load(up + d));
        }
        for (int64_t d = whole; d < width; d++) {
            const float g = one(gate + d);
            put(to + d, g / (1 + std::exp(-g)) * one(up + d));
        }
    });
}

// x += alpha * update, both [rows, dim].
template <typename T>
void add_in_team(Team& team, T* x, const T* update, float alpha, int64_t rows, int64_t dim) {
    const int64_t whole = dim / LANES * LANES;
    team.rows(rows, [&](int64_t r) {
        T* to = x + r * dim;
        const T* from = update + r * dim;
        for (int64_t d = 0; d < whole; d += LANES) store(to + d, load(to + d) + alpha * load(from + d));
        for (int64_t d = whole; d < dim; d++) put(to + d, one(to + d) + alpha * one(from + d));
    });
}
