// The low-rank deltas of adapters: y += scale * B (A x), for the rows that each adapter owns.
#pragma once

#include <type_traits>

#include "product.h"

// One adapter's factor B of one linear layer, packed, and where its outputs stand in the product's rows.
struct Factor {
    const void* b;  // panels of [depth, out]
    int64_t depth;  // the rank, made even
    int64_t out, offset;
    int64_t down;  // the first of its columns of A x
    float scale;
};

// One adapter's factors of one product: of the linear layers in it that the adapter changes.
struct Factors {
    const void* a;  // panels of [in, width]: theirs side by side, as all multiply the same x
    int64_t width;
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
        const auto all = [](const Factors& factors, auto with) { with(factors, factors.width); };
        share(team, 1, all, [&](const auto& unit) { down(unit, x); });
    }

    // For all threads of a team, which have waited for one another since: y += scale * B (A x), done when all are.
    void up(Team& team, T* y) const {
        const auto each_one = [](const Factors& factors, auto with) {
            for (const Factor* f = factors.first; f < factors.first + factors.count; f++) with(*f, f->out);
        };
        share(team, DELTA_PANELS, each_one, [&](const auto& unit) { up(unit, y); });
        team.wait();
    }

  private:
    // Rows of one adapter, and a panel of one of its factors.
    template <typename F>
    struct Unit {
        const F& factor;
        int64_t row, rows;
        int64_t place;  // of its first row in the scratch memory
        int64_t panel;
    };

    // visit(unit) for this thread's share: neighbours, so that what is asked for ahead is its own.
    template <typename Parts, typename Visit>
    void share(const Team& team, int64_t grain, Parts parts, Visit visit) const {
        int64_t total = 0;
        each(grain, parts, [&](const auto&, int64_t) { total++; });
        const int64_t first = total * team.me / team.count, end = total * (team.me + 1) / team.count;
        int64_t number = 0;
        each(grain, parts, [&](auto unit, int64_t last) {
            if (number >= first && number < end)
                for (; unit.panel < last; unit.panel++) visit(unit);
            number++;
        });
    }

    // found(unit of the first panel, end of the panels) for all pieces of work, those of a factor's panels beside one
    // another; parts(factors, with) calls with(factor, columns).
    template <typename Parts, typename Found>
    void each(int64_t grain, Parts parts, Found found) const {
        int64_t before = 0;
        for (const Owned* o = d.owned; o < d.owned + d.num_owned; o++) {
            parts(o->products[product], [&](const auto& factor, int64_t columns) {
                const int64_t panels = (columns + PANEL - 1) / PANEL;
                for (int64_t row = o->start; row < o->end; row += DELTA_ROWS)
                    for (int64_t panel = 0; panel < panels; panel += grain) {
                        const int64_t rows = std::min(o->end - row, DELTA_ROWS), place = before + row - o->start;
                        found(Unit<std::decay_t<decltype(factor)>>{factor, row, rows, place, panel},
                              std::min(panel + grain, panels));
                    }
            });
            before += o->end - o->start;
        }
    }

    void down(const Unit<Factors>& u, const T* x) const {
        const int64_t column = u.panel * PANEL;
        T* to = (T*)d.down + u.place * d.down_width + column;
        multiply_rows(x + u.row * in, in, u.rows, (const T*)u.factor.a + column * in, in,
                      [&](int64_t r, vf left, vf right) {
                          put_panel(to + r * d.down_width, left, right, u.factor.width - column);
                      });
    }

    void up(const Unit<Factor>& u, T* y) const {
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
