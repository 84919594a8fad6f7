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
// Query rows up to which values are read where they lie; beyond, copying them pays.
constexpr int64_t few_queries = 12;
// Tiles that each thread has at least, if there are so many.
constexpr int64_t tiles_a_thread = 4;
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

// Queries of a row with the heads of a KV head, over some of their context.
struct Tile {
    int64_t row, first_query, num_queries, kv_head;
    Tokens context;
    int64_t partial;  // where what it computes is kept until all spans are; -1: it is all
};

Tokens seen_by(const AttendCall& c, int64_t position) {
    int64_t first = c.window > 0 ? std::max<int64_t>(0, position - c.window + 1) : 0;
    if (c.chunk > 0) first = std::max(first, position - position % c.chunk);
    return {first, position + 1};
}

inline const float* token_of(const float* pool, const AttendCall& c, const int64_t* table,
                             int64_t at, int64_t token_size) {
    return pool + (table[at / c.block_size] * c.block_size + at % c.block_size) * token_size;
}

// Turns the scores of the vectors [first, last) into weights; of the tokens [seen.first,
// seen.last) only, the others weigh 0. Returns by what earlier sums have to be multiplied.
__attribute__((noinline)) float soften(float* scores, int64_t first, int64_t last, Tokens seen,
                                       float softcap, Softmax& state) {
    Lanes* x = reinterpret_cast<Lanes*>(scores);
    if (softcap > 0.0f)
        for (int64_t v = first; v < last; ++v) x[v] = cap(x[v], softcap);
    if (seen.first > first * num_lanes || seen.last < last * num_lanes) {
        IntLanes at;
        for (int lane = 0; lane < num_lanes; ++lane) at[lane] = lane;
        for (int64_t v = first; v < last; ++v) {
            const IntLanes token = at + static_cast<int32_t>(v * num_lanes);
            const IntLanes is_seen = (token >= static_cast<int32_t>(seen.first)) &
                                     (token < static_cast<int32_t>(seen.last));
            x[v] = is_seen ? x[v] : Lanes{} - __builtin_inff();
        }
    }
    Lanes most = Lanes{} + state.most;
    for (int64_t v = first; v < last; ++v) most = larger(x[v], most);
    const float new_most = largest_lane(most);
    Lanes sums = {};
    for (int64_t v = first; v < last; ++v) {
        x[v] = exp_negative(x[v] - new_most);
        sums += x[v];
    }
    const float scale = exp_negative(state.most - new_most);
    state = {new_most, state.sum * scale + sum_lanes(sums)};
    return scale;
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
    explicit Worker(const AttendCall& call)
        : c(call), group(call.num_heads / call.num_kv_heads),
          value_stride(round_up(call.value_dim, num_lanes)) {
        static thread_local Buffer buffer;
        const int64_t most_rows = std::max(most_queries, group);
        const int64_t per_row = c.key_dim + 2 * value_stride + 4;
        float* at = buffer.numbers(round_up(most_rows * per_row, 16) +
                                   step_tokens * (c.key_dim + value_stride) +
                                   tile_rows * step_tokens);
        const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
        packed_keys = take(step_tokens * c.key_dim);
        packed_values = take(step_tokens * value_stride);
        scores = take(tile_rows * step_tokens);
        total = take(most_rows * value_stride);
        span_total = take(most_rows * value_stride);
        queries = take(most_rows * c.key_dim);
        states = reinterpret_cast<Softmax*>(take(2 * most_rows));
        span_states = reinterpret_cast<Softmax*>(take(2 * most_rows));
    }

    void compute(const Tile& tile, float* partials, int64_t partial_size) {
        begin(tile);
        for (int64_t at = tile.context.first; at < tile.context.last;) {
            const int64_t end =
                std::min(tile.context.last, at - at % span_tokens + span_tokens);
            compute_span({at, end});
            if (at == tile.context.first) {
                std::swap(total, span_total);
                std::swap(states, span_states);
            } else {
                for (int64_t row = 0; row < num_rows; ++row)
                    add_span(states[row], total + row * value_stride, span_states[row],
                             span_total + row * value_stride, value_stride);
            }
            at = end;
        }
        for (int64_t row = 0; row < num_rows; ++row) {
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
        const int64_t stride = tile.num_queries * group * partial_size;
        float* first = partials + (tile.partial + row) * partial_size;
        Softmax state = {first[0], first[1]};
        for (int64_t span = 1; span < num_spans; ++span) {
            const float* later = first + span * stride;
            add_span(state, first + 2, {later[0], later[1]}, later + 2, value_stride);
        }
        finish(tile, row, state, first + 2);
    }

   private:
    int64_t position_of(const Tile& tile, int64_t query) const {
        const StepRows& rows = *c.rows;
        return rows.context_lens[tile.row] - rows.query_lens[tile.row] + tile.first_query + query;
    }

    void begin(const Tile& tile) {
        const StepRows& rows = *c.rows;
        table = rows.tables + tile.row * rows.table_stride;
        kv_head = tile.kv_head;
        num_rows = tile.num_queries * group;
        first_position = position_of(tile, 0);
        const int64_t token = rows.first_tokens[tile.row] + tile.first_query;
        const auto scaling = static_cast<float>(c.scaling);
        const float* first = c.query + token * c.query_token_stride +
                             kv_head * group * c.query_head_stride;
        // Numbers of the rows of a tile lie beside each other: q[i][row].
        for (int64_t begin = 0; begin < num_rows; begin += tile_rows) {
            const int64_t count = std::min<int64_t>(tile_rows, num_rows - begin);
            for (int64_t row = 0; row < count; ++row) {
                const int64_t query = (begin + row) / group, head = (begin + row) % group;
                const float* from =
                    first + query * c.query_token_stride + head * c.query_head_stride;
                float* to = queries + begin * c.key_dim + row;
                for (int64_t i = 0; i < c.key_dim; ++i) to[i * count] = from[i] * scaling;
            }
        }
    }

    void compute_span(Tokens span) {
        std::fill_n(span_states, num_rows, Softmax{nothing, 0.0f});
        std::fill_n(span_total, num_rows * value_stride, 0.0f);
        for (int64_t at = span.first; at < span.last;) {
            const int64_t begin = at - at % step_tokens;
            const int64_t end = std::min(span.last, begin + step_tokens);
            compute_step(begin, {at - begin, end - begin});
            at = end;
        }
    }

    // Takes the tokens [in.first, in.last) of the step that begins at position `begin`.
    void compute_step(int64_t begin, Tokens in) {
        find_tokens(begin, in);
        transpose_keys(key_tokens, in.first, in.last, c.key_dim, packed_keys);
        if (num_rows > few_queries || c.value_dim % num_lanes) pack_values(in);
        for (int64_t row = 0; row < num_rows; row += tile_rows)
            compute_rows(row, std::min<int64_t>(tile_rows, num_rows - row), begin, in);
    }

    void compute_rows(int64_t first_row, int64_t count, int64_t begin, Tokens in) {
        const auto seen_in_step = [&](int64_t row) {
            const Tokens seen = seen_by(c, first_position + row / group);
            return Tokens{std::clamp(seen.first - begin, in.first, in.last),
                          std::clamp(seen.last - begin, in.first, in.last)};
        };
        const Tokens some{seen_in_step(first_row).first, seen_in_step(first_row + count - 1).last};
        if (some.first >= some.last) return;
        const int64_t first = some.first / num_lanes;
        const int64_t last = (some.last + num_lanes - 1) / num_lanes;
        products[count]->score(queries + first_row * c.key_dim, packed_keys, c.key_dim, first, last,
                               scores);
        float scales[tile_rows];
        for (int64_t row = 0; row < count; ++row)
            scales[row] =
                soften(scores + row * step_tokens, first, last, seen_in_step(first_row + row),
                       static_cast<float>(c.softcap), span_states[first_row + row]);
        products[count]->weigh(scores, value_tokens, value_stride / num_lanes, some.first,
                               some.last, scales, span_total + first_row * value_stride,
                               value_stride);
    }

    void find_tokens(int64_t begin, Tokens in) {
        const int64_t key_size = c.num_kv_heads * c.key_dim;
        const int64_t value_size = c.num_kv_heads * c.value_dim;
        for (int64_t t = in.first; t < in.last; ++t) {
            key_tokens[t] =
                token_of(c.keys, c, table, begin + t, key_size) + kv_head * c.key_dim;
            value_tokens[t] =
                token_of(c.values, c, table, begin + t, value_size) + kv_head * c.value_dim;
        }
        // Lanes beside them are computed with any token, and not used.
        const int64_t first = in.first - in.first % num_lanes;
        std::fill(key_tokens + first, key_tokens + in.first, key_tokens[in.first]);
        const int64_t last = round_up(in.last, num_lanes);
        std::fill(key_tokens + in.last, key_tokens + last, key_tokens[in.last - 1]);
    }

    void pack_values(Tokens in) {
        for (int64_t t = in.first; t < in.last; ++t) {
            float* to = packed_values + t * value_stride;
            std::memcpy(to, value_tokens[t], c.value_dim * sizeof(float));
            std::fill(to + c.value_dim, to + value_stride, 0.0f);
            value_tokens[t] = to;
        }
    }

    void finish(const Tile& tile, int64_t row, Softmax state, float* sums) {
        const int64_t head = tile.kv_head * group + row % group;
        if (c.sinks) {
            const float sink = c.sinks[head], most = std::max(state.most, sink);
            const float scale = exp_negative(state.most - most);
            state.sum = state.sum * scale + exp_negative(sink - most);
            for (int64_t i = 0; i < value_stride; i += num_lanes) lanes_at(sums + i) *= scale;
        }
        const float norm = 1.0f / state.sum;
        const int64_t token = c.rows->first_tokens[tile.row] + tile.first_query + row / group;
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
    float *packed_keys, *packed_values, *scores, *total, *span_total, *queries;
    Softmax *states, *span_states;
    const float *key_tokens[step_tokens], *value_tokens[step_tokens];
    // Of the tile.
    const int64_t* table = nullptr;
    int64_t kv_head = 0, num_rows = 0, first_position = 0;
};

// How a step is taken apart. Every thread makes the same one.
struct Plan {
    std::vector<Tile> tiles;
    // Of tiles that are split: the first of each, and into how many spans.
    struct Split {
        int64_t first_tile, num_spans, first_row;
    };
    std::vector<Split> splits;
    int64_t num_partials = 0;    // rows of which spans are kept
    int64_t num_split_rows = 0;  // rows that are put together of spans

    void make(const AttendCall& c, int64_t num_threads) {
        tiles.clear();
        splits.clear();
        num_partials = num_split_rows = 0;
        const int64_t group = c.num_heads / c.num_kv_heads;
        const int64_t enough = num_threads == 1 ? 0 : tiles_a_thread * num_threads;
        int64_t queries = std::max<int64_t>(1, most_queries / group);
        const int64_t fewest = std::max<int64_t>(1, fewest_queries / group);
        while (queries > fewest && count(c, queries) < enough) queries = (queries + 1) / 2;
        const bool is_split = count(c, queries) < enough;
        for (int64_t row = 0; row < c.rows->num_rows; ++row) {
            const int64_t length = c.rows->query_lens[row];
            const int64_t position = c.rows->context_lens[row] - length;
            // The longest first: what comes last should be short.
            const int64_t num_tiles = (length + queries - 1) / queries;
            for (int64_t tile = num_tiles; tile-- > 0;) {
                const int64_t first = tile * queries, num = std::min(queries, length - first);
                const Tokens context{seen_by(c, position + first).first, position + first + num};
                for (int64_t kv_head = 0; kv_head < c.num_kv_heads; ++kv_head)
                    add(c, {row, first, num, kv_head, context, -1}, is_split, num * group);
            }
        }
    }

   private:
    static int64_t count(const AttendCall& c, int64_t queries) {
        int64_t found = 0;
        for (int64_t row = 0; row < c.rows->num_rows; ++row)
            found += (c.rows->query_lens[row] + queries - 1) / queries;
        return found * c.num_kv_heads;
    }

    void add(const AttendCall& c, Tile tile, bool is_split, int64_t num_rows) {
        const Tokens all = tile.context;
        const int64_t num_spans = (all.last - 1) / span_tokens - all.first / span_tokens + 1;
        const int64_t kept = (num_partials + num_rows * num_spans) * (c.value_dim + num_lanes + 2);
        if (!is_split || num_spans == 1 || kept > most_partial_numbers) {
            tiles.push_back(tile);
            return;
        }
        splits.push_back({static_cast<int64_t>(tiles.size()), num_spans, num_split_rows});
        num_split_rows += num_rows;
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
    Worker worker(c);
    const auto num_tiles = static_cast<int64_t>(plan.tiles.size());
#pragma omp for schedule(dynamic, 1)
    for (int64_t tile = 0; tile < num_tiles; ++tile)
        worker.compute(plan.tiles[tile], partials, partial_size);
    if (plan.num_partials == 0) return;
    const auto num_splits = static_cast<int64_t>(plan.splits.size());
#pragma omp for schedule(static)
    for (int64_t split = 0; split < num_splits; ++split) {
        const Plan::Split& found = plan.splits[split];
        const Tile& tile = plan.tiles[found.first_tile];
        const int64_t num_rows = tile.num_queries * (c.num_heads / c.num_kv_heads);
        for (int64_t row = 0; row < num_rows; ++row)
            worker.add_partials(tile, row, found.num_spans, partials, partial_size);
    }
}

extern "C" void lorax_attend(const AttendCall* call) {
    const int64_t threads = work_of(*call) < too_little ? 1 : call->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_attend_team(call);
}
