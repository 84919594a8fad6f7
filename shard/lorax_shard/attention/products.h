// Products of a few rows with what one step of keys or values holds, all sums in registers.

#pragma once

#include <algorithm>

#include "lanes.h"

// The tokens whose K and V are taken together. Steps begin at its multiples: what a query gets
// does not depend on where the tokens of a call begin.
constexpr int64_t step_tokens = 64;

// Rows of a tile, and the vectors beside each other that it computes at a time.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int tile_rows = 6, tile_vectors = 4;
#else
constexpr int tile_rows = 6, tile_vectors = 2;
#endif

constexpr int line_vectors = 16 / num_lanes;  // of a cache line

// Before each loop over the sums: what the compiler does not unroll from the first loop to the last
// it keeps in memory.
#define LORAX_UNROLLED _Pragma("GCC unroll 6")

template <int ROWS, int VECTORS>
using Sums = Lanes[ROWS][VECTORS];

// scores[row][t] = sum_i q[row][i] * keys[i][t]; i runs from first to last. Scores of rows lie STRIDE
// numbers apart.
template <int ROWS, int VECTORS, int64_t STRIDE>
inline void score_vectors(const float* q, const float* keys, int64_t stride, int64_t dim,
                          float* scores) {
    Sums<ROWS, VECTORS> sums;
    LORAX_UNROLLED
    for (int row = 0; row < ROWS; ++row)
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = Lanes{};
    const int64_t q_stride = dim;
    for (int64_t i = 0; i < dim; ++i, ++q, keys += stride) {
        Lanes k[VECTORS];
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v) k[v] = lanes_at(keys + v * num_lanes);
        LORAX_UNROLLED
        for (int row = 0; row < ROWS; ++row)
            LORAX_UNROLLED
            for (int v = 0; v < VECTORS; ++v) sums[row][v] += k[v] * q[row * q_stride];
    }
    LORAX_UNROLLED
    for (int row = 0; row < ROWS; ++row)
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v)
            lanes_at(scores + row * STRIDE + v * num_lanes) = sums[row][v];
}

// total[row] = scale[row] * total[row] + sum_t weights[row][t] * values[t]; t from first to last.
// Values lie `offset` numbers behind what is told of a token. Asks for as much of `ahead`.
template <int ROWS, int VECTORS, bool ASKS>
inline void weigh_vectors(const float* weights, const float* const* values,
                          const float* const* ahead, int64_t offset, int64_t first, int64_t last,
                          const float* scale, float* total, int64_t stride) {
    Sums<ROWS, VECTORS> sums;
    LORAX_UNROLLED
    for (int row = 0; row < ROWS; ++row)
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v)
            sums[row][v] = lanes_at(total + row * stride + v * num_lanes) * scale[row];
    for (int64_t t = first; t < last; ++t) {
        Lanes x[VECTORS];
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v) x[v] = lanes_at(values[t] + offset + v * num_lanes);
        if constexpr (ASKS)
            for (int v = 0; v < VECTORS; v += line_vectors)
                __builtin_prefetch(ahead[t] + offset + v * num_lanes);
        LORAX_UNROLLED
        for (int row = 0; row < ROWS; ++row) {
            const float weight = weights[row * step_tokens + t];
            LORAX_UNROLLED
            for (int v = 0; v < VECTORS; ++v) sums[row][v] += x[v] * weight;
        }
    }
    LORAX_UNROLLED
    for (int row = 0; row < ROWS; ++row)
        LORAX_UNROLLED
        for (int v = 0; v < VECTORS; ++v)
            lanes_at(total + row * stride + v * num_lanes) = sums[row][v];
}

// Calls with as many vectors as are left, up to a tile's, until none are.
template <class Compute>
inline void by_vectors(int64_t first, int64_t last, const Compute& compute) {
    for (; last - first >= tile_vectors; first += tile_vectors)
        compute(first, std::integral_constant<int, tile_vectors>{});
    if constexpr (tile_vectors == 4) {
        if (last - first == 3) return compute(first, std::integral_constant<int, 3>{});
        if (last - first == 2) return compute(first, std::integral_constant<int, 2>{});
    }
    if (last - first == 1) compute(first, std::integral_constant<int, 1>{});
}

// What is computed for ROWS rows: their scores of the vectors [first, last) of a step, and their
// sums of the values of the tokens [first, last).
struct Products {
    void (*score)(const float* q, const float* keys, int64_t stride, int64_t dim, int64_t first,
                  int64_t last, float* scores);
    void (*weigh)(const float* weights, const float* const* values, const float* const* ahead,
                  int64_t offset, int64_t num_vectors, int64_t first, int64_t last,
                  const float* scale, float* total, int64_t stride);
    decltype(weigh) weigh_and_ask;
};

template <int ROWS, int64_t STRIDE>
void score(const float* q, const float* keys, int64_t stride, int64_t dim, int64_t first,
           int64_t last, float* scores) {
    by_vectors(first, last, [&](int64_t v, auto count) {
        score_vectors<ROWS, count(), STRIDE>(q, keys + v * num_lanes, stride, dim,
                                             scores + v * num_lanes);
    });
}

template <int ROWS, bool ASKS>
void weigh(const float* weights, const float* const* values, const float* const* ahead,
           int64_t offset, int64_t num_vectors, int64_t first, int64_t last, const float* scale,
           float* total, int64_t stride) {
    by_vectors(0, num_vectors, [&](int64_t v, auto count) {
        weigh_vectors<ROWS, count(), ASKS>(weights, values, ahead, offset + v * num_lanes, first,
                                           last, scale, total + v * num_lanes, stride);
    });
}

template <int ROWS>
constexpr Products products_of = {score<ROWS, step_tokens>, weigh<ROWS, false>,
                                  weigh<ROWS, true>};

constexpr const Products* products[] = {
    nullptr,         &products_of<1>, &products_of<2>, &products_of<3>,
    &products_of<4>, &products_of<5>, &products_of<6>,
};

// The same scores where those of rows lie STRIDE numbers apart.
template <int64_t STRIDE>
constexpr decltype(Products::score) scores_at[] = {
    nullptr,          score<1, STRIDE>, score<2, STRIDE>, score<3, STRIDE>,
    score<4, STRIDE>, score<5, STRIDE>, score<6, STRIDE>,
};

// Writes K of up to one step so that tokens lie beside each other: keys[i][t] = tokens[t][i].
// K lies `offset` numbers behind what is told of a token. Asks for as much of `ahead`.
inline void transpose_keys(const float* const* tokens, const float* const* ahead, int64_t offset,
                           int64_t first, int64_t last, int64_t dim, float* keys,
                           int64_t stride) {
    for (int64_t t = first - first % num_lanes; t < last; t += num_lanes) {
        int64_t i = 0;
        for (; i + num_lanes <= dim; i += num_lanes) {
            Lanes rows[num_lanes];
            for (int lane = 0; lane < num_lanes; ++lane) {
                rows[lane] = lanes_at(tokens[t + lane] + offset + i);
                if (i % 16 == 0) __builtin_prefetch(ahead[t + lane] + offset + i);
            }
            transpose(rows);
            for (int lane = 0; lane < num_lanes; ++lane)
                lanes_at(keys + (i + lane) * stride + t) = rows[lane];
        }
        for (; i < dim; ++i)
            for (int lane = 0; lane < num_lanes; ++lane)
                keys[i * stride + t + lane] = tokens[t + lane][offset + i];
    }
}
