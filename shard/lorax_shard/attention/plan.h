// What a step of attention is told, and how it is taken apart.

#pragma once

#include <vector>

#include "memory.h"
#include "products.h"

// The rows of a step, the same for all layers; Python writes it anew for each step.
struct StepRows {
    int64_t num_rows;
    const int64_t* query_lens;    // tokens that are computed
    const int64_t* first_tokens;  // the first of them, among all tokens of the step
    const int64_t* context_lens;  // tokens with K and V, those of the step included
    const int64_t* positions;     // of the first that is computed, in its row
    const int64_t* first_keys;    // the row's first token, among all tokens with K and V
    // Numbers of blocks, with `table_stride` from row to row. Null: K and V lie by tokens, as
    // queries do or for more of a row's tokens, and each token sees those behind it as well.
    const int64_t* tables;
    int64_t table_stride;
};

// What Python hands over: all fields have eight bytes.
struct AttendCall {
    const float* query;  // tokens x H x D with the strides below; D is contiguous
    int64_t query_token_stride, query_head_stride;
    const float* keys;    // blocks x block_size x G x D, or tokens x G x D; G x D is contiguous
    const float* values;  // blocks x block_size x G x E, or tokens x G x E
    int64_t key_token_stride, value_token_stride;
    float* output;        // tokens x H x E; H x E is contiguous
    int64_t output_token_stride;
    int64_t num_heads, num_kv_heads, key_dim, value_dim, block_size;
    double scaling;
    int64_t window, chunk;  // 0: none
    double softcap;         // 0: none
    const float* sinks;     // H, or null
    int64_t num_threads;
    const StepRows* rows;
    // What is added to a score by how far the token is behind the query: H times the distances, of
    // which 0 is at bias_centre, and a vector more. Or null.
    const float* bias;
    int64_t bias_head_stride, bias_centre;
    // What queries and keys themselves add by distance, which have their places in a token's: each
    // H x tokens x places_of_token, or null.
    const float *of_query, *of_key;
    const int32_t* places;
    int64_t places_of_token;
    // Or by what these are made of queries and keys: each H x D x table_stride, or null; see
    // distance_terms.h. Each head has K of its own.
    const float *key_table, *query_table;
    int64_t table_stride;

    bool has_tables() const { return key_table || query_table; }
};

// The tokens whose results are put together by themselves before they are added to others'.
constexpr int64_t span_tokens = 512;
// Query rows (tokens x heads) of a tile: the most, and what it may shrink to so that all threads
// have tiles.
constexpr int64_t most_queries = 384, fewest_queries = 48;
// The most where their terms by distance are computed with them.
constexpr int64_t most_queries_by_distance = 64;
// Query rows of a KV head up to which tokens are taken in pieces, for several KV heads, and how
// many numbers of a token these have at most.
constexpr int64_t few_rows = 32, piece_tokens = 16, near_numbers = 2048;
// Tokens of a row without a cache up to which cutting K and V for matrix tiles does not pay.
constexpr int64_t tokens_off_tiles = 128;
// Tiles that each thread has at least, if there are so many.
constexpr int64_t tiles_a_thread = 4;
// Numbers that a call keeps of spans at most.
constexpr int64_t most_partial_numbers = 1 << 22;

// Tokens of a row's context, from `first` to before `last`.
struct Tokens {
    int64_t first, last;
};

// What a token of a row sees that has so many tokens.
inline Tokens seen_by(const AttendCall& c, int64_t position, int64_t context_len) {
    int64_t first = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0;
    if (!c.rows->tables)
        return {first, c.window > 0 ? std::min(context_len, position + c.window) : context_len};
    if (c.chunk > 0) first = std::max(first, position - position % c.chunk);
    return {first, position + 1};
}

// Queries of a row with the heads of some KV heads, over some of their context.
struct Tile {
    int64_t row, first_query, num_queries, first_kv_head, last_kv_head;
    Tokens context;
    bool on_tiles;    // on matrix tiles: each tile of a row that has many queries
    int64_t partial;  // where what it computes is kept until all spans are; -1: it is all

    int64_t num_rows(int64_t group) const {
        return num_queries * group * (last_kv_head - first_kv_head);
    }
};

// How a step is taken apart. Every thread makes the same one.
struct Plan {
    std::vector<Tile> tiles;
    // Of tiles that are split: the first of each, and into how many spans.
    struct Split {
        int64_t first_tile, num_spans;
    };
    std::vector<Split> splits;
    int64_t num_partials;  // rows of which spans are kept
    int64_t most_rows;     // of a tile

    void make(const AttendCall& c, int64_t num_threads, bool has_tiles) {
        tiles.clear();
        splits.clear();
        num_partials = most_rows = 0;
        const int64_t group = c.num_heads / c.num_kv_heads;
        const int64_t enough = num_threads == 1 ? 0 : tiles_a_thread * num_threads;
        int64_t queries = std::max<int64_t>(
            1, c.has_tables() ? most_queries_by_distance : most_queries / group);
        const int64_t fewest = std::max<int64_t>(1, fewest_queries / group);
        while (queries > fewest && count(c, queries, false) * c.num_kv_heads < enough)
            queries = (queries + 1) / 2;
        const bool is_split = count(c, queries, false) * c.num_kv_heads < enough;
        // KV heads of a tile of few rows: neighbours in memory are read together.
        int64_t together = std::clamp<int64_t>(near_numbers / c.key_dim, 1, c.num_kv_heads);
        if (c.has_tables() || count(c, queries, is_split) * c.num_kv_heads < enough * together)
            together = 1;
        for (int64_t row = 0; row < c.rows->num_rows; ++row) {
            const int64_t length = c.rows->query_lens[row];
            const int64_t context_len = c.rows->context_lens[row];
            const int64_t position = c.rows->positions[row];
            const bool on_tiles = has_tiles && length * group > few_rows &&
                                  (c.rows->tables || length > tokens_off_tiles);
            // The longest first: what comes last should be short.
            const int64_t num_tiles = (length + queries - 1) / queries;
            for (int64_t tile = num_tiles; tile-- > 0;) {
                const int64_t first = tile * queries, num = std::min(queries, length - first);
                const Tokens context{
                    seen_by(c, position + first, context_len).first,
                    seen_by(c, position + first + num - 1, context_len).last};
                const int64_t heads = num * group <= few_rows && !on_tiles ? together : 1;
                for (int64_t kv = 0; kv < c.num_kv_heads; kv += heads) {
                    const int64_t last_head = std::min(c.num_kv_heads, kv + heads);
                    add(c, {row, first, num, kv, last_head, context, on_tiles, -1}, is_split);
                }
            }
        }
    }

   private:
    // Tiles of so many queries each, of a KV head; or their spans.
    static int64_t count(const AttendCall& c, int64_t queries, bool is_split) {
        int64_t found = 0;
        for (int64_t row = 0; row < c.rows->num_rows; ++row) {
            const int64_t spans = (c.rows->context_lens[row] + span_tokens - 1) / span_tokens;
            found += (c.rows->query_lens[row] + queries - 1) / queries * (is_split ? spans : 1);
        }
        return found;
    }

    void add(const AttendCall& c, Tile tile, bool is_split) {
        const Tokens all = tile.context;
        const int64_t num_rows = tile.num_rows(c.num_heads / c.num_kv_heads);
        const int64_t num_spans = (all.last - 1) / span_tokens - all.first / span_tokens + 1;
        const int64_t kept = (num_partials + num_rows * num_spans) * (c.value_dim + num_lanes + 2);
        most_rows = std::max(most_rows, num_rows);
        if (!is_split || num_spans == 1 || kept > most_partial_numbers) {
            tiles.push_back(tile);
            return;
        }
        splits.push_back({static_cast<int64_t>(tiles.size()), num_spans});
        for (int64_t at = all.first; at < all.last;) {
            const int64_t end = std::min(all.last, at - at % span_tokens + span_tokens);
            tile.context = {at, end};
            tile.partial = num_partials;
            num_partials += num_rows;
            tiles.push_back(tile);
            at = end;
        }
    }
};
