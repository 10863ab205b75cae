// The low-rank deltas of adapters: y += scale * B (A x), for the rows that each adapter owns.
#pragma once

#include "product.h"

// One adapter's factors of one linear layer, packed, and where its outputs stand in the product's rows.
struct Factor {
    const void* a;  // panels of [in, depth]
    const void* b;  // panels of [depth, out]
    int64_t depth;  // the rank, made even
    int64_t out, offset;
    int64_t down;  // the first of its columns in the scratch memory
    float scale;
};

// One adapter's factors of one product: one for each linear layer in it that the adapter changes.
struct Factors {
    const Factor* first;
    int64_t count;
};

// Rows `start` to `end` belong to an adapter; `products` are its factors of all products, in their order.
struct Owned {
    int64_t start, end;
    const Factors* products;
};

// The adapters of a step.
struct Deltas {
    const Owned* owned;
    void* down;  // [rows of all owned ranges, down_width]: A x
    int64_t num_owned, down_width;
};

constexpr int64_t DELTA_ROWS = 48, DELTA_PANELS = 4;  // of a unit of work

// The deltas of one product of a step: x [rows, in] → y [rows, width].
template <typename T>
class ProductDeltas {
  public:
    ProductDeltas(const Deltas& deltas, int64_t which, const Weight& product)
        : d(deltas), product(which), in(product.in), width(product.out) {}

    // For all threads of a team: A x. Others may be at it still when this one is done.
    void down(Team& team, const T* x) const {
        share(team, 1, [](const Factor& f) { return f.depth; }, [&](const Unit& u) { down(u, x); });
    }

    // For all threads of a team, which have waited for one another since: y += scale * B (A x), done when all are.
    void up(Team& team, T* y) const {
        share(team, DELTA_PANELS, [](const Factor& f) { return f.out; }, [&](const Unit& u) { up(u, y); });
        team.wait();
    }

  private:
    // Rows of one adapter, and a panel of one of its factors.
    struct Unit {
        const Factor& factor;
        int64_t row, rows;
        int64_t place;  // of its first row in the scratch memory
        int64_t panel;
    };

    // visit(unit) for this thread's share: neighbours, so that what is asked for ahead is its own.
    template <typename Columns, typename Visit>
    void share(const Team& team, int64_t grain, Columns columns, Visit visit) const {
        int64_t total = 0;
        each(grain, columns, [&](const Factor&, int64_t, int64_t, int64_t, int64_t, int64_t) { total++; });
        const int64_t first = total * team.me / team.count, end = total * (team.me + 1) / team.count;
        int64_t number = 0;
        each(grain, columns, [&](const Factor& f, int64_t row, int64_t rows, int64_t place, int64_t panel, int64_t last) {
            if (number >= first && number < end)
                for (int64_t p = panel; p < last; p++) visit({f, row, rows, place, p});
            number++;
        });
    }

    // found(factor, row, rows, place, first panel, end) for all units, those of a factor's panels beside one another.
    template <typename Columns, typename Found>
    void each(int64_t grain, Columns columns, Found found) const {
        int64_t before = 0;
        for (const Owned* o = d.owned; o < d.owned + d.num_owned; o++) {
            const Factors& factors = o->products[product];
            for (const Factor* f = factors.first; f < factors.first + factors.count; f++) {
                const int64_t panels = (columns(*f) + PANEL - 1) / PANEL;
                for (int64_t row = o->start; row < o->end; row += DELTA_ROWS)
                    for (int64_t panel = 0; panel < panels; panel += grain)
                        found(*f, row, std::min(o->end - row, DELTA_ROWS), before + row - o->start, panel,
                              std::min(panel + grain, panels));
            }
            before += o->end - o->start;
        }
    }

    void down(const Unit& u, const T* x) const {
        const int64_t column = u.panel * PANEL;
        T* to = (T*)d.down + u.place * d.down_width + u.factor.down + column;
        multiply_rows(x + u.row * in, in, u.rows, (const T*)u.factor.a + column * in, in,
                      [&](int64_t r, vf left, vf right) {
                          put_panel(to + r * d.down_width, left, right, u.factor.depth - column);
                      });
    }

    void up(const Unit& u, T* y) const {
        const Factor& f = u.factor;
        const int64_t column = u.panel * PANEL;
        T* to = y + u.row * width + f.offset + column;
        multiply_rows((const T*)d.down + u.place * d.down_width + f.down, d.down_width, u.rows,
                      (const T*)f.b + column * f.depth, f.depth, [&](int64_t r, vf left, vf right) {
                          vf low, high;
                          get_panel(to + r * width, f.out - column, low, high);
                          put_panel(to + r * width, low + f.scale * left, high + f.scale * right, f.out - column);
                      });
    }

    const Deltas& d;
    const int64_t product, in, width;
};
