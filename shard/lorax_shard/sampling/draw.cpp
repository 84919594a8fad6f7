// From logits to tokens, many rows at once, on a CPU. Loaded by kernel.py.
//
// Two calls with a softmax of torch's between them: the first writes what a row's softmax is taken
// of, one line a row; the second draws. Rows that take the likeliest token of their logits as they
// are, and report no more, need no line. The specification is distribution.py and id_tree.py: the
// same order of warpers, the same ties, the same numbers. Sums of probabilities are those of whole
// numbers, so no order of summing, no number of threads and no neighbour changes any of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "rows.h"
#include "warpers.h"

namespace {

// ---- before the softmax ----

void penalize(const Row& row, float* scores, int64_t vocab_size) {
    thread_local std::vector<int32_t> counts;
    if (int64_t(counts.size()) < vocab_size) counts.resize(vocab_size);
    const auto each_known = [&](const int64_t* ids, int64_t n, const auto& call) {
        for (int64_t i = 0; i < n; ++i)
            if (ids[i] >= 0 && ids[i] < vocab_size) call(ids[i]);
    };
    const auto each_output = [&](const auto& call) { each_known(row.output_ids, row.num_output, call); };
    const auto each = [&](const auto& call) {
        each_known(row.prompt_ids, row.num_prompt, call);
        each_output(call);
    };
    if (row.repetition != 1.0) {
        const float penalty = float(row.repetition);
        each([&](int64_t id) {
            if (counts[id]++) return;
            scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
        });
        each([&](int64_t id) { counts[id] = 0; });
    }
    if (row.frequency != 0.0 || row.presence != 0.0) {
        each_output([&](int64_t id) { ++counts[id]; });
        each_output([&](int64_t id) {
            if (!counts[id]) return;
            // Rounded before the sum, as the specification does.
            volatile const double amount = counts[id] * row.frequency;
            scores[id] -= float(amount + row.presence);
            counts[id] = 0;
        });
    }
}

void forbid(const Row& row, float* scores, int64_t vocab_size) {
    for (int64_t i = 0; i < vocab_size; ++i) {
        const uint32_t word = i / 32 < row.num_allowed ? row.allowed[i / 32] : 0;
        if (!(word >> i % 32 & 1)) scores[i] = -std::numeric_limits<float>::infinity();
    }
}

void adjust(const Row& row, float* scores, int64_t vocab_size, double delta) {
    if (row.allowed) forbid(row, scores, vocab_size);
    for (int64_t i = 0; i < row.num_edits; ++i)
        if (row.edit_ids[i] >= 0 && row.edit_ids[i] < vocab_size)
            scores[row.edit_ids[i]] += row.edit_values[i];
    if (row.preferred)
        for (int64_t i = 0; i < vocab_size; ++i)
            scores[i] += float(row.preferred[i / 8] >> (7 - i % 8) & 1) * float(delta);
    if (row.prompt_ids) penalize(row, scores, vocab_size);
}

// The maximum goes first: a tiny temperature cannot overflow then.
void shift(const float* scores, float* line, int64_t vocab_size, float temperature) {
    const float most = largest(scores, vocab_size);
    if (temperature == 1.0f)
        for (int64_t i = 0; i < vocab_size; ++i) line[i] = scores[i] - most;
    else
        for (int64_t i = 0; i < vocab_size; ++i) line[i] = (scores[i] - most) / temperature;
}

void prepare(const Batch& batch, const Row& row) {
    if (row.line < 0) return;
    const int64_t vocab_size = batch.vocab_size;
    const float* logits = batch.logits + row.source * batch.stride;
    const float* scores = logits;
    float* line = batch.lines + row.line * vocab_size;
    if (row.allowed || row.num_edits || row.preferred || row.prompt_ids) {
        std::memcpy(line, logits, vocab_size * sizeof(float));
        adjust(row, line, vocab_size, batch.delta);
        scores = line;
    }
    const double least = std::numeric_limits<float>::min();
    shift(scores, line, vocab_size,
          row.temperature > 0 ? float(std::max(row.temperature, least)) : 1.0f);
    if (row.raw_line < 0) return;
    float* raw_line = batch.lines + row.raw_line * vocab_size;
    if (row.allowed) {
        std::memcpy(raw_line, logits, vocab_size * sizeof(float));
        forbid(row, raw_line, vocab_size);
        logits = raw_line;
    }
    shift(logits, raw_line, vocab_size, 1.0f);
}

// ---- numbers ----

// Philox4x32-10; see draws.py.
void philox(uint32_t (&c)[4], uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t first = uint32_t(b >> 32) ^ c[1] ^ k0, third = uint32_t(a >> 32) ^ c[3] ^ k1;
        c[0] = first, c[1] = uint32_t(b), c[2] = third, c[3] = uint32_t(a);
    }
}

inline double to_unit(uint32_t high, uint32_t low) {
    return double(uint64_t(high >> 5) << 26 | low >> 6) * 0x1p-53;
}

// One number in [0, 1) a level, two from each counter.
void uniforms(const Row& row, double* numbers, int num_levels) {
    for (int level = 0; level < num_levels; level += 2) {
        uint32_t words[4] = {uint32_t(row.position), uint32_t(row.position >> 32),
                             uint32_t(level / 2), 0};
        philox(words, row.seed);
        numbers[level] = to_unit(words[0], words[1]);
        numbers[level + 1] = to_unit(words[2], words[3]);
    }
}

// ---- the draw ----

constexpr int block_levels = 8, block = 1 << block_levels;

inline int bit_length(uint64_t value) { return value ? 64 - __builtin_clzll(value) : 0; }

int64_t descend(const int64_t* ends, int64_t n, const double* numbers) {
    int64_t leaf = 0, start = 0, stop = ends[n - 1];
    for (int level = bit_length(uint64_t(n - 1)) - 1; level >= 0; --level) {
        const int64_t middle = leaf + (int64_t(1) << level);
        const int64_t split = middle <= n ? ends[middle - 1] : stop;
        const int64_t left = split - start, right = stop - split;
        if (right > 0 && (left <= 0 || numbers[level] * double(left + right) >= double(left)))
            leaf = middle, start = split;
        else
            stop = split;
    }
    return leaf;
}

struct Draw {
    int64_t id;
    int64_t total;
};

Draw draw_token(const Row& row, const Tokens& tokens, int64_t vocab_size) {
    const int num_levels = std::max(bit_length(uint64_t(vocab_size - 1)), block_levels);
    double numbers[66];
    uniforms(row, numbers, num_levels);
    const int64_t num_blocks = (vocab_size + block - 1) / block;
    thread_local std::vector<int64_t> ends;
    ends.assign(num_blocks, 0);
    if (tokens.is_all) {
        for (int64_t at = 0; at < num_blocks; ++at) {
            const int64_t last = std::min((at + 1) * block, vocab_size);
            int64_t sum = 0;
            for (int64_t i = at * block; i < last; ++i) sum += to_fixed(tokens.probs[i]);
            ends[at] = sum;
        }
    } else {
        for (int64_t i = 0; i < tokens.size; ++i) ends[tokens.ids[i] / block] += to_fixed(tokens.probs[i]);
    }
    for (int64_t at = 1; at < num_blocks; ++at) ends[at] += ends[at - 1];
    const int64_t total = ends.back();
    const int64_t first = block * descend(ends.data(), num_blocks, numbers + block_levels);
    int64_t within[block] = {};
    if (tokens.is_all) {
        for (int64_t i = first; i < std::min(first + block, vocab_size); ++i)
            within[i - first] = to_fixed(tokens.probs[i]);
    } else {
        const auto end = tokens.ids.begin() + tokens.size;
        for (auto at = std::lower_bound(tokens.ids.begin(), end, int32_t(first));
             at != end && *at < first + block; ++at)
            within[*at - first] = to_fixed(tokens.probs[at - tokens.ids.begin()]);
    }
    for (int i = 1; i < block; ++i) within[i] += within[i - 1];
    return {first + descend(within, block, numbers), total};
}

// ---- what is reported ----

// Writes the ids of the largest values above `floor`, best first, ties by id; returns how many.
int64_t best_of(const float* values, int64_t n, int64_t count, float floor, int64_t* best) {
    int64_t num = 0;
    float bound = std::nextafter(floor, std::numeric_limits<float>::infinity());
    parts_from(values, n, bound, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            if (!(values[i] >= bound)) continue;
            int64_t at = num < count ? num++ : count - 1;
            for (; at > 0 && values[best[at - 1]] < values[i]; --at) best[at] = best[at - 1];
            best[at] = i;
            if (num == count)
                bound = std::nextafter(values[best[count - 1]], std::numeric_limits<float>::infinity());
        }
    });
    return num;
}

// From a line whose softmax is of all its tokens. Its largest value is 0: the logprob of a value is
// itself and the largest logprob.
void report_line(const Batch& batch, int64_t row, int64_t line, int64_t id) {
    const float* values = batch.lines + line * batch.vocab_size;
    const float* probs = batch.probs + line * batch.vocab_size;
    const double most = std::log(double(probs[first_from(values, batch.vocab_size, 0.0f)]));
    batch.logprobs[row] = double(values[id]) + most;
    const int64_t count = batch.rows[row].num_alternatives;
    if (!count) return;
    int64_t* best = batch.alternative_ids + row * batch.most_alternatives;
    const float none = -std::numeric_limits<float>::infinity();
    const int64_t num = best_of(values, batch.vocab_size, count, none, best);
    for (int64_t i = 0; i < num; ++i)
        batch.alternative_logprobs[row * batch.most_alternatives + i] = double(values[best[i]]) + most;
}

void report_drawn(const Batch& batch, int64_t row, const Tokens& tokens, const Draw& drawn,
                  const float* probs) {
    const double log_total = std::log(double(drawn.total) / one);
    batch.logprobs[row] = std::log(double(probs[drawn.id])) - log_total;
    const int64_t count = batch.rows[row].num_alternatives;
    if (!count) return;
    int64_t* best = batch.alternative_ids + row * batch.most_alternatives;
    const int64_t num = best_of(tokens.probs, tokens.size, count, 0.0f, best);
    for (int64_t i = 0; i < num; ++i) {
        const double prob = tokens.probs[best[i]];
        batch.alternative_logprobs[row * batch.most_alternatives + i] = std::log(prob) - log_total;
        if (!tokens.is_all) best[i] = tokens.ids[best[i]];
    }
}

// ---- the likeliest token ----

// e^x for x <= 0, to about 1e-7 of it; NaN for NaN.
inline float exponential(float x) {
    constexpr float is_nothing = -87.0f;
    const float in_range = x < is_nothing ? is_nothing : x;
    // The nearest whole number of ln 2: what is added leaves no bits behind the point.
    const float whole = (in_range * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float rest = (in_range - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float series = rest * (1.0f / 5040) + 1.0f / 720;
    series = series * rest + 1.0f / 120;
    series = series * rest + 1.0f / 24;
    series = series * rest + 1.0f / 6;
    series = series * rest + 0.5f;
    series = series * rest + 1.0f;
    series = series * rest + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < is_nothing ? 0.0f : series * power;
}

// The sum of e^(value - most).
double sum_of_weights(const float* values, int64_t n, float most) {
    // In few parts each lane adds little to much.
    constexpr int64_t part = 16 * num_lanes;
    double sum = 0;
    int64_t i = 0;
    for (; i + part <= n; i += part) {
        float sums[num_lanes] = {};
        for (int64_t at = i; at < i + part; at += num_lanes)
            for (int lane = 0; lane < num_lanes; ++lane)
                sums[lane] += exponential(values[at + lane] - most);
        for (float each : sums) sum += each;
    }
    for (; i < n; ++i) sum += exponential(values[i] - most);
    return sum;
}

// Takes it of logits, or of a line: a number less the largest one is the same of both.
void take_likeliest(const Batch& batch, int64_t at, const float* values) {
    const float most = largest(values, batch.vocab_size);
    const double sum = sum_of_weights(values, batch.vocab_size, most);
    if (std::isnan(sum)) return;
    // The first of equal ones.
    batch.ids[at] = first_from(values, batch.vocab_size, most);
    batch.logprobs[at] = -std::log(sum);
}

void finish(const Batch& batch, int64_t at) {
    const Row& row = batch.rows[at];
    const int64_t vocab_size = batch.vocab_size;
    if (row.temperature <= 0 && row.raw_line < 0 && !row.num_alternatives)
        return take_likeliest(batch, at,
                              row.line < 0 ? batch.logits + row.source * batch.stride
                                           : batch.lines + row.line * vocab_size);
    const float* probs = batch.probs + row.line * vocab_size;
    // One NaN, one +inf or nothing but -inf makes a row's whole softmax NaN.
    if (std::isnan(probs[0])) return;
    if (row.temperature <= 0) {
        // The first of equal ones.
        batch.ids[at] = first_from(batch.lines + row.line * vocab_size, vocab_size, 0.0f);
    } else {
        thread_local Tokens tokens;
        tokens.start(probs, vocab_size);
        warp(row, tokens, vocab_size);
        const Draw drawn = draw_token(row, tokens, vocab_size);
        batch.ids[at] = drawn.id;
        if (row.raw_line < 0) return report_drawn(batch, at, tokens, drawn, probs);
    }
    report_line(batch, at, row.raw_line < 0 ? row.line : row.raw_line, batch.ids[at]);
}

}  // namespace

// Writes the lines.
extern "C" void lorax_prepare_draws(const Batch* batch) {
    const int num_threads = int(batch->num_threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < batch->num_rows; ++row) prepare(*batch, batch->rows[row]);
}

// Draws from the lines' softmax.
extern "C" void lorax_finish_draws(const Batch* batch) {
    const int num_threads = int(batch->num_threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int64_t row = 0; row < batch->num_rows; ++row) finish(*batch, row);
}
