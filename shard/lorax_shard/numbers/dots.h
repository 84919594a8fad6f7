// Dot products of a few rows with a few rows of a matrix, in registers.

#pragma once

#include "elements.h"

namespace {

// What a cache line holds, or a register if that is more.
template <class E>
constexpr int64_t line_size = num_lanes > 64 / int64_t{sizeof(E)} ? num_lanes : 64 / int64_t{sizeof(E)};

// RANKS x ROWS dot products of length n at a time: h[row][rank] = scale * (a[rank] . x[row]).
// With `lead` the matrix is asked for, so many numbers further on; 0: it is in the cache. Each sum
// has one accumulator a lane, whatever is computed beside it.
template <class E, int RANKS, int ROWS>
inline void dots(const E* a, int64_t n, int64_t lead, float scale, const float* const* x,
                 float* const* h) {
    Lanes sums[ROWS][RANKS] = {};
    Lanes inputs[ROWS];
    const auto add = [&](const auto& values_of) {
        for (int rank = 0; rank < RANKS; ++rank) {
            const Lanes values = values_of(a + rank * n);
            for (int row = 0; row < ROWS; ++row) sums[row][rank] += inputs[row] * values;
        }
    };
    const auto add_at = [&](int64_t at) {
        for (int row = 0; row < ROWS; ++row) inputs[row] = lanes_at(x[row] + at);
        add([&](const E* values) { return load(values + at); });
    };
    int64_t i = 0;
    for (; lead && i + line_size<E> <= n; i += line_size<E>) {
        for (int rank = 0; rank < RANKS; ++rank) __builtin_prefetch(a + rank * n + i + lead);
        for (int64_t at = i; at < i + line_size<E>; at += num_lanes) add_at(at);
    }
    for (; i + num_lanes <= n; i += num_lanes) add_at(i);
    if (i < n) {
        for (int row = 0; row < ROWS; ++row) inputs[row] = load_some(x[row] + i, n - i);
        add([&](const E* values) { return load_some(values + i, n - i); });
    }
    for (int row = 0; row < ROWS; ++row) {
        float totals[RANKS];
        sum_lanes<RANKS>(sums[row], totals);
        for (int rank = 0; rank < RANKS; ++rank) h[row][rank] = totals[rank] * scale;
    }
}

// Calls `use` with a number from 1 to 4 that is known when this is compiled.
template <class Use>
inline void with_few(int64_t count, Use use) {
    if (count == 1)
        use(std::integral_constant<int, 1>());
    else if (count == 2)
        use(std::integral_constant<int, 2>());
    else if (count == 3)
        use(std::integral_constant<int, 3>());
    else
        use(std::integral_constant<int, 4>());
}

}  // namespace
