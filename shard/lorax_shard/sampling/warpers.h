// What top_k, top_p, typical_p and min_p leave of a row's softmax: distribution.py says what that is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "rows.h"

namespace {

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

}  // namespace
