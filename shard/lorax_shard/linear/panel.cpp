// Products of rows and a weight packed into panels, float32, on a CPU. Loaded by panel.py.
//
//   y[i] = W . x[i] + b        W: out x in, x: rows x in, y: rows x out
//
// A panel is a few columns of y, as many as two registers hold. The weight lies in blocks of
// `depth` inputs; in each block panel follows panel, and a panel is depth x columns numbers in
// the order in which they are used. The last block of inputs may be shorter; columns that are
// missing from the last panel are zeros.
//
// A tile is some rows of one panel, whose sums stay in registers while a block of the panel
// streams past. All tiles of a panel follow each other, so that the weight comes through memory
// once for up to most_rows rows; while one block is computed, the next one is asked for.
//
// What a row gets does not depend on the rows beside it nor on threads: each sum runs through a
// block from its first input to its last, and the blocks' sums are added from first to last. On
// matrix tiles it does not depend on them either, but its last bits are others.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "lanes.h"
#include "matrix_tiles.h"

namespace {

// The most inputs of a block: a panel's block and a tile's inputs fit into the first cache.
constexpr int64_t most_depth = 128;
// Blocks have a multiple of this many inputs, the last one of a weight apart: a matrix tile's.
constexpr int64_t depth_step = 32;
// From row to row of the inputs of a block. Fixed, so that rows are reached without a register
// each; no multiple of 4 KiB, so that they do not push each other out of the cache.
constexpr int64_t input_stride = most_depth + 16;
// How far ahead a weight is asked for that passes one tile only, in numbers.
constexpr int64_t lead = 2048;

// Where the results of a tile go.
struct Out {
    float* at;
    int64_t stride;
    bool is_first;      // the first block writes, the others add
    const float* bias;  // added after the last block; null before it, and without a bias
};

// What to ask for while a tile is computed: `step` numbers further with every input.
struct Ahead {
    const float* at;
    int64_t step;
};

template <int ROWS>
void compute_tile(const float* x, const float* w, int64_t depth, const Out& out, Ahead ahead) {
    Lanes sums[ROWS][2] = {};
    // Results come last, and many of them: a prompt's are not in any cache by then.
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            __builtin_prefetch(out.at + row * out.stride + half * num_lanes, 1);
    for (int64_t k = 0; k < depth; ++k, w += columns, ahead.at += ahead.step) {
        __builtin_prefetch(ahead.at);
        __builtin_prefetch(ahead.at + num_lanes);
        const Lanes left = lanes_at(w), right = lanes_at(w + num_lanes);
        for (int row = 0; row < ROWS; ++row) {
            const float input = x[row * input_stride + k];
            sums[row][0] += left * input;
            sums[row][1] += right * input;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            float* at = out.at + row * out.stride + half * num_lanes;
            Lanes sum = sums[row][half];
            if (!out.is_first) sum = lanes_at(at) + sum;
            if (out.bias) sum += lanes_at(out.bias + half * num_lanes);
            lanes_at(at) = sum;
        }
}

typedef void Tile(const float*, const float*, int64_t, const Out&, Ahead);

constexpr Tile* tiles[] = {
    nullptr,         compute_tile<1>, compute_tile<2>, compute_tile<3>, compute_tile<4>,
    compute_tile<5>, compute_tile<6>,
#if defined(__AVX512F__) || defined(__aarch64__)
    compute_tile<7>, compute_tile<8>, compute_tile<9>, compute_tile<10>, compute_tile<11>,
    compute_tile<12>,
#endif
};

}  // namespace

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

// Copies `size` inputs of one panel, from input k on.
void pack_panel(const PackCall& call, int64_t panel, int64_t k, int64_t size, float* packed) {
    const float* first = call.weight + panel * columns * call.row_stride + k * call.column_stride;
    const int64_t count = std::min<int64_t>(columns, call.num_out - panel * columns);
    for (int64_t i = 0; i < size; ++i, first += call.column_stride, packed += columns) {
        for (int64_t column = 0; column < count; ++column)
            packed[column] = first[column * call.row_stride];
        std::fill(packed + count, packed + columns, 0.0f);
    }
}

// Some rows and some neighbouring panels: what one thread computes in one go.
class Part {
   public:
    // Rows that are computed while a block of the weight passes through once, and numbers of y
    // that a part has: they stay in the second cache from block to block.
    static constexpr int64_t most_rows = 96, part_results = 65536, parts_a_thread = 4;

    Part(const PanelCall& call, int64_t first_row, int64_t last_row, int64_t first_panel,
         int64_t last_panel)
        : call(call), first_row(first_row), rows(last_row - first_row), first_panel(first_panel),
          last_panel(last_panel), num_panels((call.num_out + columns - 1) / columns),
          num_tiles((rows + tile_rows - 1) / tile_rows) {}

    void compute(int64_t depth) {
        const float* block = call.weight;
        for (int64_t k = 0; k < call.num_in; k += depth) {
            const int64_t size = std::min(depth, call.num_in - k);
            for (int64_t row = 0; row < rows; ++row)
                std::memcpy(inputs + row * input_stride,
                            call.x + (first_row + row) * call.x_stride + k, size * sizeof(float));
            const float* next_block = block + num_panels * size * columns;
            for (int64_t panel = first_panel; panel < last_panel; ++panel) {
                const float* w = block + panel * size * columns;
                const float* next = panel + 1 < last_panel
                                        ? w + size * columns
                                        : next_block + first_panel * size * columns;
                compute_panel(panel, w, next, k, size);
            }
            block = next_block;
        }
        if (call.num_out % columns && last_panel == num_panels) copy_edge();
    }

   private:
    void compute_panel(int64_t panel, const float* w, const float* next, int64_t k, int64_t size) {
        const bool is_edge = (panel + 1) * columns > call.num_out;
        float* y = is_edge ? edge : call.y + first_row * call.y_stride + panel * columns;
        const int64_t stride = is_edge ? columns : call.y_stride;
        const bool is_last = k + size == call.num_in;
        const float* bias = is_last && call.bias ? call.bias + panel * columns : nullptr;
        const int64_t step = (columns + num_tiles - 1) / num_tiles;
        for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
            // Rows are spread evenly: a tile of one row takes as long as one of four.
            const int64_t end = rows * (tile + 1) / num_tiles;
            const Ahead ahead{num_tiles == 1 ? w + lead : next + tile * step * size, step};
            tiles[end - row](inputs + row * input_stride, w, size,
                             Out{y + row * stride, stride, k == 0, bias}, ahead);
            row = end;
        }
    }

    void copy_edge() {
        const int64_t column = (num_panels - 1) * columns;
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(call.y + (first_row + row) * call.y_stride + column, edge + row * columns,
                        (call.num_out - column) * sizeof(float));
    }

    const PanelCall& call;
    const int64_t first_row, rows, first_panel, last_panel, num_panels, num_tiles;
    alignas(64) float inputs[most_rows * input_stride];
    // Results of a panel that is wider than what is left of y.
    alignas(64) float edge[most_rows * columns];
};

// Multiplications from which on each thread gets several parts, so that one which is held up leaves
// some to the others. Few are done faster in one go.
constexpr int64_t much = 1 << 26;
// Rows from which on cutting a weight into parts of 16 bits pays.
constexpr int64_t tiles_from = 65;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 65536;
// Parts for each thread from which on one more does not count.
constexpr int64_t few_parts = 4;

int64_t work_of(const PanelCall& call) { return call.num_rows * call.num_in * call.num_out; }

#ifdef LORAX_MATRIX_TILES
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
#endif

}  // namespace

extern "C" int64_t lorax_panel_columns() { return columns; }

// The inputs of a block, for a weight of so many inputs.
extern "C" int64_t lorax_panel_depth(int64_t num_in) {
    const int64_t num_blocks = std::max<int64_t>(1, (num_in + most_depth - 1) / most_depth);
    const int64_t depth = (num_in + num_blocks - 1) / num_blocks;
    return std::min(num_in, (depth + depth_step - 1) / depth_step * depth_step);
}

// Called by all threads of a team.
extern "C" void lorax_panel_pack_team(const PackCall* packed) {
    const PackCall call = *packed;
    const int64_t depth = lorax_panel_depth(call.num_in);
    const int64_t num_panels = (call.num_out + columns - 1) / columns;
#pragma omp for schedule(dynamic, 1)
    for (int64_t panel = 0; panel < num_panels; ++panel)
        for (int64_t k = 0; k < call.num_in; k += depth) {
            const int64_t size = std::min(depth, call.num_in - k);
            pack_panel(call, panel, k, size, call.packed + (k * num_panels + panel * size) * columns);
        }
}

extern "C" void lorax_panel_pack(const PackCall* packed) {
#pragma omp parallel num_threads(packed->num_threads) if (packed->num_threads > 1)
    lorax_panel_pack_team(packed);
}

namespace {

// Called by all threads of a team.
template <typename SomePart>
void compute_parts(const PanelCall& call) {
    const int64_t depth = lorax_panel_depth(call.num_in);
    const int64_t num_panels = (call.num_out + columns - 1) / columns;
    const int64_t threads = omp_get_num_threads();
    const int64_t parts = work_of(call) < much ? threads : threads * SomePart::parts_a_thread;
    const int64_t row_parts = (call.num_rows + SomePart::most_rows - 1) / SomePart::most_rows;
    const int64_t part_columns = SomePart::part_results * row_parts / call.num_rows;
    const int64_t fitting = std::max<int64_t>(1, part_columns / columns);
    int64_t panel_parts = std::max((num_panels + fitting - 1) / fitting,
                                   (parts + row_parts - 1) / row_parts);
    // Of few parts all threads get as many: one that has one more lets the others wait.
    const int64_t unit = threads / std::gcd(threads, row_parts);
    if (row_parts * panel_parts < few_parts * threads)
        panel_parts = (panel_parts + unit - 1) / unit * unit;
    panel_parts = std::min(num_panels, panel_parts);
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < row_parts * panel_parts; ++part) {
        const int64_t row = part / panel_parts, panel = part % panel_parts;
        SomePart(call, call.num_rows * row / row_parts, call.num_rows * (row + 1) / row_parts,
                 num_panels * panel / panel_parts, num_panels * (panel + 1) / panel_parts)
            .compute(depth);
    }
}

}  // namespace

// Called by all threads of a team.
extern "C" void lorax_panel_linear_team(const PanelCall* packed) {
    const PanelCall call = *packed;
    if (call.num_rows != 0) compute_parts<Part>(call);
}

extern "C" void lorax_panel_linear(const PanelCall* packed) {
    const int64_t threads = work_of(*packed) < too_little ? 1 : packed->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_panel_linear_team(packed);
}

// Whether this processor has matrix tiles that this process may use.
extern "C" int64_t lorax_tiles_are_there() {
#ifdef LORAX_MATRIX_TILES
    return matrix_tiles::are_granted();
#else
    return 0;
#endif
}

// The same as lorax_panel_linear, many rows on matrix tiles where they are there.
extern "C" void lorax_tiles_linear_team(const PanelCall* packed) {
#ifdef LORAX_MATRIX_TILES
    const PanelCall call = *packed;
    if (call.num_rows >= tiles_from && matrix_tiles::are_granted())
        return compute_parts<TilePart>(call);
#endif
    lorax_panel_linear_team(packed);
}

extern "C" void lorax_tiles_linear(const PanelCall* packed) {
    const int64_t threads = work_of(*packed) < too_little ? 1 : packed->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_tiles_linear_team(packed);
}
