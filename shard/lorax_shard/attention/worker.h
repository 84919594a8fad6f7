// What a thread computes of a step of attention.

#pragma once

#include <cstring>
#include <optional>

#include "distance_terms.h"
#include "softmax.h"
#include "tile_products.h"

// Computes tiles, one after the other, in memory of its own.
class Worker {
   public:
    // With `has_tiles` many rows are computed on matrix tiles, which this processor has.
    Worker(const AttendCall& call, int64_t most_rows, bool has_tiles)
        : c(call), group(call.num_heads / call.num_kv_heads),
          value_stride(round_up(call.value_dim, num_lanes)),
          num_tokens(tokens_of(call)) {
        static thread_local Buffer buffer;
        most_rows = round_up(most_rows, 16);
        const int64_t per_row = c.key_dim + 2 * value_stride + num_lanes + 10;
        const int64_t scored_rows = std::max(most_rows, 2 * TileProducts::pair_rows);
        Pieces memory{buffer.numbers(most_rows * per_row + scored_rows * step_tokens +
                                     step_tokens * (c.key_dim + value_stride) + 16 +
                                     DistanceTerms::numbers(c.key_dim))};
        const auto take = [&](int64_t count) { return memory.take(count); };
        packed_keys = take(step_tokens * c.key_dim);
        packed_values = take(step_tokens * value_stride);
        scores = take(scored_rows * step_tokens);
        total = take(most_rows * value_stride);
        span_total = take(most_rows * value_stride);
        queries = take(most_rows * c.key_dim);
        states = reinterpret_cast<Softmax*>(take(2 * most_rows));
        span_states = reinterpret_cast<Softmax*>(take(2 * most_rows));
        scales = take(most_rows);
        largest = take(most_rows);
        lane_sums = take(most_rows * num_lanes);
        seen = reinterpret_cast<Tokens*>(take(4 * most_rows));
        if (c.has_tables()) distance_terms.emplace(c, take(DistanceTerms::numbers(c.key_dim)));
        if (has_tiles) tile_products.emplace(c.key_dim, c.value_dim, most_rows);
    }

    // What `next` reads first is asked for, unless it is null.
    void compute(const Tile& tile, const Tile* next, float* partials, int64_t partial_size) {
        begin(tile);
        next_tile = next;
        for (int64_t at = tile.context.first; at < tile.context.last;) {
            const int64_t end = std::min(tile.context.last, at - at % span_tokens + span_tokens);
            compute_span({at, end});
            if (at == tile.context.first) {
                std::swap(total, span_total);
                std::swap(states, span_states);
            } else {
                for (int64_t row = 0; row < num_rows * num_kv_heads; ++row)
                    add_span(states[row], total + row * value_stride, span_states[row],
                             span_total + row * value_stride, value_stride);
            }
            at = end;
        }
        for (int64_t row = 0; row < num_rows * num_kv_heads; ++row) {
            if (tile.partial < 0)
                finish(tile, row, states[row], total + row * value_stride);
            else
                keep(partials + (tile.partial + row) * partial_size, states[row],
                     total + row * value_stride);
        }
    }

    // Adds the spans of one row of a tile, which lie `stride` apart.
    void add_partials(const Tile& tile, int64_t row, int64_t num_spans, float* partials,
                      int64_t partial_size) {
        const int64_t stride = tile.num_rows(group) * partial_size;
        float* first = partials + (tile.partial + row) * partial_size;
        Softmax state = {first[0], first[1]};
        for (int64_t span = 1; span < num_spans; ++span) {
            const float* later = first + span * stride;
            add_span(state, first + 2, {later[0], later[1]}, later + 2, value_stride);
        }
        finish(tile, row, state, first + 2);
    }

   private:
    static int64_t tokens_of(const AttendCall& call) {
        const int64_t last = call.rows->num_rows - 1;
        return last < 0 ? 0 : call.rows->first_tokens[last] + call.rows->query_lens[last];
    }

    void begin(const Tile& tile) {
        const StepRows& rows = *c.rows;
        row_number = tile.row;
        first_kv_head = tile.first_kv_head;
        num_kv_heads = tile.last_kv_head - tile.first_kv_head;
        num_rows = tile.num_queries * group;
        const int64_t context_len = rows.context_lens[tile.row];
        position = rows.positions[tile.row] + tile.first_query;
        for (int64_t query = 0; query < tile.num_queries; ++query)
            std::fill_n(seen + query * group, group, seen_by(c, position + query, context_len));
        last_token = tile.context.last;
        const int64_t token = rows.first_tokens[tile.row] + tile.first_query;
        const auto scaling = static_cast<float>(c.scaling * score_units);
        for (int64_t kv = 0; kv < num_kv_heads; ++kv)
            for (int64_t row = 0; row < num_rows; ++row) {
                const int64_t head = (first_kv_head + kv) * group + row % group;
                const float* from = c.query + (token + row / group) * c.query_token_stride +
                                    head * c.query_head_stride;
                float* to = queries_of(kv, row);
                for (int64_t i = 0; i < c.key_dim; ++i) to[i] = from[i] * scaling;
            }
        on_tiles = tile.on_tiles;
        if (on_tiles) tile_products->cut_queries(queries, num_rows);
    }

    void compute_span(Tokens span) {
        const int64_t count = num_rows * num_kv_heads;
        std::fill_n(largest, count, nothing);
        std::fill_n(lane_sums, count * num_lanes, 0.0f);
        std::fill_n(span_total, count * value_stride, 0.0f);
        for (int64_t at = span.first; at < span.last;) {
            step = at - at % step_tokens;
            const int64_t end = std::min(span.last, step + step_tokens);
            find_tokens({at - step, end - step});
            if (c.query_table)
                distance_terms->take_keys(key_tokens, first_kv_head, {at - step, end - step},
                                          query_of(0).centre, num_rows);
            if (on_tiles)
                compute_on_tiles({at - step, end - step});
            else if (num_rows > few_rows)
                compute_many({at - step, end - step});
            else
                compute_few({at - step, end - step});
            at = end;
        }
        for (int64_t row = 0; row < count; ++row)
            span_states[row] = {largest[row], sum_lanes(lanes_at(lane_sums + row * num_lanes))};
    }

    // Takes tokens of a step for one KV head and many rows: a few rows after the others, so that
    // K and V stay in the first cache.
    void compute_many(Tokens in) {
        transpose_keys(key_tokens, value_tokens, 0, in.first, in.last, c.key_dim, packed_keys,
                       step_tokens);
        pack_values(0, in);
        for (int64_t row = 0; row < num_rows; row += tile_rows) {
            const int64_t count = std::min<int64_t>(tile_rows, num_rows - row);
            const Tokens some{seen_in_step(row, in).first, seen_in_step(row + count - 1, in).last};
            if (some.first >= some.last) continue;
            compute_scores(0, row, some, packed_keys, step_tokens);
            soften_rows(row, count, scores, some, in);
            add_values(0, row, some, packed_tokens, row == 0 ? next_keys : nullptr);
        }
    }

    // The same on matrix tiles, by pairs of row tiles.
    void compute_on_tiles(Tokens in) {
        transpose_keys(key_tokens, value_tokens, 0, in.first, in.last, c.key_dim, packed_keys,
                       step_tokens);
        [[maybe_unused]] const TileProducts::Session session;
        tile_products->cut_keys(packed_keys);
        tile_products->cut_values(value_tokens, next_keys, in);
        find_pairs(in);
        // While tiles score the pair that follows and weigh the one before, vectors soften one.
        for (int64_t pair = -1; pair <= static_cast<int64_t>(pairs.size()); ++pair) {
            int64_t softened = 0;
            const auto beside = [&] { softened = soften_some(pair, softened, in); };
            if (is_pair(pair + 1))
                tile_products->score(pairs[pair + 1], scores_of_pair(pair + 1), beside);
            if (is_pair(pair - 1))
                tile_products->weigh(pairs[pair - 1], (pair - 1) % 2,
                                     span_total + pairs[pair - 1].row * value_stride, value_stride,
                                     beside);
            while (is_pair(pair) && softened < pairs[pair].count) beside();
        }
    }

    // Finds the pairs of row tiles that see some tokens of a step.
    void find_pairs(Tokens in) {
        pairs.clear();
        for (int64_t row = 0; row < num_rows; row += TileProducts::pair_rows) {
            const int64_t count = std::min(TileProducts::pair_rows, num_rows - row);
            const Tokens some{seen_in_step(row, in).first, seen_in_step(row + count - 1, in).last};
            if (some.first < some.last) pairs.push_back({row, count, some});
        }
    }

    bool is_pair(int64_t number) const {
        return 0 <= number && number < static_cast<int64_t>(pairs.size());
    }

    float* scores_of_pair(int64_t number) const {
        return scores + number % 2 * TileProducts::pair_rows * step_tokens;
    }

    // Softens a few rows of a pair behind those that are softened; returns how many are.
    int64_t soften_some(int64_t number, int64_t softened, Tokens in) {
        if (!is_pair(number) || softened == pairs[number].count) return softened;
        const RowPair& pair = pairs[number];
        const int64_t row = pair.row + softened;
        const int64_t count = std::min<int64_t>(tile_rows, pair.count - softened);
        float* at = scores_of_pair(number);
        soften_rows(row, count, at + softened * step_tokens, pair.some, in);
        rescale(span_total + row * value_stride, scales + row, count);
        tile_products->cut_weights(pair, softened, softened + count, at, number % 2);
        return softened + count;
    }

    void rescale(float* totals, const float* by, int64_t count) const {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t i = 0; by[row] != 1.0f && i < value_stride; i += num_lanes)
                lanes_at(totals + row * value_stride + i) *= by[row];
    }

    // Takes tokens of a step for few rows of several KV heads: piece by piece, K and then V are
    // read as they come in memory, and the piece that follows is asked for.
    void compute_few(Tokens in) {
        for (int64_t at = in.first; at < in.last;) {
            const int64_t begin = at - at % piece_tokens;
            const Tokens piece{at, std::min(in.last, begin + piece_tokens)};
            const float* const* ahead =
                piece.last < in.last ? key_tokens + piece_tokens
                                     : value_tokens + in.first - in.first % piece_tokens - begin;
            for (int64_t kv = 0; kv < num_kv_heads; ++kv) {
                float* keys = packed_keys - begin;
                transpose_keys(key_tokens, ahead, kv * c.key_dim, piece.first, piece.last,
                               c.key_dim, keys, piece_tokens);
                for (int64_t row = 0; row < num_rows; row += tile_rows)
                    compute_scores(kv, row, piece, keys, piece_tokens);
            }
            at = piece.last;
        }
        for (int64_t kv = 0; kv < num_kv_heads; ++kv)
            for (int64_t row = 0; row < num_rows; row += tile_rows)
                soften_rows(kv * num_rows + row, std::min<int64_t>(tile_rows, num_rows - row),
                            scores_of(kv, row), in, in);
        for (int64_t at = in.first; at < in.last;) {
            const int64_t begin = at - at % piece_tokens;
            const Tokens piece{at, std::min(in.last, begin + piece_tokens)};
            const float* const* ahead =
                piece.last < in.last ? value_tokens + piece_tokens : next_keys - begin;
            for (int64_t kv = 0; kv < num_kv_heads; ++kv) {
                const bool is_packed = c.value_dim % num_lanes != 0;
                if (is_packed) pack_values(kv * c.value_dim, piece);
                for (int64_t row = 0; row < num_rows; row += tile_rows)
                    add_values(kv, row, piece, is_packed ? packed_tokens : value_tokens,
                               row == 0 ? ahead : nullptr, is_packed ? 0 : kv * c.value_dim);
            }
            for (int64_t row = 0; row < num_rows * num_kv_heads; ++row) scales[row] = 1.0f;
            at = piece.last;
        }
    }

    Tokens seen_in_step(int64_t row, Tokens in) const {
        return {std::clamp(seen[row].first - step, in.first, in.last),
                std::clamp(seen[row].last - step, in.first, in.last)};
    }

    float* queries_of(int64_t kv, int64_t row) const {
        return queries + (kv * num_rows + row) * c.key_dim;
    }

    float* scores_of(int64_t kv, int64_t row) const {
        // Of many rows a few are done with before the next are computed.
        return num_rows > few_rows ? scores : scores + (kv * num_rows + row) * step_tokens;
    }

    void compute_scores(int64_t kv, int64_t row, Tokens some, const float* keys, int64_t stride) {
        const Vectors vectors(some);
        products[std::min<int64_t>(tile_rows, num_rows - row)]->score(
            queries_of(kv, row), keys, stride, c.key_dim, vectors.first, vectors.last,
            scores_of(kv, row));
    }

    // Of up to tile_rows rows from `at` on, among those of all KV heads.
    void soften_rows(int64_t at, int64_t count, float* scores, Tokens some, Tokens in) {
        if (c.bias) add_bias(at, count, scores, Vectors(some));
        if (distance_terms)
            distance_terms->add(queries + at * c.key_dim, count, first_kv_head, some,
                                query_of(at).centre, scores);
        else if (c.places)
            add_of_tokens(at, count, scores, some);
        Tokens each[tile_rows];
        for (int64_t i = 0; i < count; ++i) each[i] = seen_in_step((at + i) % num_rows, in);
        soften(scores, count, Vectors(some), each, static_cast<float>(c.softcap * score_units),
               largest + at, lane_sums + at * num_lanes, scales + at);
    }

    // Of a row among those of all KV heads: its query head, its token among those of the row that
    // it belongs to, and where the distance of the step's first token is.
    struct Query {
        int64_t head, position, centre;
    };

    Query query_of(int64_t at) const {
        const int64_t row = at % num_rows, query = position + row / group;
        const int64_t head = (first_kv_head + at / num_rows) * group + row % group;
        return {head, query, c.bias_centre + step - query};
    }

    void add_bias(int64_t at, int64_t count, float* scores, Vectors some) const {
        for (int64_t i = 0; i < count; ++i) {
            const Query query = query_of(at + i);
            const float* from = c.bias + query.head * c.bias_head_stride + query.centre;
            Lanes* x = reinterpret_cast<Lanes*>(scores + i * step_tokens);
            for (int64_t v = some.first; v < some.last; ++v)
                x[v] += lanes_at(from + v * num_lanes) * score_units;
        }
    }

    // Rows without a cache have all their tokens in the step, from `first` on.
    void add_of_tokens(int64_t at, int64_t count, float* scores, Tokens some) const {
        const int64_t width = c.places_of_token, first = c.rows->first_tokens[row_number];
        for (int64_t i = 0; i < count; ++i) {
            const Query query = query_of(at + i);
            const int64_t begin = query.head * num_tokens + first;
            const int32_t* places = c.places + query.centre;
            float* x = scores + i * step_tokens;
            if (c.of_query) {
                const float* own = c.of_query + (begin + query.position) * width;
                for (int64_t t = some.first; t < some.last; ++t)
                    x[t] += own[places[t]] * score_units;
            }
            if (c.of_key) {
                const float* keys = c.of_key + (begin + step) * width;
                for (int64_t t = some.first; t < some.last; ++t)
                    x[t] += keys[t * width + places[t]] * score_units;
            }
        }
    }

    void add_values(int64_t kv, int64_t row, Tokens some, const float* const* tokens,
                    const float* const* ahead, int64_t offset = 0) {
        const Products& found = *products[std::min<int64_t>(tile_rows, num_rows - row)];
        const int64_t at = kv * num_rows + row;
        (ahead ? found.weigh_and_ask : found.weigh)(
            scores_of(kv, row), tokens, ahead, offset, value_stride / num_lanes, some.first,
            some.last, scales + at, span_total + at * value_stride, value_stride);
    }

    // Calls with K and V of each of some tokens of a row, block by block.
    template <class Take>
    void each_token(int64_t row, int64_t kv_head, Tokens at, const Take& take) const {
        const StepRows& rows = *c.rows;
        for (int64_t t = at.first; t < at.last;) {
            int64_t slot = rows.first_keys[row] + t, end = at.last;
            if (rows.tables) {
                const int64_t block = t / c.block_size;
                slot = rows.tables[row * rows.table_stride + block] * c.block_size +
                       t - block * c.block_size;
                end = std::min(end, (block + 1) * c.block_size);
            }
            const float* key = c.keys + slot * c.key_token_stride + kv_head * c.key_dim;
            const float* value = c.values + slot * c.value_token_stride + kv_head * c.value_dim;
            for (; t < end; ++t, key += c.key_token_stride, value += c.value_token_stride)
                take(t, key, value);
        }
    }

    // Finds where K and V of the tokens of a step lie, and K of the step that follows.
    void find_tokens(Tokens in) {
        each_token(row_number, first_kv_head, {step + in.first, step + in.last},
                   [&](int64_t t, const float* key, const float* value) {
                       key_tokens[t - step] = key;
                       value_tokens[t - step] = value;
                   });
        // Lanes beside them are computed with any token, and not used.
        for (auto tokens : {key_tokens, value_tokens}) {
            std::fill(tokens, tokens + in.first, tokens[in.first]);
            std::fill(tokens + in.last, tokens + step_tokens, tokens[in.last - 1]);
        }
        std::fill_n(next_keys, step_tokens, key_tokens[in.last - 1]);
        const int64_t next = step + step_tokens;
        if (next < last_token) {
            find_keys(row_number, first_kv_head, {next, last_token});
        } else if (next_tile) {
            find_keys(next_tile->row, next_tile->first_kv_head, next_tile->context);
        }
    }

    void find_keys(int64_t row, int64_t kv_head, Tokens at) {
        const int64_t begin = at.first - at.first % step_tokens;
        at.last = std::min(at.last, begin + step_tokens);
        each_token(row, kv_head, at, [&](int64_t t, const float* key, const float*) {
            next_keys[t - begin] = key;
        });
    }

    void pack_values(int64_t offset, Tokens in) {
        for (int64_t t = in.first; t < in.last; ++t) {
            float* to = packed_values + t * value_stride;
            std::memcpy(to, value_tokens[t] + offset, c.value_dim * sizeof(float));
            std::fill(to + c.value_dim, to + value_stride, 0.0f);
            packed_tokens[t] = to;
        }
    }

    void finish(const Tile& tile, int64_t row, Softmax state, float* sums) {
        const int64_t rows_a_head = tile.num_queries * group;
        const int64_t query = row % rows_a_head / group;
        const int64_t head = (tile.first_kv_head + row / rows_a_head) * group + row % group;
        if (c.sinks) {
            const float sink = c.sinks[head] * score_units, most = std::max(state.most, sink);
            const float scale = power_of_two(state.most - most);
            state.sum = state.sum * scale + power_of_two(sink - most);
            for (int64_t i = 0; i < value_stride; i += num_lanes) lanes_at(sums + i) *= scale;
        }
        const float norm = 1.0f / state.sum;
        const int64_t token = c.rows->first_tokens[tile.row] + tile.first_query + query;
        float* to = c.output + token * c.output_token_stride + head * c.value_dim;
        for (int64_t i = 0; i < c.value_dim; ++i) to[i] = sums[i] * norm;
    }

    void keep(float* at, const Softmax& state, const float* sums) const {
        at[0] = state.most;
        at[1] = state.sum;
        std::memcpy(at + 2, sums, value_stride * sizeof(float));
    }

    const AttendCall& c;
    const int64_t group, value_stride;
    const int64_t num_tokens;  // of the step
    std::optional<TileProducts> tile_products;
    std::optional<DistanceTerms> distance_terms;
    std::vector<RowPair> pairs;
    float *packed_keys, *packed_values, *scores, *total, *span_total, *queries, *scales;
    float *largest, *lane_sums;  // of the span so far: scores, and weights by lanes
    Softmax *states, *span_states;
    Tokens* seen;  // by each row of a KV head
    // Of the tile.
    bool on_tiles = false;
    const Tile* next_tile = nullptr;
    int64_t row_number = 0, first_kv_head = 0, num_kv_heads = 0, num_rows = 0, last_token = 0;
    int64_t position = 0;  // of its first query
    // Of the step: its first position, and where its tokens lie.
    int64_t step = 0;
    const float *key_tokens[step_tokens], *value_tokens[step_tokens];
    const float *packed_tokens[step_tokens], *next_keys[step_tokens];
};
