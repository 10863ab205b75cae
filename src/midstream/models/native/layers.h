// All decoder layers of a model in one call: norm, attention with rotary positions, norm, gated perceptron.
#pragma once

#include "attention.h"
#include "delta.h"
#include "pointwise.h"
#include "product.h"

struct Layer {
    const void *first_norm, *second_norm;
    Weight qkv, o, gate_up, down;
    float first_eps, second_eps;
};

// One step: what its rows are, and memory for what lies between the products.
struct Forward {
    void* x;  // [rows, hidden], changed in place
    void *normed, *update;  // [rows, hidden]
    void* qkv;              // [rows, (heads + 2 kv_heads) dim]
    void *query, *attended;  // [heads, rows, dim], [rows, heads, dim]
    void *both, *gated;      // [rows, 2 width], [rows, width]
    const void *cosine, *sine;  // [rows, dim]
    const int64_t* write;       // by row: its slot
    const Layer* layers;
    const KV* kv;                        // by layer
    const Attention* const* attention;   // by layer: all but what is in this struct
    const Deltas* deltas;                // whose products are each layer's four in turn; or none
    int64_t num_layers, rows, hidden, heads, kv_heads, dim, slots, width;
    float residual_scale;
    int32_t threads;
};

template <typename T>
class LayerRun {
  public:
    explicit LayerRun(const Forward& forward) : f(forward) {}

    // For all threads of a team.
    void layer(Team& team, int64_t index) const {
        const Layer& layer = f.layers[index];
        const int64_t first = 4 * index;
        const float scale = f.residual_scale;
        const void* before = index ? f.update : nullptr;  // what the layer before has not added yet
        add_norm_in_team<T>(team, {f.x, before, layer.first_norm, f.normed, f.rows, f.hidden, scale, layer.first_eps});
        product(team, layer.qkv, first, f.normed, f.qkv);
        rotate_in_team<T>(team, {f.qkv, f.cosine, f.sine, f.query, f.kv[index], f.write, f.rows, f.heads,
                           f.kv_heads, f.dim, f.slots});
        attend(team, index);
        product(team, layer.o, first + 1, f.attended, f.update);
        add_norm_in_team<T>(team, {f.x, f.update, layer.second_norm, f.normed, f.rows, f.hidden, scale, layer.second_eps});
        product(team, layer.gate_up, first + 2, f.normed, f.both);
        gated_in_team<T>(team, (const T*)f.both, (T*)f.gated, f.rows, f.width);
        product(team, layer.down, first + 3, f.gated, f.update);
    }

    // What the last layer has not added.
    void finish(Team& team) const {
        add_in_team<T>(team, (T*)f.x, (const T*)f.update, f.residual_scale, f.rows, f.hidden);
    }

  private:
    void product(Team& team, const Weight& weight, int64_t number, const void* x, void* y) const {
        if (!f.deltas) return product_in_team<T>(team, weight, (const T*)x, y, f.rows);
        const ProductDeltas<T> deltas(*f.deltas, number, weight);
        deltas.down(team, (const T*)x);
        product_in_team<T>(team, weight, (const T*)x, y, f.rows);
        deltas.up(team, (T*)y);
    }

    void attend(Team& team, int64_t index) const {
        Attention a = *f.attention[index];
        a.query = f.query;
        a.kv = f.kv[index];
        a.out = f.attended;
        attend_in_team<T>(team, a);
    }

    const Forward& f;
};

template <typename T>
void run_layers(const Forward& f) {
    const LayerRun<T> run(f);
    with_team(f.threads, [&](Team& team) {
        for (int64_t i = 0; i < f.num_layers; i++) run.layer(team, i);
        run.finish(team);
    });
}
