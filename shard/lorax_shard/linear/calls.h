// What the kernels of panel.cpp are told, and how a weight is cut into blocks.

#pragma once

#include <algorithm>
#include <cstdint>

// What Python hands over: all fields have eight bytes.
struct PanelCall {
    const float* x;
    int64_t x_stride;
    const float* weight;
    const float* bias;  // padded to whole panels; null without one
    float* y;
    int64_t y_stride;
    int64_t num_rows;
    int64_t num_in;
    int64_t num_out;
    int64_t num_threads;
};

// The same for a product of which the first half of the columns gates the second half, with what is
// told to the kernel that gates.
struct GatedCall {
    PanelCall linear;  // y is memory that may be written
    const float* gate;
    int64_t gate_stride;
    const float* up;
    int64_t up_stride;
    float* out;  // rows x width
    int64_t rows, width, activation, num_threads;
    // out = activation(gate) * up, rows x width numbers of each.
    void (*gate_rows)(const float* gate, const float* up, int64_t stride, float* out,
                      int64_t out_stride, int64_t rows, int64_t width, int64_t activation);
};

// The same for packing: the weight may lie in any order.
struct PackCall {
    const float* weight;
    int64_t row_stride;
    int64_t column_stride;
    float* packed;
    int64_t num_in;
    int64_t num_out;
    int64_t num_threads;
};

namespace {

// The most inputs of a block: a panel's block and a tile's inputs fit into the first cache.
constexpr int64_t most_depth = 128;
// Blocks have a multiple of this many inputs, the last one of a weight apart: a matrix tile's.
constexpr int64_t depth_step = 32;

}  // namespace
