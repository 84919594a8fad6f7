// What a tile of rows begins with and where its results go.

#pragma once

#include <array>

#include "codes.h"

namespace {

// Rows that are computed while a block of the weight passes through once.
constexpr int64_t most_rows = 96;
// Bytes that one prefetch asks for.
constexpr int64_t cache_line = 64;
// From row to row of the inputs of a block; no multiple of 4 KiB.
constexpr int64_t input_stride = most_depth + 16;

// How a format wants its inputs where they are cut into digits (digits.h): what one sum takes, and
// the least of its codes.
struct Cut {
    int64_t run;
    int lowest;
    // Whether of eight inputs the even ones and the odd ones come together.
    bool by_parity;
};

// Where the results of a tile go.
struct Out {
    float* at;
    int64_t stride;
    bool is_first;       // the first block writes, the others add
    bool is_last;
    const float* scale;  // of a column, after the last block; null where groups have theirs
    const float* bias;   // null without one
};

inline void finish(const Out& out, int row, int half, Lanes sum) {
    float* at = out.at + row * out.stride + half * num_lanes;
    if (!out.is_first) sum = lanes_at(at) + sum;
    if (out.is_last) {
        if (out.scale) sum = sum * lanes_at(out.scale + half * num_lanes);
        if (out.bias) sum = sum + lanes_at(out.bias + half * num_lanes);
    }
    lanes_at(at) = sum;
}

// Computes the rows `row` and on of `in` past a block of a panel. `ahead`: what to ask for meanwhile;
// `rate` bytes with every input.
template <class Inputs>
using Tile = void(const Inputs& in, int64_t row, const uint8_t* w, int64_t depth, const Out& out,
                  const uint8_t* ahead, int64_t rate);

// Tiles by their number of rows.
template <class Inputs>
using Tiles = std::array<Tile<Inputs>*, Inputs::most_tile + 1>;

}  // namespace
