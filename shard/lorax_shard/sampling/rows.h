// What kernel.py and table.py hand over, and what all parts of the kernel need.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

// As table.py lays it out: eight bytes each.
struct Row {
    int64_t source;    // row of the logits
    int64_t line;      // where its softmax is, or -1: it needs none
    int64_t raw_line;  // where that of its own logits is, or -1: logprobs are of what is drawn from
    double temperature;  // 0: the likeliest token
    int64_t top_k;       // 0: all
    double top_p, typical_p, min_p;
    double repetition, frequency, presence;
    const int64_t* prompt_ids;  // null without penalties
    int64_t num_prompt;
    const int64_t* output_ids;  // like those
    int64_t num_output;
    const int64_t* edit_ids;
    const float* edit_values;
    int64_t num_edits;
    const uint8_t* preferred;  // a bit for each token, the highest of a byte first; or null
    const uint32_t* allowed;   // a bit for each token, the lowest of a word first; null: all are
    int64_t num_allowed;       // words of it; tokens beyond them are forbidden
    uint64_t seed;
    uint64_t position;
    int64_t num_alternatives;
};

struct Batch {
    const float* logits;
    int64_t stride, vocab_size;
    float* lines;        // what the softmax is taken of
    const float* probs;  // the softmax
    const Row* rows;
    int64_t num_rows;
    double delta;  // of the watermark
    int64_t most_alternatives, num_threads;
    int64_t* ids;      // a row: its token, or -1
    double* logprobs;  // a row
    int64_t* alternative_ids;      // a row: as many as there are, then -1
    double* alternative_logprobs;
};

constexpr int num_lanes = 16;

// The largest value that is a number.
inline float largest(const float* values, int64_t n) {
    // Several at once: each takes longer than it keeps the processor from the next.
    constexpr int at_once = 4 * num_lanes;
    float most[at_once];
    for (float& each : most) each = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + at_once <= n; i += at_once)
        for (int at = 0; at < at_once; ++at)
            most[at] = values[i + at] > most[at] ? values[i + at] : most[at];
    for (; i < n; ++i) most[0] = values[i] > most[0] ? values[i] : most[0];
    return *std::max_element(most, most + at_once);
}

inline bool any_from(const float* values, float bound) {
    int any = 0;
    for (int lane = 0; lane < num_lanes; ++lane) any |= values[lane] >= bound;
    return any;
}

// Calls found(first, last) for parts, in order, that may have values of at least `bound`, which may
// rise meanwhile; most of a vocabulary has none.
template <class Found>
void parts_from(const float* values, int64_t n, const float& bound, const Found& found) {
    int64_t i = 0;
    for (; i + num_lanes <= n; i += num_lanes)
        if (any_from(values + i, bound)) found(i, i + num_lanes);
    if (i < n) found(i, n);
}

// The first value of at least `bound`; there is one.
inline int64_t first_from(const float* values, int64_t n, float bound) {
    int64_t i = 0;
    while (i + num_lanes <= n && !any_from(values + i, bound)) i += num_lanes;
    while (values[i] < bound) ++i;
    return i;
}

// A probability as a whole number: sums of them have no rounding.
constexpr float one = 0x1p62f;

inline int64_t to_fixed(float prob) { return int64_t(prob * one); }

}  // namespace
