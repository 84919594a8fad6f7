// Products with a quantized weight in float32: codes become floats in registers.

#pragma once

#include <cstring>
#include <utility>

#include "rows.h"

namespace {

// A block's inputs of some rows as they are.
struct Floats {
    static constexpr int most_tile = tile_rows;

    alignas(64) float numbers[most_rows][input_stride];
    // A panel's block of the weight, where several tiles read it.
    alignas(64) float weight[most_depth * columns];

    void put(int64_t row, const float* x, int64_t size, const Cut&) {
        std::memcpy(numbers[row], x, size * sizeof(float));
    }
};

template <int ROWS, class Codes>
void compute_floats(const Floats& in, int64_t row, const uint8_t* w, int64_t depth, const Out& out,
                    const uint8_t* ahead, int64_t rate) {
    const float* x = in.numbers[row];
    Lanes sums[ROWS][2] = {};
    for (int i = 0; i < ROWS; ++i)
        for (int half = 0; half < 2; ++half)
            __builtin_prefetch(out.at + i * out.stride + half * num_lanes, 1);
    for (int64_t k = 0; k < depth; k += Codes::group, w += Codes::bytes) {
        Codes codes(w);
        for (int part = 0; part < Codes::group / Codes::step; ++part) {
            codes.load(part);
#pragma GCC unroll 8
            for (int index = 0; index < Codes::step; ++index, ++x) {
                __builtin_prefetch(ahead);
                ahead += rate;
                const Lanes left = codes.read(index, 0), right = codes.read(index, 1);
                for (int i = 0; i < ROWS; ++i) {
                    const float input = x[i * input_stride];
                    sums[i][0] += left * input;
                    sums[i][1] += right * input;
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) finish(out, i, half, sums[i][half]);
}

template <class Codes>
void widen(const uint8_t* w, int64_t depth, float* floats) {
    for (int64_t k = 0; k < depth; k += Codes::group, w += Codes::bytes) {
        Codes codes(w);
        for (int part = 0; part < Codes::group / Codes::step; ++part) {
            codes.load(part);
#pragma GCC unroll 8
            for (int index = 0; index < Codes::step; ++index, floats += columns)
                for (int half = 0; half < 2; ++half)
                    lanes_at(floats + half * num_lanes) = codes.read(index, half);
        }
    }
}

template <class Codes, size_t... ROWS>
constexpr Tiles<Floats> float_tiles(std::index_sequence<ROWS...>) {
    return {nullptr, compute_floats<ROWS + 1, Codes>...};
}

template <class Codes>
constexpr Tiles<Floats> float_tiles() {
    return float_tiles<Codes>(std::make_index_sequence<Floats::most_tile>());
}

}  // namespace
