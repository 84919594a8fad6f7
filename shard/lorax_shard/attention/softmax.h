// Softmax that goes along with the tokens, of a few rows at a time.

#pragma once

#include "plan.h"

constexpr float nothing = -1e30f;  // below every score

// Of one query and head: its largest score, and the sum of 2^(score - most).
struct Softmax {
    float most, sum;
};

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
// weigh 0. Adds them up by lanes, and finds by what earlier sums have to be multiplied.
__attribute__((noinline)) void soften(float* scores, int64_t count, Vectors some,
                                      const Tokens* seen, float softcap, float* largest_so_far,
                                      float* lane_sums, float* scales) {
    constexpr int64_t padded_rows = (tile_rows + num_lanes - 1) / num_lanes * num_lanes;
    float most[padded_rows], change[padded_rows] = {};
    for (int64_t row = 0; row < count; ++row) {
        Lanes* x = reinterpret_cast<Lanes*>(scores + row * step_tokens);
        if (softcap > 0.0f) each_vector(some, [&](int64_t v) { x[v] = cap(x[v], softcap); });
        if (seen[row].first > some.first * num_lanes || seen[row].last < some.last * num_lanes)
            hide(x, some, seen[row]);
        Lanes largest = Lanes{} + largest_so_far[row];
        each_vector(some, [&](int64_t v) { largest = larger(x[v], largest); });
        most[row] = largest_lane(largest);
        change[row] = largest_so_far[row] - most[row];
    }
    for (int64_t row = 0; row < padded_rows; row += num_lanes)
        lanes_at(change + row) = power_of_two(lanes_at(change + row));
    for (int64_t row = 0; row < count; ++row) {
        Lanes* x = reinterpret_cast<Lanes*>(scores + row * step_tokens);
        Lanes sums = {};
        each_vector(some, [&](int64_t v) {
            x[v] = power_of_two(x[v] - most[row]);
            sums += x[v];
        });
        Lanes& all = lanes_at(lane_sums + row * num_lanes);
        all = all * change[row] + sums;
        largest_so_far[row] = most[row];
        scales[row] = change[row];
    }
}

// Adds what a later span has to what earlier ones have.
__attribute__((noinline)) void add_span(Softmax& state, float* total, const Softmax& later,
                                        const float* later_total, int64_t size) {
    const float most = std::max(state.most, later.most);
    const float scale = power_of_two(state.most - most);
    const float later_scale = power_of_two(later.most - most);
    state = {most, state.sum * scale + later.sum * later_scale};
    for (int64_t i = 0; i < size; i += num_lanes) {
        const Lanes earlier = lanes_at(total + i) * scale;
        lanes_at(total + i) = earlier + lanes_at(later_total + i) * later_scale;
    }
}
