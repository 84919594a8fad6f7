// Paged attention of a whole step on a CPU, float32. Loaded by cpp.py.
//
//   score[h][t] = cap(scaling * q[h] . k[t, g])     g = h / (H / G)
//   out[h]      = sum_t softmax(score[h])[t] * v[t, g]
// A layer's sink joins the softmax as one more score without a value. Rows without a cache may have
// a bias: what is added to scores by distance, for all queries and keys or by each of them.
//
// A row's queries are taken in tiles: some tokens with all query heads of one KV head, so that K
// and V are read once for all of them, where they lie in the cache. A tile passes through its
// context in steps of 64 tokens with a softmax that goes along (Milakov and Gimelshein 2018,
// arXiv:1805.02867; Dao 2023, arXiv:2307.08691), and begins anew after each span of steps; the
// spans' results are added in order. So spans can be computed by several threads.
//
// Scores are counted in units of ln 2, queries and whatever is added to scores included.
//
// Steps and spans begin at fixed positions, and each query has sums of its own: what it gets is
// the same to the last bit whatever is computed beside it, in chunks of any size, on any number of
// threads.

#include <omp.h>

#include "worker.h"

namespace {

// Parts of a step that each thread takes at least, if there are so many: one that is held up
// leaves the others' to them.
constexpr int64_t chunks_a_thread = 8;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 1 << 17;

int64_t work_of(const AttendCall& c) {
    int64_t pairs = 0;
    for (int64_t row = 0; row < c.rows->num_rows; ++row)
        pairs += c.rows->query_lens[row] * c.rows->context_lens[row];
    return pairs * c.num_heads * (c.key_dim + c.value_dim);
}

// Called by all threads of a team.
void attend(const AttendCall& c, bool on_tiles) {
    static thread_local Plan plan;
    static thread_local Buffer buffer;
    on_tiles = on_tiles && TileProducts::fits(c.key_dim, c.value_dim);
    plan.make(c, omp_get_num_threads(), on_tiles);
    const int64_t partial_size = round_up(c.value_dim, num_lanes) + 2;
    float* partials = nullptr;
    if (plan.num_partials > 0) {
#pragma omp single copyprivate(partials)
        partials = buffer.numbers(plan.num_partials * partial_size);
    }
    Worker worker(c, plan.most_rows, on_tiles);
    const auto num_tiles = static_cast<int64_t>(plan.tiles.size());
    const int64_t num_chunks = omp_get_num_threads() * chunks_a_thread;
    const int64_t chunk = std::max<int64_t>(1, num_tiles / num_chunks);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const bool is_last = tile + 1 == num_tiles || (tile + 1) % chunk == 0;
        worker.compute(plan.tiles[tile], is_last ? nullptr : &plan.tiles[tile + 1], partials,
                       partial_size);
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

}  // namespace

extern "C" void lorax_attend_team(const AttendCall* call) { attend(*call, false); }

extern "C" void lorax_attend(const AttendCall* call) {
    const int64_t threads = work_of(*call) < too_little ? 1 : call->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    attend(*call, false);
}

// Whether this processor has matrix tiles that this process may use.
extern "C" int64_t lorax_attention_has_tiles() {
#ifdef LORAX_MATRIX_TILES
    return matrix_tiles::are_granted();
#else
    return 0;
#endif
}

// The same with many rows on matrix tiles, where they are there.
extern "C" void lorax_attend_on_tiles_team(const AttendCall* call) { attend(*call, true); }

extern "C" void lorax_attend_on_tiles(const AttendCall* call) {
    const int64_t threads = work_of(*call) < too_little ? 1 : call->num_threads;
#pragma omp parallel num_threads(threads) if (threads > 1)
    attend(*call, true);
}
