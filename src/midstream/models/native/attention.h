// Attention over extents of the KV pool, in two ways. Rows of short segments: a unit of work is a chunk of one range
// for one KV head, whose keys are read once for all rows that see it; the units' results are merged by their
// log-sum-exp. Rows of long segments: a unit is a block of rows for one KV head, which reads all that its rows see.
#pragma once

#include <cmath>
#include <limits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "kv.h"
#include "prefill.h"
#include "team.h"

// What one step's attention reads and writes. Ranges are cut into `chunks`; a chunk is seen by `count` rows, whose
// numbers stand in `rows` from `first` on, and `partial` is the first of its places in the scratch memory. In a causal
// chunk, row i of `count` sees all but the last `count - 1 - i` keys.
struct Chunk {
    int64_t start, length, first, count, causal, partial;
};

// `count` rows of the batch from `row` on, at positions from `position` on, and the spans that they see: each row the
// keys at positions up to its own.
struct Block {
    int64_t row, count, position, first, spans;
};

// Slots `start` to `start + length`, with the keys at positions from `position` on.
struct Span {
    int64_t start, length, position;
};

struct Attention {
    const void* query;  // [heads, batch rows, dim]
    KV kv;
    void* out;       // [batch rows, heads, dim]
    float* scratch;  // [partials, heads, dim + 2]: accumulator, maximum, sum
    const Chunk* chunks;
    const int64_t* rows;         // of the chunks: rows of the batch
    const int64_t* merge_rows;   // the rows that chunks see
    const int64_t* merge_first;  // for each of them: the first of its places in merge_partial; one more at the end
    const int64_t* merge_partial;
    const Block* blocks;
    const Span* spans;
    int64_t num_chunks, num_merged, num_blocks, batch_rows, slots, heads, kv_heads, dim;
    int64_t window;  // positions that a row of a block sees, its own included
    float scale;
    int32_t threads;
};

constexpr int BLOCK = 64;  // keys whose scores are held at a time

// A query vector, and its products with a key, lane by lane.
template <typename T, int DIM>
struct Query {
    alignas(64) float numbers[DIM];

    void read(const T* from) {
        for (int d = 0; d < DIM; d += LANES) store(numbers + d, load(from + d));
    }

    template <int COUNT, typename S>
    static inline void multiply(const Query* queries, const S* key, vf* total) {
        for (int d = 0; d < DIM; d += LANES) {
            const vf part = load(key + d);
            for (int i = 0; i < COUNT; i++) total[i] += load(queries[i].numbers + d) * part;
        }
    }
};

#ifdef __AVX512BF16__
// The processor multiplies pairs of bfloat16 and adds them up in float32.
template <int DIM>
struct Query<bf16, DIM> {
    alignas(64) bf16 numbers[DIM];

    void read(const bf16* from) { std::memcpy(numbers, from, sizeof numbers); }

    template <int COUNT, typename S>
    static inline void multiply(const Query* queries, const S* key, vf* total) {
        for (int d = 0; d < DIM; d += 2 * LANES) {
            const __m512bh part = load_pairs(key + d);
            for (int i = 0; i < COUNT; i++)
                total[i] = (vf)_mm512_dpbf16_ps((__m512)total[i],
                                                (__m512bh)_mm512_load_si512(queries[i].numbers + d), part);
        }
    }
};
#endif

template <typename S, typename T, int DIM, int COUNT>
__attribute__((noinline)) void scores_of(const Query<T, DIM>* queries, const KV& kv, int64_t place, int length,
                                         float scale, float (*scores)[BLOCK]) {
    const S* keys = (const S*)kv.keys + place * DIM;
    int k = 0;
    for (; k + 4 <= length; k += 4) {
        vf total[4][COUNT] = {};
        for (int line = 0; line < int(4 * DIM * sizeof(S)); line += 64)
            __builtin_prefetch((const char*)(keys + k * DIM) + BLOCK * DIM * sizeof(S) + line);
        for (int j = 0; j < 4; j++) Query<T, DIM>::template multiply<COUNT>(queries, keys + (k + j) * DIM, total[j]);
        for (int i = 0; i < COUNT; i++) {
            const vf4 found = sums(total[0][i], total[1][i], total[2][i], total[3][i]) * scale;
            std::memcpy(scores[i] + k, &found, sizeof found);
        }
    }
    for (; k < length; k++) {
        vf total[COUNT] = {};
        Query<T, DIM>::template multiply<COUNT>(queries, keys + k * DIM, total);
        for (int i = 0; i < COUNT; i++) scores[i][k] = sum(total[i]) * scale;
    }
}

template <typename S, int DIM, int COUNT>
__attribute__((noinline)) void add_values(const float (*weights)[BLOCK], const KV& kv, int64_t place, int length,
                                          float (*result)[DIM]) {
    const S* values = (const S*)kv.values + place * DIM;
    constexpr int PARTS = DIM / LANES;
    // So that the accumulators fit the registers.
    constexpr int WIDTH = LANES < 16 ? 2 : PARTS % 4 == 0 ? 4 : PARTS % 3 == 0 ? 3 : 2;
    for (int from = 0; from < PARTS; from += WIDTH) {
        vf total[COUNT][WIDTH];
        for (int i = 0; i < COUNT; i++)
            for (int p = 0; p < WIDTH; p++) total[i][p] = load(result[i] + (from + p) * LANES);
        for (int k = 0; k < length; k++) {
            for (int line = 0; line < int(WIDTH * LANES * sizeof(S)); line += 64)
                __builtin_prefetch((const char*)(values + k * DIM + from * LANES) + BLOCK * DIM * sizeof(S) + line);
            for (int p = 0; p < WIDTH; p++) {
                const vf value = load(values + k * DIM + (from + p) * LANES);
                for (int i = 0; i < COUNT; i++) total[i][p] += weights[i][k] * value;
            }
        }
        for (int i = 0; i < COUNT; i++)
            for (int p = 0; p < WIDTH; p++) store(result[i] + (from + p) * LANES, total[i][p]);
    }
}

// One query's scores or weights, times the scales of the keys or values that they are of.
inline void scale_by(float* numbers, const float* scales, int length) {
    for (int k = 0; k < length; k++) numbers[k] *= scales[k];
}

// Scores to weights e^(score - maximum); what was summed under a smaller maximum before is scaled down.
// Compiled once for all tiles, which keeps compiling short.
__attribute__((noinline)) inline void soften(float* scores, int length, float* result, int dim, float& maximum,
                                             float& total) {
    for (int k = length; k < BLOCK; k++) scores[k] = -std::numeric_limits<float>::infinity();
    vf highest = load(scores);
    for (int k = LANES; k < BLOCK; k += LANES) highest = larger(highest, load(scores + k));
    const float found = largest(highest);
    if (found == -std::numeric_limits<float>::infinity()) {
        std::memset(scores, 0, sizeof(float) * BLOCK);
        return;
    }
    if (found > maximum) {
        const float shrink = std::exp(maximum - found);
        total *= shrink;
        for (int d = 0; d < dim; d += LANES) store(result + d, load(result + d) * shrink);
        maximum = found;
    }
    vf sums = {};
    for (int k = 0; k < BLOCK; k += LANES) {
        const vf score = load(scores + k);
        // The polynomial is cut off at e^-87, which is not the nothing that a hidden key weighs.
        const vf weight = score == -std::numeric_limits<float>::infinity() ? vf{} : exponential(score - maximum);
        store(scores + k, weight);
        sums += weight;
    }
    total += sum(sums);
}

template <typename T, int DIM, int COUNT>
void attend_tile(const Attention& a, const Chunk& chunk, int kv_head, int64_t first_query) {
    const int group = int(a.heads / a.kv_heads);
    const bool whole = a.kv.key_scales;
    Query<T, DIM> queries[COUNT];
    alignas(64) float result[COUNT][DIM] = {}, scores[COUNT][BLOCK];
    float maximum[COUNT], total[COUNT] = {};
    int64_t visible[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const int64_t place = (first_query + i) / group, head = kv_head * group + (first_query + i) % group;
        queries[i].read((const T*)a.query + (head * a.batch_rows + a.rows[chunk.first + place]) * DIM);
        maximum[i] = -std::numeric_limits<float>::infinity();
        visible[i] = chunk.causal ? chunk.length - (chunk.count - 1 - place) : chunk.length;
    }
    for (int64_t at = 0; at < chunk.length; at += BLOCK) {
        const int length = int(chunk.length - at < BLOCK ? chunk.length - at : BLOCK);
        const int64_t place = kv_head * a.slots + chunk.start + at;
        (whole ? scores_of<int8_t, T, DIM, COUNT> : scores_of<T, T, DIM, COUNT>)(queries, a.kv, place, length, a.scale,
                                                                                 scores);
        for (int i = 0; i < COUNT; i++) {
            const int shown = int(std::max<int64_t>(0, std::min<int64_t>(visible[i] - at, length)));
            if (whole) scale_by(scores[i], a.kv.key_scales + place, shown);
            soften(scores[i], shown, result[i], DIM, maximum[i], total[i]);
            if (whole) scale_by(scores[i], a.kv.value_scales + place, shown);
        }
        (whole ? add_values<int8_t, DIM, COUNT> : add_values<T, DIM, COUNT>)(scores, a.kv, place, length, result);
    }
    for (int i = 0; i < COUNT; i++) {
        const int64_t place = (first_query + i) / group, head = kv_head * group + (first_query + i) % group;
        float* to = a.scratch + ((chunk.partial + place) * a.heads + head) * (DIM + 2);
        std::memcpy(to, result[i], sizeof(float) * DIM);
        to[DIM] = maximum[i];
        to[DIM + 1] = total[i];
    }
}

// Query vectors from which a chunk is worth the packing of its keys; below, all is computed in float32.
constexpr int64_t MANY = 12;

// The query vectors `from` to `end` of a chunk's rows, together.
template <typename T, int DIM>
void attend_many(const Attention& a, const Chunk& chunk, int kv_head, int64_t from, int64_t end) {
    const int64_t group = a.heads / a.kv_heads;
    QueryBlock<T, DIM> block(a.scale, NO_END);
    for (int64_t i = from; i < end; i++) {
        const int64_t place = i / group, head = kv_head * group + i % group, row = a.rows[chunk.first + place];
        const int64_t hidden = chunk.causal ? chunk.count - 1 - place : 0;
        block.add((const T*)a.query + (head * a.batch_rows + row) * DIM, chunk.length - 1 - hidden);
    }
    block.close();
    block.see(a.kv, kv_head * a.slots + chunk.start, 0, chunk.length);
    for (int64_t i = from; i < end; i++) {
        const int64_t place = i / group, head = kv_head * group + i % group;
        block.give(int(i - from), a.scratch + ((chunk.partial + place) * a.heads + head) * (DIM + 2));
    }
}

template <typename T, int DIM>
void attend_chunk(const Attention& a, const Chunk& chunk, int kv_head) {
    const int64_t queries = chunk.count * (a.heads / a.kv_heads);
    int64_t at = 0;
    while (queries - at >= MANY) {
        const int64_t end = std::min<int64_t>(queries, at + QueryBlock<T, DIM>::MOST);
        attend_many<T, DIM>(a, chunk, kv_head, at, end);
        at = end;
    }
    for (; at + 4 <= queries; at += 4) attend_tile<T, DIM, 4>(a, chunk, kv_head, at);  // that fit the registers
    if (queries - at == 3) attend_tile<T, DIM, 3>(a, chunk, kv_head, at);
    if (queries - at == 2) attend_tile<T, DIM, 2>(a, chunk, kv_head, at);
    if (queries - at == 1) attend_tile<T, DIM, 1>(a, chunk, kv_head, at);
}

template <typename T, int DIM>
void merge(const Attention& a, int64_t place, int64_t head) {
    const int64_t *from = a.merge_partial + a.merge_first[place], *end = a.merge_partial + a.merge_first[place + 1];
    float maximum = -std::numeric_limits<float>::infinity(), total = 0;
    for (const int64_t* p = from; p < end; p++) {
        const float found = a.scratch[(*p * a.heads + head) * (DIM + 2) + DIM];
        maximum = found > maximum ? found : maximum;
    }
    alignas(64) float result[DIM] = {};
    for (const int64_t* p = from; p < end; p++) {
        const float* partial = a.scratch + (*p * a.heads + head) * (DIM + 2);
        if (partial[DIM + 1] == 0) continue;
        const float weight = std::exp(partial[DIM] - maximum);
        total += weight * partial[DIM + 1];
        for (int d = 0; d < DIM; d += LANES) store(result + d, load(result + d) + weight * load(partial + d));
    }
    T* out = (T*)a.out + (a.merge_rows[place] * a.heads + head) * DIM;
    const float share = total > 0 ? 1 / total : 0;
    for (int d = 0; d < DIM; d += LANES) store(out + d, load(result + d) * share);
}

template <typename T, int DIM>
void attend_block(const Attention& a, const Block& rows, int kv_head) {
    const int64_t group = a.heads / a.kv_heads, vectors = rows.count * group;
    for (int64_t from = 0, end; from < vectors; from = end) {
        end = std::min<int64_t>(vectors, from + QueryBlock<T, DIM>::MOST);
        QueryBlock<T, DIM> block(a.scale, a.window);
        for (int64_t i = from; i < end; i++) {
            const int64_t place = i / group, head = kv_head * group + i % group;
            block.add((const T*)a.query + (head * a.batch_rows + rows.row + place) * DIM, rows.position + place);
        }
        block.close();
        for (const Span* span = a.spans + rows.first; span < a.spans + rows.first + rows.spans; span++) {
            block.see(a.kv, kv_head * a.slots + span->start, span->position, span->length);
        }
        for (int64_t i = from; i < end; i++) {
            const int64_t place = i / group, head = kv_head * group + i % group;
            block.finish(int(i - from), (T*)a.out + ((rows.row + place) * a.heads + head) * DIM);
        }
    }
}

// For all threads of a team.
template <typename T, int DIM>
void attend_heads_in_team(Team& team, const Attention& a) {
    const int64_t heads = a.kv_heads;
    team.both(
        a.num_blocks * heads, [&](int64_t i) { attend_block<T, DIM>(a, a.blocks[i / heads], int(i % heads)); },
        a.num_chunks * heads,
        [&](int64_t i) { attend_chunk<T, DIM>(a, a.chunks[i % a.num_chunks], int(i / a.num_chunks)); });
    if (a.num_merged) team.rows(a.num_merged * a.heads, [&](int64_t i) { merge<T, DIM>(a, i / a.heads, i % a.heads); });
}

// The same for heads of one of these sizes; false, with nothing done, for others.
template <typename T, int... DIMS>
bool attend_any_in_team(Team& team, const Attention& a) {
    return ((a.dim == DIMS && (attend_heads_in_team<T, DIMS>(team, a), true)) || ...);
}

// The same for the sizes that this is compiled for: HEADS, a list of multiples of 32 up to 256.
template <typename T>
bool attend_in_team(Team& team, const Attention& a) {
#ifdef HEADS
    return attend_any_in_team<T, HEADS>(team, a);
#else
    return false;
#endif
}
