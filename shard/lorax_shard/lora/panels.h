// Low-rank matrices, some ranks at a time: how they lie, and their products with a few rows.
//
// A matrix of r ranks x n columns lies rank by rank, or in panels, which is how it is read in one
// stream. A panel has panel_ranks ranks, the last one what is left. Its columns come in blocks of as
// many as a line of the cache has numbers: of each block one rank's line after the other's. Columns
// that fill no line follow behind all blocks, rank by rank.

#pragma once

#include <type_traits>

#include "../numbers/elements.h"

namespace {

constexpr int64_t panel_ranks = 8, line_bytes = 64;

// A bfloat16 of a line in a panel: the line's columns alternate between its halves, 0, 16, 1, 17 and
// so on, so that a register of them becomes two of float32 by a shift and by a mask.
struct Zipped {
    uint16_t bits;
};

// How numbers lie that fill no line.
template <class E>
struct InRest {
    typedef E type;
};
template <>
struct InRest<Zipped> {
    typedef BFloat16 type;
};

template <class E>
constexpr int64_t block_size = line_bytes / int64_t{sizeof(E)};
template <class E>
constexpr int block_vectors = int{block_size<E> / num_lanes};

template <class E>
inline void load_block(const E* at, Lanes* values) {
    for (int v = 0; v < block_vectors<E>; ++v) values[v] = load(at + v * num_lanes);
}

inline void load_block(const Zipped* at, Lanes* values) {
    constexpr int half = block_vectors<Zipped> / 2;
    for (int v = 0; v < half; ++v) {
        Words words;
        std::memcpy(&words, at + 2 * num_lanes * v, sizeof words);
        const Words low = words << 16, high = words & 0xffff0000u;
        values[v] = reinterpret_cast<const Lanes&>(low);
        values[half + v] = reinterpret_cast<const Lanes&>(high);
    }
}

// How far ahead memory is asked for, in bytes: matrices are too short for the processor to get
// going. Measured on Intel's cores with matrix tiles, and on AMD's Zen 5.
#if defined(__AMX_TILE__)
constexpr int64_t ahead = 4096;
#else
constexpr int64_t ahead = 8192;
#endif

// Memory is asked for ahead of what is read, up to an address; from there on elsewhere, where the
// thread reads next: matrices of one adapter follow each other, those of the next lie apart.
struct Jump {
    const char* from = nullptr;
    int64_t distance = 0;
    static Jump to(const void* next, const char* from) {
        return Jump{from, static_cast<const char*>(next) - from};
    }
    void ask_for(const char* at, int lines) const {
        at += ahead;
        if (at >= from) at += distance;
        for (int line = 0; line < lines; ++line) __builtin_prefetch(at + line * line_bytes);
    }
};

// The ranks of one panel.
template <class E>
struct Panel {
    typedef typename InRest<E>::type Rest;
    const E* at;
    int64_t ranks, width;
    int64_t to_rank, to_block;  // distances
    const Rest* rest;
    int64_t rest_to_rank;
    bool is_packed;

    // Of a matrix of so many ranks, from `first` on.
    Panel(const E* matrix, int64_t first, int64_t num_ranks, int64_t width, bool is_packed)
        : at(matrix + first * width),
          ranks(num_ranks - first < panel_ranks ? num_ranks - first : panel_ranks), width(width),
          to_rank(is_packed ? block_size<E> : width),
          to_block(is_packed ? ranks * block_size<E> : block_size<E>),
          rest(reinterpret_cast<const Rest*>(at + num_blocks() * to_block)),
          rest_to_rank(is_packed ? width - num_blocks() * block_size<E> : width),
          is_packed(is_packed) {}

    int64_t num_blocks() const { return width / block_size<E>; }
    int64_t rest_column() const { return num_blocks() * block_size<E>; }

    // Where RANKS lines are asked for while those of some ranks are read, and how far apart.
    const char* asked(int64_t rank, int64_t block, int num_ranks) const {
        const int64_t line = is_packed ? block * ranks + rank : block * num_ranks;
        const E* from = is_packed ? at : at + rank * width;
        return reinterpret_cast<const char*>(from) + line * line_bytes;
    }
};

// As many sums of a shrink as registers hold beside what is multiplied. Factors of an expansion are
// read from the cache where there are more: outputs that are stored and read again soon after cost
// more, as rows often lie at the same place of a page.
#if defined(__AVX512F__)
constexpr int most_rows_a_tile = 4, sums_a_tile = 16;
#else
constexpr int most_rows_a_tile = 2, sums_a_tile = 8;
#endif
template <int ROWS>
constexpr int ranks_a_tile = ROWS <= sums_a_tile / 8 ? 8 : 4;

// RANKS x ROWS dot products: h[row][rank] = A[rank] . x[row]. Each sum has one accumulator a lane.
template <class E, int RANKS, int ROWS>
inline void shrink_tile(const Panel<E>& panel, int64_t rank, const Jump* jump,
                        const float* const* x, float* const* h) {
    Lanes sums[ROWS][RANKS] = {};
    const float* in[ROWS];
    for (int row = 0; row < ROWS; ++row) in[row] = x[row];
    const E* at = panel.at + rank * panel.to_rank;
    const int64_t num_blocks = panel.num_blocks(), to_rank = panel.to_rank, to_block = panel.to_block;
    for (int64_t block = 0; block < num_blocks; ++block, at += to_block) {
        if (jump) jump->ask_for(panel.asked(rank, block, RANKS), RANKS);
        Lanes inputs[ROWS][block_vectors<E>];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors<E>; ++v)
                inputs[row][v] = lanes_at(in[row] + block * block_size<E> + v * num_lanes);
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) {
            Lanes values[block_vectors<E>];
            load_block(at + r * to_rank, values);
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors<E>; ++v)
#pragma GCC unroll 4
                for (int row = 0; row < ROWS; ++row) sums[row][r] += inputs[row][v] * values[v];
        }
    }
    for (int64_t column = panel.rest_column(); column < panel.width; column += num_lanes) {
        const int64_t size = panel.width - column < num_lanes ? panel.width - column : num_lanes;
        const auto* rest = panel.rest + rank * panel.rest_to_rank + column - panel.rest_column();
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row) {
            const Lanes input = load_some(x[row] + column, size);
#pragma GCC unroll 8
            for (int r = 0; r < RANKS; ++r)
                sums[row][r] += input * load_some(rest + r * panel.rest_to_rank, size);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row)
        for (int r = 0; r < RANKS; r += RANKS < 4 ? 1 : 4)
            sum_lanes<(RANKS < 4 ? 1 : 4)>(sums[row] + r, h[row] + rank + r);
}

// What RANKS ranks add to some blocks of columns of ROWS rows: y[row] += scale * h[row][rank] * B[rank].
template <class E, int RANKS, int ROWS>
inline void expand_tile(const Panel<E>& panel, int64_t rank, int64_t first, int64_t last,
                        const Jump* jump, float scale, const float* const* h,
                        float* const* y) {
    Lanes factors[ROWS][RANKS];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) factors[row][r] = Lanes{} + h[row][rank + r] * scale;
    float* out[ROWS];
    for (int row = 0; row < ROWS; ++row) out[row] = y[row];
    const int64_t to_rank = panel.to_rank, to_block = panel.to_block;
    const E* at = panel.at + rank * to_rank + first * to_block;
    for (int64_t block = first; block < last; ++block, at += to_block) {
        if (jump) jump->ask_for(panel.asked(rank, block, RANKS), RANKS);
        const int64_t column = block * block_size<E>;
        Lanes sums[ROWS][block_vectors<E>];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors<E>; ++v)
                sums[row][v] = lanes_at(out[row] + column + v * num_lanes);
#pragma GCC unroll 8
        for (int r = 0; r < RANKS; ++r) {
            Lanes values[block_vectors<E>];
            load_block(at + r * to_rank, values);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
                for (int v = 0; v < block_vectors<E>; ++v)
                    sums[row][v] += values[v] * factors[row][r];
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
            for (int v = 0; v < block_vectors<E>; ++v)
                lanes_at(out[row] + column + v * num_lanes) = sums[row][v];
    }
}

// What all ranks of a panel add to the columns that fill no line.
template <class E>
inline void expand_rest(const Panel<E>& panel, float scale, const float* h, float* y) {
    for (int64_t column = panel.rest_column(); column < panel.width; column += num_lanes) {
        const int64_t size = panel.width - column < num_lanes ? panel.width - column : num_lanes;
        const auto* rest = panel.rest + column - panel.rest_column();
        Lanes sum = load_some(y + column, size);
        for (int64_t rank = 0; rank < panel.ranks; ++rank)
            sum += load_some(rest + rank * panel.rest_to_rank, size) * (h[rank] * scale);
        std::memcpy(y + column, &sum, size * sizeof(float));
    }
}

// Calls `use` with up to MOST (4 or 8) ranks and the first of them, until a panel has no more.
template <int MOST, class Use>
inline void with_ranks(int64_t ranks, Use use) {
    int64_t rank = 0;
    if constexpr (MOST == 8)
        for (; rank + 8 <= ranks; rank += 8) use(std::integral_constant<int, 8>(), rank);
    for (; rank + 4 <= ranks; rank += 4) use(std::integral_constant<int, 4>(), rank);
    for (; rank < ranks; ++rank) use(std::integral_constant<int, 1>(), rank);
}

// Calls `use` with up to as many rows as a tile has and the first of them, until there are no more.
template <class Use>
inline void with_rows(int64_t count, Use use) {
    for (int64_t row = 0; row < count; row += most_rows_a_tile) {
        const int64_t left = count - row;
        if (left == 1)
            use(std::integral_constant<int, 1>(), row);
        else if (left == 2 || most_rows_a_tile == 2)
            use(std::integral_constant<int, 2>(), row);
        else if (left == 3)
            use(std::integral_constant<int, most_rows_a_tile < 3 ? 2 : 3>(), row);
        else
            use(std::integral_constant<int, most_rows_a_tile>(), row);
    }
}

// Which column of its line a number has in a panel.
template <class E>
constexpr int64_t column_in_line(int64_t place) {
    return std::is_same_v<E, BFloat16> ? place / 2 + place % 2 * (block_size<E> / 2) : place;
}

// Writes a matrix in panels that lies elsewhere with some distances between ranks and columns.
template <class E>
inline void pack(const E* from, E* to, int64_t num_ranks, int64_t width, int64_t to_rank,
                 int64_t to_column) {
    const int64_t rest = width / block_size<E> * block_size<E>;
    for (int64_t first = 0; first < num_ranks; first += panel_ranks) {
        const int64_t last = num_ranks - first < panel_ranks ? num_ranks : first + panel_ranks;
        for (int64_t column = 0; column < rest; column += block_size<E>)
            for (int64_t rank = first; rank < last; ++rank)
                for (int64_t place = 0; place < block_size<E>; ++place)
                    *to++ = from[rank * to_rank + (column + column_in_line<E>(place)) * to_column];
        for (int64_t rank = first; rank < last; ++rank)
            for (int64_t column = rest; column < width; ++column)
                *to++ = from[rank * to_rank + column * to_column];
    }
}

}  // namespace
