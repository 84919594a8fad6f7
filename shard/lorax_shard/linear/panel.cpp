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

#include "calls.h"
#include "lanes.h"
#include "on_tiles.h"

namespace {

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

    // With a call that gates the panels are those of the first half; those that they gate come too.
    Part(const PanelCall& call, int64_t first_row, int64_t last_row, int64_t first_panel,
         int64_t last_panel, const GatedCall* gated = nullptr)
        : call(call), gated(gated), first_row(first_row), rows(last_row - first_row),
          first_panel(first_panel), own_panels(last_panel - first_panel),
          num_panels((call.num_out + columns - 1) / columns),
          num_tiles((rows + tile_rows - 1) / tile_rows) {}

    void compute(int64_t depth) {
        const int64_t count = gated ? 2 * own_panels : own_panels;
        const float* block = call.weight;
        for (int64_t k = 0; k < call.num_in; k += depth) {
            const int64_t size = std::min(depth, call.num_in - k);
            for (int64_t row = 0; row < rows; ++row)
                std::memcpy(inputs + row * input_stride,
                            call.x + (first_row + row) * call.x_stride + k, size * sizeof(float));
            const float* next_block = block + num_panels * size * columns;
            for (int64_t number = 0; number < count; ++number) {
                const float* w = block + panel_at(number) * size * columns;
                const float* next = number + 1 < count
                                        ? block + panel_at(number + 1) * size * columns
                                        : next_block + first_panel * size * columns;
                compute_panel(number, w, next, k, size);
            }
            block = next_block;
        }
        if (call.num_out % columns && first_panel + own_panels == num_panels) copy_edge();
    }

   private:
    // Sums of panels that are gated: they stay here until all inputs are through.
    struct alignas(64) Sums {
        // The rows of the parts of a product differ by one, of half of most_rows and more.
        float numbers[part_results + part_results / (most_rows / 2)];
    };

    int64_t panel_at(int64_t number) const {
        return first_panel + (number < own_panels ? number : num_panels / 2 + number - own_panels);
    }

    static float* sums_of_thread() {
        static thread_local Sums sums;
        return sums.numbers;
    }

    void compute_panel(int64_t number, const float* w, const float* next, int64_t k, int64_t size) {
        const int64_t panel = panel_at(number);
        const bool is_edge = (panel + 1) * columns > call.num_out;
        float* y = gated     ? sums + number * rows * columns
                   : is_edge ? edge
                             : call.y + first_row * call.y_stride + panel * columns;
        const int64_t stride = gated || is_edge ? columns : call.y_stride;
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
        if (gated && is_last && number >= own_panels)
            gated->gate_rows(y - own_panels * rows * columns, y, columns,
                             gated->out + first_row * gated->width +
                                 (panel - num_panels / 2) * columns,
                             gated->width, rows, columns, gated->activation);
    }

    void copy_edge() {
        const int64_t column = (num_panels - 1) * columns;
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(call.y + (first_row + row) * call.y_stride + column, edge + row * columns,
                        (call.num_out - column) * sizeof(float));
    }

    const PanelCall& call;
    const GatedCall* const gated;
    const int64_t first_row, rows, first_panel, own_panels, num_panels, num_tiles;
    float* const sums = gated ? sums_of_thread() : nullptr;
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

// Called by all threads of a team. Panels are shared of which each brings `together` to its part.
template <typename SomePart, class... Told>
void compute_parts(const PanelCall& call, int64_t together, const Told*... told) {
    const int64_t depth = lorax_panel_depth(call.num_in);
    const int64_t num_panels = (call.num_out + columns - 1) / columns / together;
    const int64_t threads = omp_get_num_threads();
    const int64_t parts = work_of(call) < much ? threads : threads * SomePart::parts_a_thread;
    const int64_t row_parts = (call.num_rows + SomePart::most_rows - 1) / SomePart::most_rows;
    const int64_t part_columns = SomePart::part_results * row_parts / call.num_rows;
    const int64_t fitting = std::max<int64_t>(1, part_columns / (columns * together));
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
                 num_panels * panel / panel_parts, num_panels * (panel + 1) / panel_parts, told...)
            .compute(depth);
    }
}

}  // namespace

// Called by all threads of a team.
extern "C" void lorax_panel_linear_team(const PanelCall* packed) {
    const PanelCall call = *packed;
    if (call.num_rows != 0) compute_parts<Part>(call, 1);
}

extern "C" void lorax_panel_linear(const PanelCall* packed) {
    const int64_t threads = work_of(*packed) < too_little ? 1 : packed->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_panel_linear_team(packed);
}

// A product of which the first half of the columns gates the second half. Called by all threads of
// a team.
extern "C" void lorax_panel_gated_team(const GatedCall* packed) {
    const GatedCall call = *packed;
    if (call.rows == 0) return;
    if (call.width % columns == 0) return compute_parts<Part>(call.linear, 2, &call);
    compute_parts<Part>(call.linear, 1);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row)
        call.gate_rows(call.gate + row * call.gate_stride, call.up + row * call.up_stride, 0,
                       call.out + row * call.width, 0, 1, call.width, call.activation);
}

extern "C" void lorax_panel_gated(const GatedCall* packed) {
    const int64_t threads = work_of(packed->linear) < too_little ? 1 : packed->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_panel_gated_team(packed);
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
        return compute_parts<TilePart>(call, 1);
#endif
    lorax_panel_linear_team(packed);
}

extern "C" void lorax_tiles_linear(const PanelCall* packed) {
    const int64_t threads = work_of(*packed) < too_little ? 1 : packed->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_tiles_linear_team(packed);
}
