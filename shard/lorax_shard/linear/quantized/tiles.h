// Products with a quantized weight on a CPU's matrix tiles: of codes themselves, which bfloat16
// holds exactly, with all three parts of the inputs.
//
//   sum_i (code[i] scale + offset) x[i] = scale sum_i code[i] x[i] + offset sum_i x[i]
//
// i runs through a group. So each product is exact but for the last bits of scales, and a weight
// that takes few bytes in memory takes few instructions as well.

#pragma once

#include <algorithm>

#include "../matrix_tiles.h"
#include "codes.h"

#ifdef LORAX_MATRIX_TILES

namespace {

// The codes of inputs k and k + 16 for the columns of half a panel, as a tile has them; `at` is what
// follows the shared numbers of inputs k - k % group and on.
template <class Codes>
struct Pairs;

inline __m512i bytes_as_floats(const uint8_t* at) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))));
}

template <>
struct Pairs<ChannelBytes> {
    static constexpr float too_much = 0.0f;
    static __m512i read(const uint8_t* at, int64_t k, int64_t half) {
        const uint8_t* low = at + k * columns + half * num_lanes;
        return matrix_tiles::pair_up(bytes_as_floats(low), bytes_as_floats(low + 16 * columns));
    }
};

template <class Number, int GROUP, bool HAS_OFFSET>
struct Pairs<GroupedBytes<Number, GROUP, HAS_OFFSET>> : Pairs<ChannelBytes> {};

template <>
struct Pairs<Bfloat> {
    static constexpr float too_much = 0.0f;
    static __m512i read(const uint8_t* at, int64_t k, int64_t half) {
        const uint8_t* low = at + 2 * (k * columns + half * num_lanes);
        return _mm512_or_si512(wide(low), _mm512_slli_epi32(wide(low + 32 * columns), 16));
    }
    static __m512i wide(const uint8_t* at) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    }
};

// A code n of four bits becomes 16 + n, whose bfloat16 has the code's bits in it as they are: what is
// too much is taken off with the offset.
template <class Number, int GROUP, bool HAS_OFFSET>
struct Pairs<GroupedNibbles<Number, GROUP, HAS_OFFSET>> {
    static constexpr float too_much = HAS_OFFSET ? 16.0f : 24.0f;
    static __m512i read(const uint8_t* at, int64_t k, int64_t half) {
        const auto words = [&](int64_t input) {
            return _mm512_loadu_si512(at + (input / codes_a_word * 2 + half) * 4 * num_lanes);
        };
        // To bits 3 to 6 and 19 to 22.
        const auto from = static_cast<int>(4 * (k % codes_a_word));
        const __m512i low = _mm512_rolv_epi32(words(k), _mm512_set1_epi32(35 - from));
        const __m512i high = _mm512_rolv_epi32(words(k + 16), _mm512_set1_epi32(51 - from));
        const __m512i lower = _mm512_set1_epi32(0xffff), code = _mm512_set1_epi32(0x00780078);
        const __m512i sixteen = _mm512_set1_epi32(0x41804180);
        // lower ? low : high, and then (pair & code) | sixteen.
        const __m512i pair = _mm512_ternarylogic_epi32(lower, low, high, 0xca);
        return _mm512_ternarylogic_epi32(pair, code, sixteen, 0xea);
    }
};

// What the inputs of a group share; nothing for formats without groups.
template <class Codes, class = void>
struct Common {
    static constexpr int bytes = 0;
    static constexpr bool scales = false, has_offset = false;
};

template <class Codes>
struct Common<Codes, std::void_t<typename Codes::Same>> {
    static constexpr int bytes = Codes::Same::bytes;
    static constexpr bool scales = true,
                          has_offset = Codes::Same::has_offset || Pairs<Codes>::too_much != 0.0f;
};

// Some rows and some neighbouring panels, as in panel.cpp.
template <class Codes>
class CodeTiles {
   public:
    static constexpr int64_t most_rows = 128;

    CodeTiles(const QuantizedCall& call, int64_t first_row, int64_t last_row)
        : call(call), first_row(first_row), rows(last_row - first_row),
          num_panels((call.num_out + columns - 1) / columns) {}

    void compute(int64_t first_panel, int64_t last_panel) {
        static thread_local Memory memory;
        held = &memory;
        const matrix_tiles::Session session(rows);
        for (stretch = 0; stretch < call.num_in; stretch = stretch_end) {
            stretch_end = std::min(call.num_in, stretch + most_inputs);
            cut_rows();
            for (int64_t panel = first_panel; panel < last_panel; ++panel) compute_panel(panel);
        }
    }

   private:
    typedef Common<Codes> Same;
    static constexpr int64_t tile_rows = matrix_tiles::rows, step_inputs = matrix_tiles::depth;
    static constexpr int64_t step_size = matrix_tiles::parts * matrix_tiles::size;
    static constexpr int64_t most_inputs = 768, row_tile_size = most_inputs / step_inputs * step_size;
    static constexpr int64_t block_steps = most_depth / step_inputs;
    static constexpr int64_t run_inputs = Same::scales ? Codes::group : most_depth;
    static constexpr int64_t most_runs = most_inputs / (Same::scales ? Codes::group : most_depth);
    static constexpr int64_t pair_sums = 2 * tile_rows * columns;

    struct alignas(64) Memory {
        uint16_t inputs[most_rows / tile_rows * row_tile_size];
        uint16_t codes[block_steps * 2 * matrix_tiles::size];
        float products[2][pair_sums];
        float sums[most_rows * columns];
        float totals[most_rows * most_runs];  // of the inputs of each group
    };

    void cut_rows() {
        const int64_t end = (rows + tile_rows - 1) / tile_rows * tile_rows;
        for (int64_t row = 0; row < end; ++row) {
            const float* x = call.x + (first_row + std::min(row, rows - 1)) * call.x_stride;
            uint16_t* to = held->inputs + row / tile_rows * row_tile_size + row % tile_rows * 32;
            float* totals = held->totals + row * most_runs;
            for (int64_t k = stretch; k < stretch_end; k += step_inputs, to += step_size) {
                const __m512 low = matrix_tiles::some(x + k, stretch_end - k);
                const __m512 high = matrix_tiles::some(x + k + 16, stretch_end - k - 16);
                matrix_tiles::split(low, high, to);
                if constexpr (Same::has_offset) {
                    *totals++ = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
                }
            }
        }
        matrix_tiles::settle(held);
    }

    void compute_panel(int64_t panel) {
        std::fill_n(held->sums, rows * columns, 0.0f);
        for (int64_t k = stretch; k < stretch_end; k += most_depth) {
            const int64_t size = std::min(most_depth, call.num_in - k);
            const int64_t panel_bytes = size / Codes::group * Codes::bytes;
            const uint8_t* w = call.weight + k / Codes::group * Codes::bytes * num_panels +
                               panel * panel_bytes;
            cut_codes(w, size, w + panel_bytes);
            for (int64_t row = 0; row < rows; row += 2 * tile_rows) {
                if (rows - row > tile_rows)
                    add_block<true>(row, k, size, w);
                else
                    add_block<false>(row, k, size, w);
            }
        }
        for (int64_t row = 0; row < rows; ++row) write(panel, row);
    }

    // A panel's block as tiles: step by step, in each its two tiles of columns.
    void cut_codes(const uint8_t* w, int64_t size, const uint8_t* ahead) {
        uint16_t* to = held->codes;
        for (int64_t k = 0; k < size; k += step_inputs) {
            const uint8_t* at = w + k / Codes::group * Codes::bytes + Same::bytes;
            for (int64_t half = 0; half < 2; ++half, to += matrix_tiles::size, ahead += 512) {
#pragma GCC unroll 16
                for (int64_t pair = 0; pair < 16; ++pair) {
                    if (pair % 2 == 0) __builtin_prefetch(ahead + pair * 32, 0, 2);
                    const __m512i codes = size - k >= step_inputs
                                              ? Pairs<Codes>::read(at, pair, half)
                                              : last_codes(at, size - k, pair, half);
                    _mm512_store_si512(to + pair * 32, codes);
                }
            }
        }
        matrix_tiles::settle(held);
    }

    // Of a last step that is not whole; only formats without groups have one.
    static __m512i last_codes(const uint8_t* at, int64_t left, int64_t pair, int64_t half) {
        if (pair >= left) return _mm512_setzero_si512();
        alignas(64) uint8_t both[(16 + 1) * Codes::bytes] = {};
        std::memcpy(both, at + pair * Codes::bytes, Codes::bytes);
        if (pair + 16 < left)
            std::memcpy(both + 16 * Codes::bytes, at + (pair + 16) * Codes::bytes, Codes::bytes);
        return Pairs<Codes>::read(both, 0, half);
    }

    template <bool HAS_SECOND_ROWS>
    void add_block(int64_t row, int64_t k, int64_t size, const uint8_t* w) {
        const uint16_t* x = held->inputs + row / tile_rows * row_tile_size +
                            (k - stretch) / step_inputs * step_size;
        const int64_t num_steps = (size + step_inputs - 1) / step_inputs;
        const int64_t run_steps = Same::scales ? 1 : num_steps;
        const int64_t num_runs = Same::scales ? size / Codes::group : 1;
        for (int64_t run = 0; run < num_runs; ++run) {
            matrix_tiles::zero_sums();
            for (int64_t step = 0; step < run_steps; ++step) {
                const int64_t at = run + step;
                matrix_tiles::multiply<HAS_SECOND_ROWS, 1>(
                    x + at * step_size, row_tile_size,
                    held->codes + at * 2 * matrix_tiles::size, matrix_tiles::size);
            }
            // Products are added while the next are computed.
            if (run > 0) add_products(row, (k - stretch) / run_inputs + run - 1, run - 1, w);
            matrix_tiles::store_sums<HAS_SECOND_ROWS>(held->products[run % 2]);
        }
        add_products(row, (k - stretch) / run_inputs + num_runs - 1, num_runs - 1, w);
    }

    // Adds the products of a run for up to 32 rows: its scale, and its offset times the inputs.
    void add_products(int64_t row, int64_t total, int64_t run, const uint8_t* w) {
        const float* products = held->products[run % 2];
        const int64_t count = std::min(2 * tile_rows, rows - row);
        for (int64_t half = 0; half < 2; ++half) {
            __m512 scale = _mm512_set1_ps(1.0f), offset = _mm512_setzero_ps();
            if constexpr (Same::scales) {
                const typename Codes::Same same(w + run * Codes::bytes);
                scale = reinterpret_cast<const __m512&>(same.scales[half]);
                if constexpr (Codes::Same::has_offset)
                    offset = reinterpret_cast<const __m512&>(same.offsets[half]);
                offset = _mm512_fnmadd_ps(scale, _mm512_set1_ps(Pairs<Codes>::too_much), offset);
            }
            for (int64_t i = 0; i < count; ++i) {
                float* sums = held->sums + (row + i) * columns + half * num_lanes;
                __m512 sum = _mm512_load_ps(sums);
                const __m512 product = _mm512_load_ps(
                    products + ((i / tile_rows * 2 + half) * tile_rows + i % tile_rows) * 16);
                sum = _mm512_fmadd_ps(product, scale, sum);
                if constexpr (Same::has_offset) {
                    const float inputs = held->totals[(row + i) * most_runs + total];
                    sum = _mm512_fmadd_ps(_mm512_set1_ps(inputs), offset, sum);
                }
                _mm512_store_ps(sums, sum);
            }
        }
    }

    void write(int64_t panel, int64_t row) {
        float* y = call.y + (first_row + row) * call.y_stride + panel * columns;
        const bool is_first = stretch == 0, is_last = stretch_end == call.num_in;
        for (int64_t half = 0; half < 2; ++half, y += 16) {
            const int64_t column = panel * columns + half * 16, left = call.num_out - column;
            if (left <= 0) return;
            const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1 << left) - 1);
            __m512 sum = _mm512_load_ps(held->sums + row * columns + half * 16);
            if (!is_first) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, y));
            if (is_last && call.scale)
                sum = _mm512_mul_ps(sum, _mm512_loadu_ps(call.scale + column));
            if (is_last && call.bias) sum = _mm512_add_ps(sum, _mm512_loadu_ps(call.bias + column));
            _mm512_mask_storeu_ps(y, mask, sum);
        }
    }

    const QuantizedCall& call;
    const int64_t first_row, rows, num_panels;
    // Which inputs are computed.
    int64_t stretch = 0, stretch_end = 0;
    Memory* held = nullptr;
};

}  // namespace

#endif
