// Products of float32 rows and a quantized weight packed into panels, on a CPU. Loaded by kernel.py.
//
//   y[i] = W . x[i] + b        W: out x in, x: rows x in, y: rows x out
//
// Rows and sums are float32; only the weight is stored in fewer bits, and each of its numbers takes
// part as the float32 that `dense` gives. A panel is a few columns of y, as many as two registers
// hold. The weight lies in blocks of up to 128 inputs; in each block panel follows panel, and a panel
// is a row of groups. A group is what its inputs share for each column, scales and then what is
// added, and after that the codes in the order in which they are used.
//
// A tile is some rows of one panel, whose sums stay in registers while a block of the panel streams
// past. Where the processor multiplies bytes, codes are multiplied as they are (digits.h). Elsewhere
// they become floats: in registers where one tile takes all rows; for more rows once, in the first
// cache. Either way a row gets the same numbers in the same order, so that what it gets depends
// neither on the rows beside it nor on threads.
//
// Where there are matrix tiles they take more than a few rows (tiles.h): as exactly, with other last
// bits; among those, too, what a row gets does not depend on the others.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "digits.h"
#include "tiles.h"

namespace {

// How far ahead a weight is asked for, in bytes.
constexpr int64_t lead = 4096;

// What computes one format: tiles of its codes, and its codes as floats.
struct Format {
    // Inputs of a group, and its bytes.
    int64_t group, bytes;
    Tiles<Floats> floats;
    void (*widen)(const uint8_t* w, int64_t depth, float* floats);
    // Null where there are none.
    Tiles<Digits> digits;
    Cut cut;
    // Computes rows of neighbouring panels on matrix tiles, which is faster than with floats from
    // `tiles_from` on; null where there are none.
    void (*on_tiles)(const QuantizedCall& call, int64_t first_row, int64_t last_row,
                     int64_t first_panel, int64_t last_panel);
    int64_t tiles_from;
};

#ifdef LORAX_MATRIX_TILES
constexpr int64_t most_tile_rows = CodeTiles<Bfloat>::most_rows;
inline bool has_tiles() { return matrix_tiles::are_granted(); }

template <class Codes>
void compute_on_tiles(const QuantizedCall& call, int64_t first_row, int64_t last_row,
                      int64_t first_panel, int64_t last_panel) {
    CodeTiles<Codes>(call, first_row, last_row).compute(first_panel, last_panel);
}

// Half a step of a tile is no group.
template <class Codes>
constexpr decltype(Format::on_tiles) on_tiles() {
    if constexpr (Codes::group == 16)
        return nullptr;
    else
        return compute_on_tiles<Codes>;
}
#else
constexpr int64_t most_tile_rows = most_rows;
inline bool has_tiles() { return false; }
template <class Codes>
constexpr decltype(Format::on_tiles) on_tiles() {
    return nullptr;
}
#endif

template <class Codes>
constexpr Format format_of() {
    return {Codes::group,         Codes::bytes,        float_tiles<Codes>(), widen<Codes>,
            digit_tiles<Codes>(), cut_of<Codes>(),     on_tiles<Codes>(),
            Codes::step == codes_a_word ? 9 : 6};
}

// In the order of formats.py.
constexpr Format formats[] = {
    format_of<ChannelBytes>(),
    format_of<Bfloat>(),
    format_of<GroupedNibbles<Half, 32, false>>(),
    format_of<GroupedNibbles<Half, 32, true>>(),
    format_of<GroupedBytes<Half, 32, false>>(),
    format_of<GroupedNibbles<Full, 32, true>>(),
    format_of<GroupedBytes<Full, 16, true>>(),
};
constexpr Tiles<Floats> plain_tiles = float_tiles<Plain>();

// What computes rows that `in` holds, past the block `w`, and where it then reads: several tiles of
// floats share what is widened once.
inline const Tiles<Floats>& tiles_of(Floats& in, const Format& format, int64_t rows, int64_t size,
                                     const uint8_t*& w) {
    if (rows <= Floats::most_tile) return format.floats;
    format.widen(w, size, in.weight);
    w = reinterpret_cast<const uint8_t*>(in.weight);
    return plain_tiles;
}

inline const Tiles<Digits>& tiles_of(Digits&, const Format& format, int64_t, int64_t,
                                     const uint8_t*&) {
    return format.digits;
}

// Some rows and some neighbouring panels: what one thread computes in one go.
template <class Inputs>
class Part {
   public:
    Part(const QuantizedCall& call, int64_t first_row, int64_t last_row, int64_t first_panel,
         int64_t last_panel)
        : call(call), format(formats[call.format]), first_row(first_row),
          rows(last_row - first_row), first_panel(first_panel), last_panel(last_panel),
          num_panels((call.num_out + columns - 1) / columns),
          num_tiles((rows + Inputs::most_tile - 1) / Inputs::most_tile) {}

    void compute() {
        const uint8_t* block = call.weight;
        ask_for_first(block);
        for (int64_t k = 0; k < call.num_in; k += most_depth) {
            const int64_t size = std::min(most_depth, call.num_in - k);
            const int64_t panel_bytes = size / format.group * format.bytes;
            for (int64_t row = 0; row < rows; ++row)
                inputs.put(row, call.x + (first_row + row) * call.x_stride + k, size, format.cut);
            if (k + size < call.num_in) ask_for_inputs(k + size);
            next_block = block + num_panels * panel_bytes;
            for (int64_t panel = first_panel; panel < last_panel; ++panel)
                compute_panel(panel, block + panel * panel_bytes, panel_bytes, k, size);
            block = next_block;
        }
        if (call.num_out % columns && last_panel == num_panels) copy_edge();
    }

   private:
    // Inputs are copied while the first of the weight come.
    void ask_for_first(const uint8_t* block) const {
        const int64_t groups = std::min(most_depth, call.num_in) / format.group;
        const uint8_t* first = block + first_panel * groups * format.bytes;
        for (int64_t at = 0; at < lead; at += cache_line) __builtin_prefetch(first + at);
    }

    // Other threads may have written them; they come while a block before them is computed.
    void ask_for_inputs(int64_t k) const {
        const int64_t size = std::min(most_depth, call.num_in - k);
        for (int64_t row = first_row; row < first_row + rows; ++row)
            for (int64_t at = 0; at < size; at += cache_line / sizeof(float))
                __builtin_prefetch(call.x + row * call.x_stride + k + at);
    }

    // What to ask for while a panel is computed; behind this part's come those of the next block.
    const uint8_t* ahead_of(int64_t panel, const uint8_t* w, int64_t num_bytes) const {
        const int64_t left = (last_panel - panel) * num_bytes;
        return lead < left ? w + lead : next_block + first_panel * num_bytes + (lead - left);
    }

    void compute_panel(int64_t panel, const uint8_t* w, int64_t num_bytes, int64_t k,
                       int64_t size) {
        const bool is_edge = (panel + 1) * columns > call.num_out;
        float* y = is_edge ? edge : call.y + first_row * call.y_stride + panel * columns;
        const int64_t stride = is_edge ? columns : call.y_stride;
        Out out{y, stride, k == 0, k + size == call.num_in,
                call.scale ? call.scale + panel * columns : nullptr,
                call.bias ? call.bias + panel * columns : nullptr};
        const uint8_t* ahead = num_tiles == 1 ? ahead_of(panel, w, num_bytes) : w + num_bytes;
        const int64_t rate = (num_bytes / size + num_tiles - 1) / num_tiles;
        const Tiles<Inputs>& tiles = tiles_of(inputs, format, rows, size, w);
        for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile, ahead += rate * size) {
            // Rows are spread evenly: a tile of one row takes as long as one of four.
            const int64_t end = rows * (tile + 1) / num_tiles;
            out.at = y + row * stride;
            tiles[end - row](inputs, row, w, size, out, ahead, rate);
            row = end;
        }
    }

    void copy_edge() {
        const int64_t column = (num_panels - 1) * columns;
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(call.y + (first_row + row) * call.y_stride + column, edge + row * columns,
                        (call.num_out - column) * sizeof(float));
    }

    const QuantizedCall& call;
    const Format& format;
    const uint8_t* next_block = nullptr;
    const int64_t first_row, rows, first_panel, last_panel, num_panels, num_tiles;
    Inputs inputs;
    // Results of a panel that is wider than what is left of y.
    alignas(64) float edge[most_rows * columns];
};

// Multiplications from which on each thread gets several parts, so that one which is held up leaves
// some to the others. Few are done faster in one go.
constexpr int64_t much = 1 << 26, parts_a_thread = 4;
// Numbers of y that a part has: they stay in the second cache from block to block.
constexpr int64_t part_results = 65536;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 65536;

bool needs_threads(const QuantizedCall& call, int64_t num_threads) {
    return num_threads > 1 && call.num_rows * call.num_in * call.num_out >= too_little;
}

}  // namespace

extern "C" int64_t lorax_quantized_columns() { return columns; }

// From how many rows on a format is computed on matrix tiles; none has so many where it is not.
extern "C" int64_t lorax_quantized_tiles_from(int64_t format) {
    return formats[format].on_tiles && has_tiles() ? formats[format].tiles_from : INT64_MAX;
}

// Called by all threads of a team; it has ended when it returns in any of them.
extern "C" void lorax_quantized_linear_team(const QuantizedCall* given) {
    const QuantizedCall& call = *given;
    // Of this team: the fields may be those of a call that was recorded on one thread.
    const int64_t num_threads = omp_get_num_threads();
    const int64_t num_panels = (call.num_out + columns - 1) / columns;
    const int64_t work = call.num_rows * call.num_in * call.num_out;
    const int64_t parts = !needs_threads(call, num_threads) ? 1
                          : work < much                     ? num_threads
                                                            : num_threads * parts_a_thread;
    const Format& format = formats[call.format];
    const bool on_tiles = call.num_rows >= lorax_quantized_tiles_from(call.format);
    const int64_t part_rows = on_tiles ? most_tile_rows : most_rows;
    const int64_t row_parts = (call.num_rows + part_rows - 1) / part_rows;
    const int64_t part_columns = call.num_rows ? part_results * row_parts / call.num_rows : 1;
    const int64_t fitting = std::max<int64_t>(1, part_columns / columns);
    const int64_t panel_parts =
        std::min(num_panels, std::max((num_panels + fitting - 1) / fitting,
                                      row_parts ? (parts + row_parts - 1) / row_parts : 1));
    const int64_t num_parts = row_parts * panel_parts;
    const auto compute = [&](int64_t part) {
        const int64_t row = part / panel_parts, panel = part % panel_parts;
        const int64_t first_row = call.num_rows * row / row_parts,
                      last_row = call.num_rows * (row + 1) / row_parts,
                      first_panel = num_panels * panel / panel_parts,
                      last_panel = num_panels * (panel + 1) / panel_parts;
        if (on_tiles)
            format.on_tiles(call, first_row, last_row, first_panel, last_panel);
        else if (format.digits[1])
            Part<Digits>(call, first_row, last_row, first_panel, last_panel).compute();
        else
            Part<Floats>(call, first_row, last_row, first_panel, last_panel).compute();
    };
    // Where each thread has one part at most, they need no list of what is left.
    if (num_parts <= num_threads) {
        if (omp_get_thread_num() < num_parts) compute(omp_get_thread_num());
#pragma omp barrier
        return;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < num_parts; ++part) compute(part);
}

extern "C" void lorax_quantized_linear(const QuantizedCall* call) {
    if (call->num_rows == 0) return;
#pragma omp parallel num_threads(call->num_threads) if (needs_threads(*call, call->num_threads))
    lorax_quantized_linear_team(call);
}
