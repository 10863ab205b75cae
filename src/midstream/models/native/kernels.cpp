// What Python calls. Every function takes the type of the numbers: 0 for float32, 1 for bfloat16.
#include "attention.h"
#include "delta.h"
#include "pointwise.h"

extern "C" {

// 0, with nothing done, where heads of this size have no kernel.
int32_t midstream_attend(const Attention* a, int32_t type) { return type ? attend<bf16>(*a) : attend<float>(*a); }

void midstream_add_norm(const Norm* n, int32_t type) { type ? add_norm<bf16>(*n) : add_norm<float>(*n); }

void midstream_rotate(const Rotary* r, int32_t type) { type ? rotate_and_write<bf16>(*r) : rotate_and_write<float>(*r); }

void midstream_gated(const void* both, void* out, int64_t rows, int64_t width, int32_t threads, int32_t type) {
    type ? gated((const bf16*)both, (bf16*)out, rows, width, threads)
         : gated((const float*)both, (float*)out, rows, width, threads);
}

void midstream_add_deltas(const Deltas* d, int32_t type) { type ? add_deltas<bf16>(*d) : add_deltas<float>(*d); }
}
