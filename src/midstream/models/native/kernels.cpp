// What Python calls. Every function takes the type of the numbers: 0 for float32, 1 for bfloat16.
#include "layers.h"

namespace {

constexpr int64_t SERIAL = 1 << 15;  // numbers below which waking a second thread costs more than it saves

int worth(int threads, int64_t numbers) { return numbers > SERIAL ? threads : 1; }

template <typename T>
bool attend(const Attention& a) {
    bool served = true;
    with_team(a.threads, [&](Team& team) {
        const bool mine = attend_in_team<T>(team, a);
        if (team.me == 0) served = mine;
    });
    return served;
}

template <typename T>
void add_norm(const Norm& n, int32_t threads) {
    with_team(worth(threads, n.rows * n.dim), [&](Team& team) { add_norm_in_team<T>(team, n); });
}

template <typename T>
void rotate(const Rotary& r, int32_t threads) {
    with_team(worth(threads, r.rows * r.heads * r.dim), [&](Team& team) { rotate_in_team<T>(team, r); });
}

template <typename T>
void gated(const void* both, void* out, int64_t rows, int64_t width, int32_t threads) {
    with_team(worth(threads, rows * width),
              [&](Team& team) { gated_in_team<T>(team, (const T*)both, (T*)out, rows, width); });
}

template <typename T>
void product(const Weight& w, const void* x, void* y, int64_t rows, int32_t threads) {
    with_team(threads, [&](Team& team) { product_in_team<T>(team, w, (const T*)x, y, rows); });
}

template <typename T>
void add_deltas(const Deltas& d, const Weight& w, const void* x, void* y, int32_t threads) {
    const ProductDeltas<T> deltas(d, 0, w);
    with_team(threads, [&](Team& team) {
        deltas.down(team, (const T*)x);
        team.wait();
        deltas.up(team, (T*)y);
    });
}

}  // namespace

extern "C" {

// Columns of a panel.
int32_t midstream_panel() { return PANEL; }

// Whether products of this type are worth packing weights for on this processor.
int32_t midstream_has_products(int32_t type) { return type ? has_products<bf16>() : has_products<float>(); }

// 0, with nothing done, where heads of this size have no kernel.
int32_t midstream_attend(const Attention* a, int32_t type) { return type ? attend<bf16>(*a) : attend<float>(*a); }

void midstream_add_norm(const Norm* n, int32_t threads, int32_t type) {
    type ? add_norm<bf16>(*n, threads) : add_norm<float>(*n, threads);
}

void midstream_rotate(const Rotary* r, int32_t threads, int32_t type) {
    type ? rotate<bf16>(*r, threads) : rotate<float>(*r, threads);
}

void midstream_gated(const void* both, void* out, int64_t rows, int64_t width, int32_t threads, int32_t type) {
    type ? gated<bf16>(both, out, rows, width, threads) : gated<float>(both, out, rows, width, threads);
}

void midstream_product(const Weight* w, const void* x, void* y, int64_t rows, int32_t threads, int32_t type) {
    type ? product<bf16>(*w, x, y, rows, threads) : product<float>(*w, x, y, rows, threads);
}

// Of the product `w`, of which only the sizes are read.
void midstream_add_deltas(const Deltas* d, const Weight* w, const void* x, void* y, int32_t threads, int32_t type) {
    type ? add_deltas<bf16>(*d, *w, x, y, threads) : add_deltas<float>(*d, *w, x, y, threads);
}

void midstream_run_layers(const Forward* f, int32_t type) { type ? run_layers<bf16>(*f) : run_layers<float>(*f); }
}
