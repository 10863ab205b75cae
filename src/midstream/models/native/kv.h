// One layer's keys and values, as the pool holds them.
#pragma once

#include <limits>

#include "vector.h"

// Of the model's type; or, with scales, whole numbers of -127 to 127 and what one of them is worth in its slot.
struct KV {
    void *keys, *values;                // [kv_heads, slots, dim]
    float *key_scales, *value_scales;  // [kv_heads, slots], or none
};

// Rounds numbers to 127ths of their largest magnitude. Returns the scale, which is NaN where one of them is not finite.
template <typename T>
inline float quantize(const T* from, int8_t* to, int64_t dim) {
    vf highest = {}, broken = {};
    for (int64_t d = 0; d < dim; d += LANES) {
        const vf v = load(from + d);
        highest = larger(highest, larger(v, -v));
        broken += v - v;
    }
    const float scale = largest(highest) / 127 + sum(broken);
    const vf worth = all(scale > 0 ? scale : std::numeric_limits<float>::infinity());
    for (int64_t d = 0; d < dim; d += LANES) {
        const vf v = load(from + d) / worth;
        // A scale so small that it is of few bits would give larger numbers.
        const vf most = v < 127.0f ? v : all(127.0f);
        store(to + d, larger(most, all(-127.0f)));
    }
    return scale;
}
