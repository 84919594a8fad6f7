// Products of many rows with what one step of keys or values holds, on matrix tiles (AMX).
//
// Queries are cut into parts of 16 bits once for all steps, K and V once a step for all rows, and
// weights after each softmax. Rows are taken by pairs of row tiles, tokens and the numbers of a
// value by pairs of column tiles. Each row has sums of its own: what it gets depends on no other.

#pragma once

#include "../linear/matrix_tiles.h"
#include "softmax.h"

// Up to two row tiles, and the tokens of a step that some of them see.
struct RowPair {
    int64_t row, count;
    Tokens some;
};

#ifdef LORAX_MATRIX_TILES

class TileProducts {
   public:
    // Rows that are computed at a time, and columns: a pair of tiles each.
    static constexpr int64_t pair_rows = 2 * matrix_tiles::rows;
    static constexpr int64_t pair_columns = 2 * matrix_tiles::columns;

    using Session = matrix_tiles::Session;

    static bool fits(int64_t key_dim, int64_t value_dim) {
        return key_dim % depth == 0 && value_dim % pair_columns == 0;
    }

    TileProducts(int64_t key_dim, int64_t value_dim, int64_t most_rows)
        : key_steps(key_dim / depth), value_pairs(value_dim / pair_columns) {
        static thread_local Buffer buffer;
        const int64_t query_tiles = round_up(most_rows, pair_rows) / matrix_tiles::rows * key_steps;
        const int64_t key_tiles = 2 * step_pairs * key_steps;
        const int64_t value_tiles = 2 * value_pairs * token_steps, weight_tiles = 4 * token_steps;
        Pieces memory{buffer.numbers((query_tiles + key_tiles + value_tiles + weight_tiles) *
                                     tile_size / 2)};
        const auto take = [&](int64_t tiles) {
            return reinterpret_cast<uint16_t*>(memory.take(tiles * tile_size / 2));
        };
        queries = take(query_tiles);
        keys = take(key_tiles);
        values = take(value_tiles);
        weights = take(weight_tiles);
    }

    // Cuts scaled queries, whole row tiles of them: zeros behind the last.
    void cut_queries(const float* from, int64_t count) {
        for (int64_t row = 0; row < round_up(count, matrix_tiles::rows); ++row)
            for (int64_t i = 0; i < key_steps; ++i) {
                const float* at = from + (row * key_steps + i) * depth;
                matrix_tiles::split(row < count ? lanes(at) : zeros(),
                                    row < count ? lanes(at + 16) : zeros(),
                                    queries_at(row) + i * tile_size +
                                        row % matrix_tiles::rows * depth);
            }
        matrix_tiles::settle(queries);
    }

    // Cuts K of a step, whose tokens lie beside each other: packed[i][t].
    void cut_keys(const float* packed) {
        for (int64_t pair = 0; pair < step_pairs; ++pair)
            for (int64_t i = 0; i < key_steps; ++i)
                for (int64_t row = 0; row < matrix_tiles::rows; ++row)
                    for (int64_t half = 0; half < 2; ++half) {
                        const float* from = packed + (i * depth + row) * step_tokens +
                                            pair * pair_columns + half * 16;
                        matrix_tiles::split(lanes(from), lanes(from + 16 * step_tokens),
                                            keys_at(pair, i) + half * tile_size + row * depth);
                    }
        matrix_tiles::settle(keys);
    }

    // Cuts V of the tokens of a step that are in it; asks for as much of `ahead`.
    void cut_values(const float* const* tokens, const float* const* ahead, Tokens in) {
        for (int64_t step = 0; step < token_steps; ++step)
            for (int64_t row = 0; row < matrix_tiles::rows; ++row) {
                const int64_t t = step * depth + row;
                const float* low = is_in(t, in) ? tokens[t] : nullptr;
                const float* high = is_in(t + 16, in) ? tokens[t + 16] : nullptr;
                for (int64_t column = 0; column < 2 * value_pairs; ++column) {
                    __builtin_prefetch(ahead[t] + column * 16);
                    __builtin_prefetch(ahead[t + 16] + column * 16);
                    matrix_tiles::split(low ? lanes(low + column * 16) : zeros(),
                                        high ? lanes(high + column * 16) : zeros(),
                                        values_at(column / 2, step) + column % 2 * tile_size +
                                            row * depth);
                }
            }
        matrix_tiles::settle(values);
    }

    // scores[row][t] of a pair of row tiles, for the pairs of columns that its tokens lie in. Calls
    // `beside` again and again: vectors can compute while the tiles do.
    template <class Beside>
    void score(const RowPair& pair, float* scores, const Beside& beside) const {
        by_rows(pair.count, [&](auto has_second) {
            for (int64_t columns = pair.some.first / pair_columns;
                 columns * pair_columns < pair.some.last; ++columns) {
                matrix_tiles::zero_sums();
                for (int64_t i = 0; i < key_steps; ++i) {
                    matrix_tiles::multiply<has_second()>(queries_at(pair.row) + i * tile_size,
                                                         key_steps * tile_size,
                                                         keys_at(columns, i), tile_size);
                    beside();
                }
                float* at = scores + columns * pair_columns;
                matrix_tiles::store_sums<has_second()>(at, 16, 16 * step_tokens, step_tokens);
            }
        });
    }

    // Cuts the weights of some rows of a pair, those of the vectors that its tokens lie in; the
    // others are zeros. There are two places for them.
    void cut_weights(const RowPair& pair, int64_t first_row, int64_t last_row,
                     const float* softened, int64_t place) {
        const Vectors some(pair.some);
        const auto at = [&](int64_t row, int64_t v) {
            const bool is_some = some.first <= v && v < some.last;
            return is_some ? lanes(softened + row * step_tokens + v * num_lanes) : zeros();
        };
        for (int64_t row = first_row; row < last_row; ++row)
            for (int64_t step = 0; step < token_steps; ++step)
                matrix_tiles::split(at(row, 2 * step), at(row, 2 * step + 1),
                                    weights_at(place, row) + step * tile_size +
                                        row % matrix_tiles::rows * depth);
    }

    // total[row] += sum_t weights[row][t] * values[t] of a pair whose weights are cut. Totals have
    // room for whole row tiles.
    template <class Beside>
    void weigh(const RowPair& pair, int64_t place, float* total, int64_t stride,
               const Beside& beside) {
        matrix_tiles::settle(weights);
        const int64_t first = pair.some.first / depth, last = round_up(pair.some.last, depth) / depth;
        by_rows(pair.count, [&](auto has_second) {
            for (int64_t columns = 0; columns < value_pairs; ++columns) {
                float* at = total + columns * pair_columns;
                matrix_tiles::load_sums<has_second()>(at, 16, 16 * stride, stride);
                for (int64_t step = first; step < last; ++step) {
                    matrix_tiles::multiply<has_second()>(weights_at(place, 0) + step * tile_size,
                                                         token_steps * tile_size,
                                                         values_at(columns, step), tile_size);
                    beside();
                }
                matrix_tiles::store_sums<has_second()>(at, 16, 16 * stride, stride);
            }
        });
    }

   private:
    static constexpr int64_t depth = matrix_tiles::depth;
    // All parts of a tile, in numbers of 16 bits.
    static constexpr int64_t tile_size = matrix_tiles::parts * matrix_tiles::size;
    static constexpr int64_t step_pairs = step_tokens / pair_columns;
    static constexpr int64_t token_steps = step_tokens / depth;

    static __m512 lanes(const float* at) { return _mm512_loadu_ps(at); }
    static __m512 zeros() { return _mm512_setzero_ps(); }
    static bool is_in(int64_t t, Tokens in) { return in.first <= t && t < in.last; }

    // Calls with whether there is a second row tile.
    template <class Compute>
    static void by_rows(int64_t count, const Compute& compute) {
        if (count > matrix_tiles::rows)
            compute(std::true_type{});
        else
            compute(std::false_type{});
    }

    uint16_t* queries_at(int64_t row) const {
        return queries + row / matrix_tiles::rows * key_steps * tile_size;
    }
    // Of a pair of column tiles, which follow each other.
    uint16_t* keys_at(int64_t pair, int64_t step) const {
        return keys + (pair * key_steps + step) * 2 * tile_size;
    }
    uint16_t* values_at(int64_t pair, int64_t step) const {
        return values + (pair * token_steps + step) * 2 * tile_size;
    }

    uint16_t* weights_at(int64_t place, int64_t row) const {
        return weights + (2 * place + row / matrix_tiles::rows) * token_steps * tile_size;
    }

    const int64_t key_steps, value_pairs;
    uint16_t *queries, *keys, *values, *weights;
};

#else

// Where there are no tiles, nothing asks for them.
class TileProducts {
   public:
    static constexpr int64_t pair_rows = 32;
    struct Session {};
    TileProducts(int64_t, int64_t, int64_t) {}
    static bool fits(int64_t, int64_t) { return false; }
    void cut_queries(const float*, int64_t) {}
    void cut_keys(const float*) {}
    void cut_values(const float* const*, const float* const*, Tokens) {}
    void cut_weights(const RowPair&, int64_t, int64_t, const float*, int64_t) {}
    template <class Beside>
    void score(const RowPair&, float*, const Beside&) const {}
    template <class Beside>
    void weigh(const RowPair&, int64_t, float*, int64_t, const Beside&) {}
};

#endif
