// What Python calls. A library is of one type of numbers, NUMBER: float or bf16; and of the heads of one model.
#include "layers.h"

namespace {

using T = NUMBER;

constexpr int64_t SERIAL = 1 << 15;  // numbers below which waking a second thread costs more than it saves

int worth(int threads, int64_t numbers) { return numbers > SERIAL ? threads : 1; }

}  // namespace

extern "C" {

// Columns of a panel.
int32_t midstream_panel() { return PANEL; }

// Whether products are worth packing weights for on this processor.
int32_t midstream_has_products() { return has_products<T>(); }

// 0, with nothing done, where heads of this size have no kernel.
int32_t midstream_attend(const Attention* a) {
    bool served = true;
    with_team(a->threads, [&](Team& team) {
        const bool mine = attend_in_team<T>(team, *a);
        if (team.me == 0) served = mine;
    });
    return served;
}

void midstream_add_norm(const Norm* n, int32_t threads) {
    with_team(worth(threads, n->rows * n->dim), [&](Team& team) { add_norm_in_team<T>(team, *n); });
}

void midstream_rotate(const Rotary* r, int32_t threads) {
    with_team(worth(threads, r->rows * r->heads * r->dim), [&](Team& team) { rotate_in_team<T>(team, *r); });
}

void midstream_gated(const void* both, void* out, int64_t rows, int64_t width, int32_t threads) {
    with_team(worth(threads, rows * width),
              [&](Team& team) { gated_in_team<T>(team, (const T*)both, (T*)out, rows, width); });
}

void midstream_product(const Weight* w, const void* x, void* y, int64_t rows, int32_t threads) {
    with_team(threads, [&](Team& team) { product_in_team<T>(team, *w, (const T*)x, y, rows); });
}

// Of the product `w`, of which only the sizes are read.
void midstream_add_deltas(const Deltas* d, const Weight* w, const void* x, void* y, int32_t threads) {
    const ProductDeltas<T> deltas(*d, 0, *w);
    with_team(threads, [&](Team& team) {
        deltas.down(team, (const T*)x);
        team.wait();
        deltas.up(team, (T*)y);
    });
}

void midstream_run_layers(const Forward* f) { run_layers<T>(*f); }
}
