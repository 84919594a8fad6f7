// From logits to tokens, many rows at once, on a CPU. Loaded by kernel.py.
//
// Two calls with a softmax of torch's between them: the first writes what a row's softmax is taken
// of, one line a row; the second draws. The specification is distribution.py and id_tree.py: the
// same order of warpers, the same ties, the same numbers. Sums of probabilities are those of whole
// numbers, so no order of summing, no number of threads and no neighbour changes any of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// As kernel.py lays it out: eight bytes each.
struct Row {
    int64_t source;    // row of the logits
    int64_t line;      // where its softmax is
    int64_t raw_line;  // where that of its own logits is, or -1: logprobs are of what is drawn from
    double temperature;  // 0: the likeliest token
    int64_t top_k;       // 0: all
    double top_p, typical_p, min_p;
    double repetition, frequency, presence;
    const int64_t* ids;  // prompt, then output; null without penalties
    int64_t num_prompt, num_ids;
    const int64_t* edit_ids;
    const float* edit_values;
    int64_t num_edits;
    const uint8_t* preferred;  // a bit for each token, the highest of a byte first; or null
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
float largest(const float* values, int64_t n) {
    float most[num_lanes];
    for (float& each : most) each = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + num_lanes <= n; i += num_lanes)
        for (int lane = 0; lane < num_lanes; ++lane)
            most[lane] = values[i + lane] > most[lane] ? values[i + lane] : most[lane];
    for (; i < n; ++i) most[0] = values[i] > most[0] ? values[i] : most[0];
    return *std::max_element(most, most + num_lanes);
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
int64_t first_from(const float* values, int64_t n, float bound) {
    int64_t i = 0;
    while (i + num_lanes <= n && !any_from(values + i, bound)) i += num_lanes;
    while (values[i] < bound) ++i;
    return i;
}

// ---- before the softmax ----

void penalize(const Row& row, float* scores, int64_t vocab_size) {
    thread_local std::vector<int32_t> counts;
    if (int64_t(counts.size()) < vocab_size) counts.resize(vocab_size);
    const auto each_known = [&](int64_t from, const auto& call) {
        for (int64_t i = from; i < row.num_ids; ++i)
            if (row.ids[i] >= 0 && row.ids[i] < vocab_size) call(row.ids[i]);
    };
    if (row.repetition != 1.0) {
        const float penalty = float(row.repetition);
        each_known(0, [&](int64_t id) {
            if (counts[id]++) return;
            scores[id] = scores[id] < 0 ? scores[id] * penalty : scores[id] / penalty;
        });
        each_known(0, [&](int64_t id) { counts[id] = 0; });
    }
    if (row.frequency != 0.0 || row.presence != 0.0) {
        each_known(row.num_prompt, [&](int64_t id) { ++counts[id]; });
        each_known(row.num_prompt, [&](int64_t id) {
            if (!counts[id]) return;
            // Rounded before the sum, as the specification does.
            volatile const double amount = counts[id] * row.frequency;
            scores[id] -= float(amount + row.presence);
            counts[id] = 0;
        });
    }
}

void adjust(const Row& row, float* scores, int64_t vocab_size, double delta) {
    for (int64_t i = 0; i < row.num_edits; ++i)
        if (row.edit_ids[i] >= 0 && row.edit_ids[i] < vocab_size)
            scores[row.edit_ids[i]] += row.edit_values[i];
    if (row.preferred)
        for (int64_t i = 0; i < vocab_size; ++i)
            scores[i] += float(row.preferred[i / 8] >> (7 - i % 8) & 1) * float(delta);
    if (row.ids) penalize(row, scores, vocab_size);
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
    const int64_t vocab_size = batch.vocab_size;
    const float* logits = batch.logits + row.source * batch.stride;
    const float* scores = logits;
    float* line = batch.lines + row.line * vocab_size;
    if (row.num_edits || row.preferred || row.ids) {
        std::memcpy(line, logits, vocab_size * sizeof(float));
        adjust(row, line, vocab_size, batch.delta);
        scores = line;
    }
    const double least = std::numeric_limits<float>::min();
    shift(scores, line, vocab_size,
          row.temperature > 0 ? float(std::max(row.temperature, least)) : 1.0f);
    if (row.raw_line >= 0) shift(logits, batch.lines + row.raw_line * vocab_size, vocab_size, 1.0f);
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

// ---- what may be drawn ----

constexpr float one = 0x1p62f;

inline int64_t to_fixed(float prob) { return int64_t(prob * one); }

// Tokens in id order; `ids` is unused while they are the whole vocabulary.
struct Tokens {
    std::vector<int32_t> ids;
    std::vector<float> kept;
    const float* probs;
    int64_t size;
    bool is_all;

    void start(const float* all, int64_t vocab_size) {
        probs = all, size = vocab_size, is_all = true;
        ids.resize(vocab_size);
        kept.resize(vocab_size);
    }
    int64_t total() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += to_fixed(probs[i]);
        return sum;
    }
    // Keeps what is at least `bound` and at most `most`, of the whole vocabulary.
    void take(const float* all, int64_t vocab_size, float bound,
              float most = std::numeric_limits<float>::infinity()) {
        int64_t left = 0;
        parts_from(all, vocab_size, bound, [&](int64_t first, int64_t last) {
            // Without a branch: where many are kept, nobody can tell which.
            for (int64_t id = first; id < last; ++id) {
                ids[left] = int32_t(id);
                kept[left] = all[id];
                left += (all[id] >= bound) & (all[id] <= most);
            }
        });
        size = left, is_all = false, probs = kept.data();
    }
    template <class Keeps>
    void filter(const Keeps& keeps) {
        int64_t left = 0;
        for (int64_t i = 0; i < size; ++i) {
            const bool stays = keeps(i);
            ids[left] = is_all ? int32_t(i) : ids[i];
            kept[left] = probs[i];
            left += stays;
        }
        size = left, is_all = false, probs = kept.data();
    }
};

// The bits of a number that is not negative: they are ordered as the numbers are.
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

struct LikeliestFirst {
    static uint32_t key(float value) { return ~bits_of(value); }
    static bool before(float a, float b) { return a > b; }
};
struct NearestFirst {
    static uint32_t key(double value) { return bits_of(float(value)); }
    static bool before(double a, double b) { return a < b; }
};

constexpr uint32_t num_bins = 2048;

// The bin, by 11 bits of the keys, in which the sum of masses reaches `wanted`, which is what is left
// of it then.
template <class Key, class Mass>
uint32_t bin_reached(int64_t n, int shift, int64_t& wanted, const Key& key, const Mass& mass) {
    // Two of each, in turns: a sum need not wait for the one before it.
    int64_t sums[2 * num_bins] = {};
    for (int64_t i = 0; i < n; ++i) sums[2 * (key(i) >> shift & (num_bins - 1)) + i % 2] += mass(i);
    for (uint32_t bin = 0;; ++bin) {
        const int64_t sum = sums[2 * bin] + sums[2 * bin + 1];
        if (sum >= wanted) return bin;
        wanted -= sum;
    }
}

template <class Value>
struct Item {
    Value value;
    int64_t mass;
};

// The value at which the masses, summed up in the order of values, reach `wanted`.
template <class Order, class Value, class Mass>
Value reach(const Value* values, int64_t n, int64_t wanted, const Mass& mass) {
    thread_local std::vector<Item<Value>> items;
    if (int64_t(items.size()) < n) items.resize(n);
    const auto key = [&](int64_t i) { return Order::key(values[i]); };
    const uint32_t bin = bin_reached(n, 20, wanted, key, mass);
    int64_t first = 0, last = 0;
    for (int64_t i = 0; i < n; ++i) {
        items[last] = {values[i], mass(i)};
        last += (key(i) >> 20 & (num_bins - 1)) == bin;
    }
    if (last > 64) {
        const auto key = [&](int64_t i) { return Order::key(items[i].value); };
        const auto mass = [&](int64_t i) { return items[i].mass; };
        const uint32_t bin = bin_reached(last, 9, wanted, key, mass);
        const int64_t num = last;
        last = 0;
        for (int64_t i = 0; i < num; ++i) {
            const bool stays = (key(i) >> 9 & (num_bins - 1)) == bin;
            items[last] = items[i];
            last += stays;
        }
    }
    while (last - first > 1) {
        const int64_t middle = (first + last) / 2;
        std::nth_element(items.begin() + first, items.begin() + middle, items.begin() + last,
                         [](const auto& a, const auto& b) { return Order::before(a.value, b.value); });
        int64_t sum = 0;
        for (int64_t i = first; i < middle; ++i) sum += items[i].mass;
        if (sum >= wanted) {
            last = middle;
        } else {
            wanted -= sum;
            first = middle;
        }
    }
    return items[first].value;
}

inline int64_t share_of(double share, int64_t total) {
    return std::clamp(int64_t(std::ceil(share * double(total))), int64_t(1), total);
}

// Takes the likeliest tokens of a whole vocabulary, where these are enough.
template <class Enough>
void narrow(Tokens& tokens, const Enough& enough) {
    if (!tokens.is_all) return;
    const float* all = tokens.probs;
    const int64_t vocab_size = tokens.size;
    const float top = largest(all, vocab_size);
    for (const float share : {0x1p-7f, 0x1p-14f}) {
        tokens.take(all, vocab_size, top * share);
        if (enough()) return;
    }
    tokens.start(all, vocab_size);
}

void keep_top_k(Tokens& tokens, int64_t k) {
    narrow(tokens, [&] { return tokens.size >= k; });
    const float least =
        reach<LikeliestFirst>(tokens.probs, tokens.size, k, [](int64_t) { return int64_t(1); });
    tokens.filter([&](int64_t i) { return tokens.probs[i] >= least; });
}

void keep_top_p(Tokens& tokens, double top_p) {
    const int64_t wanted = share_of(top_p, tokens.total());
    narrow(tokens, [&] { return tokens.total() >= wanted; });
    const auto mass = [&](int64_t i) { return to_fixed(tokens.probs[i]); };
    const float least = reach<LikeliestFirst>(tokens.probs, tokens.size, wanted, mass);
    int64_t above = 0;
    for (int64_t i = 0; i < tokens.size; ++i) above += tokens.probs[i] > least ? mass(i) : 0;
    // Of several tokens as likely as the last one, the lowest ids fill what is left.
    const int64_t each = to_fixed(least);
    int64_t num_ties = (wanted - above + each - 1) / each, last_tie = -1;
    while (num_ties-- > 0)
        while (tokens.probs[++last_tie] != least) {
        }
    tokens.filter([&](int64_t i) {
        return (tokens.probs[i] > least) | ((tokens.probs[i] == least) & (i <= last_tie));
    });
}

// The natural logarithm, to its last digits: a loop of it becomes one over vectors. With x = 2^n * m,
// m next to 1, and s = (m - 1) / (m + 1): log m = 2 (s + s^3 / 3 + s^5 / 5 + ...).
inline double log_of(double x) {
    int64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // Half of what is above the square root of 2.
    const int64_t n = (bits - 0x3FE6A09E667F3BCD) >> 52;
    bits -= n << 52;
    double m;
    std::memcpy(&m, &bits, sizeof m);
    const double s = (m - 1) / (m + 1), z = s * s;
    double series = 1.0 / 23;
    for (int odd = 21; odd > 0; odd -= 2) series = series * z + 1.0 / odd;
    return double(n) * 0.6931471805599453 + 2 * s * series;
}

// The distance of each token's surprisal from the entropy.
void find_distances(const Tokens& tokens, double whole, double entropy,
                    std::vector<double>& distances) {
    distances.resize(tokens.size);
    for (int64_t i = 0; i < tokens.size; ++i)
        distances[i] = std::fabs(log_of(double(tokens.probs[i]) / whole) + entropy);
}

void keep_typical(Tokens& tokens, double typical_p) {
    const int64_t total = tokens.total(), wanted = share_of(typical_p, total);
    const double whole = double(total) / one;
    int64_t terms = 0;
    for (int64_t i = 0; i < tokens.size; ++i) {
        // What is not above 0 as a whole number is none here either.
        const double share = double(tokens.probs[i]) / whole;
        terms -= int64_t(share * log_of(share) * 0x1p48);
    }
    const double entropy = double(terms) / 0x1p48;
    const auto mass = [&](int64_t i) { return to_fixed(tokens.probs[i]); };
    thread_local std::vector<double> distances;
    bool is_narrow = !tokens.is_all;
    const float* all = tokens.probs;
    const int64_t vocab_size = tokens.size;
    for (const double distance : {2.0, 5.0}) {
        if (is_narrow) break;
        // A little more than what is so near, of which the sum below is exact.
        const double near = whole * std::exp(-entropy);
        tokens.take(all, vocab_size, float(near * std::exp(-distance) * 0.9999),
                    float(near * std::exp(distance) * 1.0001));
        find_distances(tokens, whole, entropy, distances);
        int64_t sum = 0;
        for (int64_t i = 0; i < tokens.size; ++i) sum += distances[i] <= distance ? mass(i) : 0;
        is_narrow = sum >= wanted;
        if (!is_narrow) tokens.start(all, vocab_size);
    }
    tokens.filter([&](int64_t i) { return mass(i) > 0; });
    find_distances(tokens, whole, entropy, distances);
    const double most = reach<NearestFirst>(distances.data(), tokens.size, wanted, mass);
    tokens.filter([&](int64_t i) { return distances[i] <= most; });
}

void keep_min_p(Tokens& tokens, double min_p) {
    const double least = std::min(1.0, min_p) * double(largest(tokens.probs, tokens.size));
    tokens.filter([&](int64_t i) { return double(tokens.probs[i]) >= least; });
}

void warp(const Row& row, Tokens& tokens, int64_t vocab_size) {
    if (row.top_k > 0 && row.top_k < vocab_size) keep_top_k(tokens, row.top_k);
    if (row.top_p < 1.0) keep_top_p(tokens, row.top_p);
    if (row.typical_p > 0.0 && row.typical_p < 1.0) keep_typical(tokens, row.typical_p);
    if (row.min_p > 0.0) keep_min_p(tokens, row.min_p);
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

void finish(const Batch& batch, int64_t at) {
    const Row& row = batch.rows[at];
    const int64_t vocab_size = batch.vocab_size;
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
