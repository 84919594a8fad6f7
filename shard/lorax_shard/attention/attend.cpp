// Paged attention of a whole step on a CPU, float32. Loaded by cpp.py.
//
//   score[h][t] = cap(scaling * q[h] . k[t, g])     g = h / (H / G)
//   out[h]      = sum_t softmax(score[h])[t] * v[t, g]
// A layer's sink joins the softmax as one more score without a value.
//
// A row's queries are taken in tiles: some tokens with all query heads of one KV head, so that K
// and V are read once for all of them, where they lie in the cache. A tile passes through its
// context in steps of 64 tokens with a softmax that goes along (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao 2023, arXiv:2307.08691), and begins anew after each span of steps; the
// spans' results are added in order. So spans can be computed by several threads.
//
// Steps and spans begin at fixed positions, and each query has sums of its own: what it gets is
// the same to the last bit whatever is computed beside it, in chunks of any size, on any number of
// threads.

#include <omp.h>

#include <cstring>
#include <vector>

#include "tile.h"

// The rows of a step, the same for all layers; Python writes it anew for each step.
struct StepRows {
    int64_t num_rows;
    const int64_t* query_lens;     // tokens that are computed
    const int64_t* first_tokens;   // the first of them, among all tokens of the step
    const int64_t* context_lens;   // tokens with K and V, those of the step included
    const int64_t* tables;         // numbers of blocks, with `table_stride` from row to row
    int64_t table_stride;
};

// What Python hands over: all fields have eight bytes.
struct AttendCall {
    const float* query;  // tokens x H x D with the strides below; D is contiguous
    int64_t query_token_stride, query_head_stride;
    const float* keys;    // blocks x block_size x G x D
    const float* values;  // blocks x block_size x G x E
    float* output;        // tokens x H x E; H x E is contiguous
    int64_t output_token_stride;
    int64_t num_heads, num_kv_heads, key_dim, value_dim, block_size;
    double scaling;
    int64_t window, chunk;  // 0: none
    double softcap;         // 0: none
    const float* sinks;     // H, or null
    int64_t num_threads;
    const StepRows* rows;
};

namespace {

constexpr int64_t span_tokens = 512;
// Query rows (tokens x heads) of a tile: the most, and what it may shrink to so that all threads
// have tiles.
constexpr int64_t most_queries = 192, fewest_queries = 48;
// Query rows of a KV head up to which tokens are taken in pieces, for several KV heads, and how
// many numbers of a token these have at most.
constexpr int64_t few_rows = 32, piece_tokens = 16, near_numbers = 512;
// Tiles that each thread has at least, if there are so many.
constexpr int64_t tiles_a_thread = 4, chunks_a_thread = 8;
// Numbers that a call keeps of spans at most.
constexpr int64_t most_partial_numbers = 1 << 22;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 1 << 17;
constexpr float nothing = -1e30f;  // below every score

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Of one query and head: its largest score, and the sum of exp(score - most).
struct Softmax {
    float most, sum;
};

// Tokens of a row's context, from `first` to before `last`.
struct Tokens {
    int64_t first, last;
};

// Queries of a row with the heads of some KV heads, over some of their context.
struct Tile {
    int64_t row, first_query, num_queries, first_kv_head, last_kv_head;
    Tokens context;
    int64_t partial;  // where what it computes is kept until all spans are; -1: it is all

    int64_t num_rows(int64_t group) const {
        return num_queries * group * (last_kv_head - first_kv_head);
    }
};

Tokens seen_by(const AttendCall& c, int64_t position) {
    int64_t first = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0;
    if (c.chunk > 0) first = std::max(first, position - position % c.chunk);
    return {first, position + 1};
}

// What of a row's tokens are computed, in vectors from `first` to before `last`.
struct Vectors {
    int64_t first, last;

    explicit Vectors(Tokens some)
        : first(some.first / num_lanes), last((some.last + num_lanes - 1) / num_lanes) {}
};

constexpr int64_t step_vectors = step_tokens / num_lanes;

// Gives the tokens that a row does not see a score below all others.
inline void hide(Lanes* x, Vectors some, Tokens seen) {
    IntLanes at;
    for (int lane = 0; lane < num_lanes; ++lane) at[lane] = lane;
    for (int64_t v = some.first; v < some.last; ++v) {
        const IntLanes token = at + static_cast<int32_t>(v * num_lanes);
        const IntLanes is_seen = (token >= static_cast<int32_t>(seen.first)) &
                                 (token < static_cast<int32_t>(seen.last));
        x[v] = is_seen ? x[v] : Lanes{} - __builtin_inff();
    }
}

// Calls with each vector's number; where all are computed their count is known to the compiler.
template <class Take>
inline void each_vector(Vectors some, const Take& take) {
    if (some.first == 0 && some.last == step_vectors) {
#pragma GCC unroll 16
        for (int64_t v = 0; v < step_vectors; ++v) take(v);
    } else {
        for (int64_t v = some.first; v < some.last; ++v) take(v);
    }
}

// Turns the scores of up to tile_rows rows into weights, of the tokens that each sees; the others
// weigh 0. Finds by what earlier sums have to be multiplied.
__attribute__((noinline)) void soften(float* scores, int64_t count, Vectors some, const Tokens* seen,
                                      float softcap, Softmax* states, float* scales) {
    constexpr int64_t padded_rows = (tile_rows + num_lanes - 1) / num_lanes * num_lanes;
    float most[padded_rows], change[padded_rows] = {};
    for (int64_t row = 0; row < count; ++row) {
        Lanes* x = reinterpret_cast<Lanes*>(scores + row * step_tokens);
        if (softcap > 0.0f) each_vector(some, [&](int64_t v) { x[v] = cap(x[v], softcap); });
        if (seen[row].first > some.first * num_lanes || seen[row].last < some.last * num_lanes)
            hide(x, some, seen[row]);
        Lanes largest = Lanes{} + states[row].most;
        each_vector(some, [&](int64_t v) { largest = larger(x[v], largest); });
        most[row] = largest_lane(largest);
        change[row] = states[row].most - most[row];
    }
    for (int64_t row = 0; row < padded_rows; row += num_lanes)
        lanes_at(change + row) = exp_negative(lanes_at(change + row));
    for (int64_t row = 0; row < count; ++row) {
        Lanes* x = reinterpret_cast<Lanes*>(scores + row * step_tokens);
        Lanes sums = {};
        each_vector(some, [&](int64_t v) {
            x[v] = exp_negative(x[v] - most[row]);
            sums += x[v];
        });
        scales[row] = change[row];
        states[row] = {most[row], states[row].sum * change[row] + sum_lanes(sums)};
    }
}

// Adds what a later span has to what earlier ones have.
__attribute__((noinline)) void add_span(Softmax& state, float* total, const Softmax& later,
                                        const float* later_total, int64_t size) {
    const float most = std::max(state.most, later.most);
    const float scale = exp_negative(state.most - most);
    const float later_scale = exp_negative(later.most - most);
    state = {most, state.sum * scale + later.sum * later_scale};
    for (int64_t i = 0; i < size; i += num_lanes) {
        const Lanes earlier = lanes_at(total + i) * scale;
        lanes_at(total + i) = earlier + lanes_at(later_total + i) * later_scale;
    }
}

// Memory that a thread keeps from call to call, aligned to cache lines.
class Buffer {
   public:
    float* numbers(int64_t count) {
        if (static_cast<int64_t>(held.size()) < count + 16) held.resize(count + 16);
        const auto address = reinterpret_cast<uintptr_t>(held.data());
        return held.data() + (round_up(address, 64) - address) / sizeof(float);
    }

   private:
    std::vector<float> held;
};

// Computes tiles, one after the other, in memory of its own.
class Worker {
   public:
    Worker(const AttendCall& call, int64_t most_rows)
        : c(call), group(call.num_heads / call.num_kv_heads),
          value_stride(round_up(call.value_dim, num_lanes)) {
        static thread_local Buffer buffer;
        const int64_t per_row = c.key_dim + 2 * value_stride + 9;
        float* at = buffer.numbers(
            round_up(most_rows, 16) * (per_row + step_tokens) +
            step_tokens * (c.key_dim + value_stride) + 16);
        const auto take = [&](int64_t count) {
            return std::exchange(at, at + round_up(count, 16));
        };
        packed_keys = take(step_tokens * c.key_dim);
        packed_values = take(step_tokens * value_stride);
        scores = take(most_rows * step_tokens);
        total = take(most_rows * value_stride);
        span_total = take(most_rows * value_stride);
        queries = take(most_rows * c.key_dim);
        states = reinterpret_cast<Softmax*>(take(2 * most_rows));
        span_states = reinterpret_cast<Softmax*>(take(2 * most_rows));
        scales = take(most_rows);
        seen = reinterpret_cast<Tokens*>(take(4 * most_rows));
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
    void begin(const Tile& tile) {
        const StepRows& rows = *c.rows;
        table = rows.tables + tile.row * rows.table_stride;
        first_kv_head = tile.first_kv_head;
        num_kv_heads = tile.last_kv_head - tile.first_kv_head;
        num_rows = tile.num_queries * group;
        const int64_t position =
            rows.context_lens[tile.row] - rows.query_lens[tile.row] + tile.first_query;
        for (int64_t query = 0; query < tile.num_queries; ++query)
            std::fill_n(seen + query * group, group, seen_by(c, position + query));
        last_token = tile.context.last;
        const int64_t token = rows.first_tokens[tile.row] + tile.first_query;
        const auto scaling = static_cast<float>(c.scaling);
        for (int64_t kv = 0; kv < num_kv_heads; ++kv)
            for (int64_t row = 0; row < num_rows; ++row) {
                const int64_t head = (first_kv_head + kv) * group + row % group;
                const float* from = c.query + (token + row / group) * c.query_token_stride +
                                    head * c.query_head_stride;
                float* to = queries_of(kv, row);
                for (int64_t i = 0; i < c.key_dim; ++i) to[i] = from[i] * scaling;
            }
    }

    void compute_span(Tokens span) {
        std::fill_n(span_states, num_rows * num_kv_heads, Softmax{nothing, 0.0f});
        std::fill_n(span_total, num_rows * num_kv_heads * value_stride, 0.0f);
        for (int64_t at = span.first; at < span.last;) {
            step = at - at % step_tokens;
            const int64_t end = std::min(span.last, step + step_tokens);
            find_tokens({at - step, end - step});
            if (num_rows > few_rows)
                compute_many({at - step, end - step});
            else
                compute_few({at - step, end - step});
            at = end;
        }
    }

    // Takes tokens of a step for one KV head and many rows: a few rows after the others, so that
    // K and V stay in the first cache.
    void compute_many(Tokens in) {
        transpose_keys(key_tokens, value_tokens, 0, in.first, in.last, c.key_dim, packed_keys);
        pack_values(0, in);
        for (int64_t row = 0; row < num_rows; row += tile_rows) {
            const int64_t count = std::min<int64_t>(tile_rows, num_rows - row);
            const Tokens some{seen_in_step(row, in).first, seen_in_step(row + count - 1, in).last};
            if (some.first >= some.last) continue;
            compute_scores(0, row, some);
            soften_rows(0, row, some, in);
            add_values(0, row, some, packed_tokens, row == 0 ? next_keys : nullptr);
        }
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
                transpose_keys(key_tokens, ahead, kv * c.key_dim, piece.first, piece.last,
                               c.key_dim, packed_keys);
                for (int64_t row = 0; row < num_rows; row += tile_rows)
                    compute_scores(kv, row, piece);
            }
            at = piece.last;
        }
        for (int64_t kv = 0; kv < num_kv_heads; ++kv)
            for (int64_t row = 0; row < num_rows; row += tile_rows)
                soften_rows(kv, row, in, in);
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

    float* queries_of(int64_t kv, int64_t row) { return queries + (kv * num_rows + row) * c.key_dim; }

    float* scores_of(int64_t kv, int64_t row) { return scores + (kv * num_rows + row) * step_tokens; }

    void compute_scores(int64_t kv, int64_t row, Tokens some) {
        const Vectors vectors(some);
        products[std::min<int64_t>(tile_rows, num_rows - row)]->score(
            queries_of(kv, row), packed_keys, c.key_dim, vectors.first, vectors.last,
            scores_of(kv, row));
    }

    void soften_rows(int64_t kv, int64_t row, Tokens some, Tokens in) {
        const int64_t count = std::min<int64_t>(tile_rows, num_rows - row);
        Tokens each[tile_rows];
        for (int64_t i = 0; i < count; ++i) each[i] = seen_in_step(row + i, in);
        const int64_t at = kv * num_rows + row;
        soften(scores_of(kv, row), count, Vectors(some), each, static_cast<float>(c.softcap),
               span_states + at, scales + at);
    }

    void add_values(int64_t kv, int64_t row, Tokens some, const float* const* tokens,
                    const float* const* ahead, int64_t offset = 0) {
        const Products& found = *products[std::min<int64_t>(tile_rows, num_rows - row)];
        const int64_t at = kv * num_rows + row;
        (ahead ? found.weigh_first : found.weigh)(
            scores_of(kv, row), tokens, ahead, offset, value_stride / num_lanes, some.first,
            some.last, scales + at, span_total + at * value_stride, value_stride);
    }

    // Calls with K and V of each of some tokens, block by block.
    template <class Take>
    void each_token(const int64_t* table, int64_t kv_head, Tokens at, const Take& take) const {
        const int64_t key_size = c.num_kv_heads * c.key_dim;
        const int64_t value_size = c.num_kv_heads * c.value_dim;
        for (int64_t t = at.first; t < at.last;) {
            const int64_t block = t / c.block_size;
            const int64_t end = std::min(at.last, (block + 1) * c.block_size);
            const int64_t slot = table[block] * c.block_size + t - block * c.block_size;
            const float* key = c.keys + slot * key_size + kv_head * c.key_dim;
            const float* value = c.values + slot * value_size + kv_head * c.value_dim;
            for (; t < end; ++t, key += key_size, value += value_size) take(t, key, value);
        }
    }

    // Finds where K and V of the tokens of a step lie, and K of the step that follows.
    void find_tokens(Tokens in) {
        each_token(table, first_kv_head, {step + in.first, step + in.last},
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
            find_keys(table, first_kv_head, {next, last_token});
        } else if (next_tile) {
            const int64_t* next_table = c.rows->tables + next_tile->row * c.rows->table_stride;
            find_keys(next_table, next_tile->first_kv_head, next_tile->context);
        }
    }

    void find_keys(const int64_t* table, int64_t kv_head, Tokens at) {
        const int64_t begin = at.first - at.first % step_tokens;
        at.last = std::min(at.last, begin + step_tokens);
        each_token(table, kv_head, at, [&](int64_t t, const float* key, const float*) {
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
            const float sink = c.sinks[head], most = std::max(state.most, sink);
            const float scale = exp_negative(state.most - most);
            state.sum = state.sum * scale + exp_negative(sink - most);
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
    float *packed_keys, *packed_values, *scores, *total, *span_total, *queries, *scales;
    Softmax *states, *span_states;
    Tokens* seen;  // by each row of a KV head
    // Of the tile.
    const int64_t* table = nullptr;
    const Tile* next_tile = nullptr;
    int64_t first_kv_head = 0, num_kv_heads = 0, num_rows = 0, last_token = 0;
    // Of the step: its first position, and where its tokens lie.
    int64_t step = 0;
    const float *key_tokens[step_tokens], *value_tokens[step_tokens];
    const float *packed_tokens[step_tokens], *next_keys[step_tokens];
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

    void make(const AttendCall& c, int64_t num_threads) {
        tiles.clear();
        splits.clear();
        num_partials = most_rows = 0;
        const int64_t group = c.num_heads / c.num_kv_heads;
        const int64_t enough = num_threads == 1 ? 0 : tiles_a_thread * num_threads;
        int64_t queries = std::max<int64_t>(1, most_queries / group);
        const int64_t fewest = std::max<int64_t>(1, fewest_queries / group);
        while (queries > fewest && count(c, queries) * c.num_kv_heads < enough)
            queries = (queries + 1) / 2;
        const bool is_split = count(c, queries) * c.num_kv_heads < enough;
        const int64_t together = std::clamp<int64_t>(near_numbers / c.key_dim, 1, c.num_kv_heads);
        const bool is_together = count(c, queries) * c.num_kv_heads / together >= enough;
        for (int64_t row = 0; row < c.rows->num_rows; ++row) {
            const int64_t length = c.rows->query_lens[row];
            const int64_t position = c.rows->context_lens[row] - length;
            // The longest first: what comes last should be short.
            const int64_t num_tiles = (length + queries - 1) / queries;
            for (int64_t tile = num_tiles; tile-- > 0;) {
                const int64_t first = tile * queries, num = std::min(queries, length - first);
                const Tokens context{seen_by(c, position + first).first, position + first + num};
                const int64_t heads = is_together && num * group <= few_rows ? together : 1;
                for (int64_t kv = 0; kv < c.num_kv_heads; kv += heads)
                    add(c, {row, first, num, kv, std::min(c.num_kv_heads, kv + heads), context, -1},
                        is_split);
            }
        }
    }

   private:
    static int64_t count(const AttendCall& c, int64_t queries) {
        int64_t found = 0;
        for (int64_t row = 0; row < c.rows->num_rows; ++row)
            found += (c.rows->query_lens[row] + queries - 1) / queries;
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

int64_t work_of(const AttendCall& c) {
    int64_t pairs = 0;
    for (int64_t row = 0; row < c.rows->num_rows; ++row)
        pairs += c.rows->query_lens[row] * c.rows->context_lens[row];
    return pairs * c.num_heads * (c.key_dim + c.value_dim);
}

}  // namespace

extern "C" void lorax_attend_team(const AttendCall* call) {
    const AttendCall& c = *call;
    static thread_local Plan plan;
    static thread_local Buffer buffer;
    plan.make(c, omp_get_num_threads());
    const int64_t partial_size = round_up(c.value_dim, num_lanes) + 2;
    float* partials = nullptr;
    if (plan.num_partials > 0) {
#pragma omp single copyprivate(partials)
        partials = buffer.numbers(plan.num_partials * partial_size);
    }
    Worker worker(c, plan.most_rows);
    const auto num_tiles = static_cast<int64_t>(plan.tiles.size());
    const int64_t chunk = std::max<int64_t>(1, num_tiles / (omp_get_num_threads() * chunks_a_thread));
#pragma omp for schedule(dynamic, chunk)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const Tile* at = &plan.tiles[tile];
        worker.compute(*at, tile + 1 < num_tiles && (tile + 1) % chunk ? at + 1 : nullptr, partials, partial_size);
    }
    if (plan.num_partials == 0) return;
    const auto num_splits = static_cast<int64_t>(plan.splits.size());
#pragma omp for schedule(static)
    for (int64_t split = 0; split < num_splits; ++split) {
        const Plan::Split& found = plan.splits[split];
        const Tile& tile = plan.tiles[found.first_tile];
        const int64_t num_rows = tile.num_rows(c.num_heads / c.num_kv_heads);
        for (int64_t row = 0; row < num_rows; ++row)
            worker.add_partials(tile, row, found.num_spans, partials, partial_size);
    }
}

extern "C" void lorax_attend(const AttendCall* call) {
    const int64_t threads = work_of(*call) < too_little ? 1 : call->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_attend_team(call);
}
