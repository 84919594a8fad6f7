// What a thread computes of a product on matrix tiles.

#pragma once

#include "calls.h"
#include "lanes.h"
#include "matrix_tiles.h"

#ifdef LORAX_MATRIX_TILES

namespace {

// Some rows and some neighbouring panels, computed on matrix tiles. Inputs are cut into parts of
// 16 bits once for all panels, a panel's block once for all rows; sums lie tile by tile until all
// inputs of a stretch are through.
class TilePart {
   public:
    static constexpr int64_t most_rows = 256, part_results = 262144;
    // Every part cuts its rows anew.
    static constexpr int64_t parts_a_thread = 1;

    TilePart(const PanelCall& call, int64_t first_row, int64_t last_row, int64_t first_panel,
             int64_t last_panel)
        : call(call), first_row(first_row), rows(last_row - first_row), first_panel(first_panel),
          last_panel(last_panel), num_panels((call.num_out + columns - 1) / columns) {}

    void compute(int64_t depth) {
        static thread_local Memory memory;
        held = &memory;
        const matrix_tiles::Session session;
        const int64_t stretch_size = most_inputs / depth * depth;
        for (stretch = 0; stretch < call.num_in; stretch = stretch_end) {
            stretch_end = std::min(call.num_in, stretch + stretch_size);
            cut_rows();
            for (int64_t panel = first_panel; panel < last_panel; ++panel)
                compute_panel(panel, depth);
        }
    }

   private:
    static constexpr int64_t tile_rows = matrix_tiles::rows, step_inputs = matrix_tiles::depth;
    static constexpr int64_t step_size = matrix_tiles::parts * matrix_tiles::size;
    // Inputs that rows are cut for at a time: they stay in the second cache.
    static constexpr int64_t most_inputs = 768;
    static constexpr int64_t row_tile_size = most_inputs / step_inputs * step_size;
    static constexpr int64_t pair_sums = 2 * tile_rows * columns;

    struct alignas(64) Memory {
        uint16_t inputs[most_rows / tile_rows * row_tile_size];
        uint16_t weights[2 * most_depth / step_inputs * step_size];
        float sums[most_rows / (2 * tile_rows) * pair_sums];
    };

    // Inputs as tiles: row tile by row tile, in each step by step, in each part by part.
    void cut_rows() {
        const int64_t end = (rows + tile_rows - 1) / tile_rows * tile_rows;
        for (int64_t row = 0; row < end; ++row) {
            const float* x = call.x + (first_row + std::min(row, rows - 1)) * call.x_stride;
            uint16_t* to = held->inputs + row / tile_rows * row_tile_size + row % tile_rows * 32;
            int64_t k = stretch;
            for (; k + step_inputs <= stretch_end; k += step_inputs, to += step_size)
                matrix_tiles::split(_mm512_loadu_ps(x + k), _mm512_loadu_ps(x + k + 16), to);
            if (k < stretch_end)
                matrix_tiles::split(matrix_tiles::some(x + k, stretch_end - k),
                                    matrix_tiles::some(x + k + 16, stretch_end - k - 16), to);
        }
        matrix_tiles::settle(held);
    }

    void compute_panel(int64_t panel, int64_t depth) {
        for (int64_t k = stretch; k < stretch_end; k += depth) {
            const int64_t size = std::min(depth, call.num_in - k);
            ahead = k + depth < stretch_end ? block_at(panel, k + depth, depth)
                                            : block_at(panel + 1, stretch, depth);
            cut_panel(block_at(panel, k, depth), size);
            const int64_t num_steps = (size + step_inputs - 1) / step_inputs;
            const int64_t num_pairs = (rows + 2 * tile_rows - 1) / (2 * tile_rows);
            ahead_step = (depth / num_pairs + num_steps - 1) / num_steps;
            for (int64_t row = 0; row < rows; row += 2 * tile_rows) {
                if (rows - row > tile_rows)
                    add_block<true>(row, k, num_steps);
                else
                    add_block<false>(row, k, num_steps);
            }
        }
        for (int64_t row = 0; row < rows; ++row) write(panel, row);
    }

    const float* block_at(int64_t panel, int64_t k, int64_t depth) const {
        const int64_t size = std::min(depth, call.num_in - k);
        return call.weight + (k * num_panels + panel * size) * columns;
    }

    // A panel's block as tiles: step by step, in each its two tiles of columns.
    void cut_panel(const float* w, int64_t size) {
        const __m512 zeros = _mm512_setzero_ps();
        for (int64_t k = 0; k < size; k += step_inputs) {
            uint16_t* to = held->weights + k / step_inputs * 2 * step_size;
            for (int64_t pair = k; pair < k + 16; ++pair, to += 32) {
                ask(2);
                for (int64_t half = 0; half < 2; ++half) {
                    const float* at = w + pair * columns + half * num_lanes;
                    matrix_tiles::split(
                        pair < size ? _mm512_loadu_ps(at) : zeros,
                        pair + 16 < size ? _mm512_loadu_ps(at + 16 * columns) : zeros,
                        to + half * step_size);
                }
            }
        }
        matrix_tiles::settle(held);
    }

    template <bool HAS_SECOND_ROWS>
    void add_block(int64_t row, int64_t k, int64_t num_steps) {
        const uint16_t* x = held->inputs + row / tile_rows * row_tile_size +
                            (k - stretch) / step_inputs * step_size;
        float* sums = held->sums + row / (2 * tile_rows) * pair_sums;
        if (k == stretch)
            matrix_tiles::zero_sums();
        else
            matrix_tiles::load_sums<HAS_SECOND_ROWS>(sums);
        for (int64_t step = 0; step < num_steps; ++step) {
            ask(ahead_step);
            matrix_tiles::multiply<HAS_SECOND_ROWS>(x + step * step_size, row_tile_size,
                                                    held->weights + 2 * step * step_size,
                                                    step_size);
        }
        matrix_tiles::store_sums<HAS_SECOND_ROWS>(sums);
    }

    void ask(int64_t lines) {
        for (; lines > 0; --lines, ahead += 16) __builtin_prefetch(ahead, 0, 2);
    }

    void write(int64_t panel, int64_t row) {
        const float* sums = held->sums + row / (2 * tile_rows) * pair_sums +
                            row / tile_rows % 2 * tile_rows * columns + row % tile_rows * 16;
        float* y = call.y + (first_row + row) * call.y_stride + panel * columns;
        const bool is_first = stretch == 0, is_last = stretch_end == call.num_in;
        for (int64_t half = 0; half < 2; ++half, sums += tile_rows * 16, y += 16) {
            const int64_t left = call.num_out - panel * columns - half * 16;
            if (left <= 0) return;
            const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
            __m512 sum = _mm512_load_ps(sums);
            if (!is_first) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y));
            if (is_last && call.bias)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(call.bias + panel * columns + half * 16));
            _mm512_mask_storeu_ps(y, mask, sum);
        }
    }

    const PanelCall& call;
    const int64_t first_row, rows, first_panel, last_panel, num_panels;
    // Which inputs are computed.
    int64_t stretch = 0, stretch_end = 0;
    Memory* held = nullptr;
    // The block that comes next is asked for, so many cache lines with every step.
    const float* ahead = nullptr;
    int64_t ahead_step = 0;
};

}  // namespace

#endif
