// The experts of a mixture on a CPU, summed in float32. Loaded by pairs.py.
//
// Each token goes to k experts; a token at an expert is a pair. Pairs lie expert by expert, those of
// an expert in the order of their tokens. The matrices of experts are read where they lie, once for
// up to block_bytes of inputs.
//
// What a pair gets depends neither on the pairs beside it nor on threads: each sum runs through its
// products in one order.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numbers/dots.h"
#include "told.h"

// What Python hands over: all fields have eight bytes.
struct PairsCall {
    const int64_t* chosen;  // tokens x k
    int64_t num_tokens;
    int64_t k;
    int64_t num_experts;
    int64_t* ends;     // where the pairs of each expert end
    int64_t* tokens;   // of each pair
    int64_t* experts;  // of each pair
    int64_t* places;   // tokens x k: which pair it is
    void (*then)(const PairsMade*);  // told when they are there; null: nobody
    const int64_t* slots;            // of tokens, for `then`
    const void* own;
};

// y[i] = W[expert of i] . x[token of i]
struct ProductCall {
    const float* x;
    int64_t x_stride;
    const int64_t* tokens;  // null: row i is pair i's
    const void* weight;     // experts x out x in, or experts x in x out
    int64_t type;           // of the weight
    int64_t is_in_first;
    float* y;           // pairs x out
    const int64_t* ends;
    int64_t num_experts;
    int64_t num_in;
    int64_t num_out;
    int64_t num_threads;
    void (*then)(const ProductMade*);  // what all threads do beside it; null: nothing
    const void* own;
};

// out[t] = sum over j of weights[t, j] * y[places[t, j]]
struct CombineCall {
    const float* y;
    const int64_t* places;
    const float* weights;  // tokens x k
    float* out;
    int64_t num_tokens;
    int64_t k;
    int64_t width;
    int64_t num_threads;
};

namespace {

// Inputs of an expert that are computed together: they stay in the second cache.
constexpr int64_t block_bytes = 1 << 19, most_rows = 64;
// What a thread takes at a time of a matrix.
constexpr int64_t piece_bytes = 1 << 17;
// Outputs that are computed at once, and registers of them where inputs come first.
constexpr int outs_at_once = 4, vectors_at_once = 8;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 65536;

// Some rows of one expert, whose matrix has numbers of a type.
template <class E>
class Rows {
   public:
    Rows(const ProductCall& call, const E* weights, int64_t expert, int64_t first, int64_t count)
        : call(call), count(count), weight(weights + expert * call.num_in * call.num_out) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = call.tokens ? call.tokens[first + i] : first + i;
            x[i] = call.x + row * call.x_stride;
            y[i] = call.y + (first + i) * call.num_out;
        }
    }

    // Outputs [first, last).
    void compute(int64_t first, int64_t last) const {
        if (call.is_in_first)
            compute_columns(first, last);
        else
            compute_dots(first, last);
    }

   private:
    void compute_dots(int64_t first, int64_t last) const {
        int64_t out = first;
        for (; out + outs_at_once <= last; out += outs_at_once) compute_outs<outs_at_once>(out);
        for (; out < last; ++out) compute_outs<1>(out);
    }

    template <int OUTS>
    void compute_outs(int64_t out) const {
        const E* from = weight + out * call.num_in;
        float* to[most_rows];
        for (int64_t i = 0; i < count; ++i) to[i] = y[i] + out;
        for (int64_t row = 0; row < count; row += 4) {
            const int64_t lead = row ? 0 : OUTS * call.num_in;
            with_few(count - row, [&](auto rows) {
                dots<E, OUTS, rows()>(from, call.num_in, lead, 1.0f, x + row, to + row);
            });
        }
    }

    void compute_columns(int64_t first, int64_t last) const {
        constexpr int64_t step = vectors_at_once * num_lanes;
        int64_t out = first;
        for (; out + step <= last; out += step) compute_vectors<vectors_at_once>(out);
        for (; out + num_lanes <= last; out += num_lanes) compute_vectors<1>(out);
        if (out < last) compute_rest(out, last - out);
    }

    template <int VECTORS>
    void compute_vectors(int64_t out) const {
        for (int64_t row = 0; row < count; row += 2) {
            if (row + 2 <= count)
                compute_tile<VECTORS, 2>(row, out);
            else
                compute_tile<VECTORS, 1>(row, out);
        }
    }

    template <int VECTORS, int ROWS>
    void compute_tile(int64_t row, int64_t out) const {
        Lanes sums[ROWS][VECTORS] = {};
        const E* from = weight + out;
        const int64_t lead = columns_lead * call.num_out;
        for (int64_t k = 0; k < call.num_in; ++k, from += call.num_out) {
            for (int64_t at = 0; row == 0 && at < VECTORS * num_lanes; at += line_size<E>)
                __builtin_prefetch(from + lead + at);
            for (int v = 0; v < VECTORS; ++v) {
                const Lanes values = load(from + v * num_lanes);
                for (int i = 0; i < ROWS; ++i) sums[i][v] += values * x[row + i][k];
            }
        }
        for (int i = 0; i < ROWS; ++i)
            for (int v = 0; v < VECTORS; ++v)
                lanes_at(y[row + i] + out + v * num_lanes) = sums[i][v];
    }

    void compute_rest(int64_t out, int64_t size) const {
        for (int64_t row = 0; row < count; ++row) {
            Lanes sum = {};
            for (int64_t k = 0; k < call.num_in; ++k)
                sum += load_some(weight + k * call.num_out + out, size) * x[row][k];
            std::memcpy(y[row] + out, &sum, size * sizeof(float));
        }
    }

    // How many inputs ahead a matrix is asked for whose inputs come first.
    static constexpr int64_t columns_lead = 16;

    const ProductCall& call;
    const int64_t count;
    const E* const weight;
    const float* x[most_rows];
    float* y[most_rows];
};

// How a product is shared: each expert that has rows in blocks of rows, each in pieces of outputs.
template <class E>
class Shares {
   public:
    Shares(const ProductCall& call, const E* weights)
        : call(call), weights(weights),
          rows(std::clamp<int64_t>(block_bytes / 4 / std::max<int64_t>(1, call.num_in), 4, most_rows)),
          outs(std::max(fitting_outs(call), unit(call))),
          pieces((call.num_out + outs - 1) / outs) {}

    // Called by all threads of a team.
    void run() const {
        int64_t first = 0;
        for (int64_t expert = 0; expert < call.num_experts; ++expert) {
            for (; first < call.ends[expert]; first += rows) {
                const Rows<E> some(call, weights, expert, first, std::min(rows, call.ends[expert] - first));
#pragma omp for schedule(dynamic, 1) nowait
                for (int64_t piece = 0; piece < pieces; ++piece)
                    some.compute(piece * outs, std::min(call.num_out, (piece + 1) * outs));
            }
            first = call.ends[expert];
        }
    }

   private:
    // Outputs that a thread computes at once.
    static int64_t unit(const ProductCall& call) {
        return call.is_in_first ? vectors_at_once * num_lanes : outs_at_once;
    }

    static int64_t fitting_outs(const ProductCall& call) {
        const int64_t of_out = std::max<int64_t>(1, call.num_in) * int64_t{sizeof(E)};
        return piece_bytes / of_out / unit(call) * unit(call);
    }

    const ProductCall& call;
    const E* const weights;
    const int64_t rows, outs, pieces;
};

}  // namespace

extern "C" void lorax_experts_pairs(const PairsCall* call) {
    const int64_t num_pairs = call->num_tokens * call->k;
    std::fill(call->ends, call->ends + call->num_experts, 0);
    for (int64_t i = 0; i < num_pairs; ++i) ++call->ends[call->chosen[i]];
    int64_t begin = 0;
    for (int64_t expert = 0; expert < call->num_experts; ++expert) {
        const int64_t count = call->ends[expert];
        call->ends[expert] = begin;
        begin += count;
    }
    // Each begin becomes the end.
    for (int64_t i = 0; i < num_pairs; ++i) {
        const int64_t pair = call->ends[call->chosen[i]]++;
        call->tokens[pair] = i / call->k;
        call->experts[pair] = call->chosen[i];
        call->places[i] = pair;
    }
    if (call->then) {
        const PairsMade made{call->tokens, call->experts, num_pairs, call->slots, call->own};
        call->then(&made);
    }
}

extern "C" void lorax_experts_product(const ProductCall* call) {
    const int64_t num_pairs = call->num_experts ? call->ends[call->num_experts - 1] : 0;
    const bool is_little = num_pairs * call->num_in * call->num_out < too_little;
    with_type(call->type, call->weight, [&](auto* weights) {
        const Shares shares(*call, weights);
        const ProductMade made{call->x, call->x_stride, call->tokens,
                               call->y, call->num_out,  call->own};
#pragma omp parallel num_threads(is_little ? 1 : call->num_threads)
        {
            shares.run();
            if (call->then) call->then(&made);
        }
    });
}

extern "C" void lorax_experts_combine(const CombineCall* call) {
    const bool is_little = call->num_tokens * call->k * call->width < too_little;
#pragma omp parallel for schedule(static) num_threads(is_little ? 1 : call->num_threads)
    for (int64_t token = 0; token < call->num_tokens; ++token) {
        float* out = call->out + token * call->width;
        std::fill(out, out + call->width, 0.0f);
        for (int64_t j = token * call->k; j < (token + 1) * call->k; ++j) {
            const float* y = call->y + call->places[j] * call->width;
            const float weight = call->weights[j];
            for (int64_t i = 0; i < call->width; ++i) out[i] += weight * y[i];
        }
    }
}
