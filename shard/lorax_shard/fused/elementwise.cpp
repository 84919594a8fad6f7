// Elementwise work of a model's layers on a CPU, float32, one pass over memory each. Loaded by
// cpp.py, compiled without contraction: a product and a sum round as they do in the model's own
// code, whether they are computed alone or many at once.
//
//   norm      out = x / sqrt(mean(x^2) + epsilon) * (offset + weight)
//   gated     out = activation(gate) * up
//   activated out = activation(x)
//   layer norm out = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + epsilon) * weight + bias, s = x + delta
//   rotation  (a, b) -> (a cos - b sin, b cos + a sin) for pairs of a head
//
// Each row is computed by one thread in an order that only its width decides.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int num_lanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
// Vectors that may lie anywhere.
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));

// In double precision, where the square of a float is exact.
inline double sum_of_squares(const float* x, int64_t n) {
    Doubles sums = {};
    int64_t i = 0;
    for (; i + num_lanes <= n; i += num_lanes) {
        const Doubles wide =
            __builtin_convertvector(*reinterpret_cast<const Floats*>(x + i), Doubles);
        sums += wide * wide;
    }
    double total =
        ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < n; ++i) total += static_cast<double>(x[i]) * x[i];
    return total;
}

// a * b + c, rounded once where the processor does that at no cost.
inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x <= 0, to about 1e-7 relative; 0 below -87, NaN for NaN.
inline float exp_negative(float x) {
    const float bounded = std::max(x, -87.0f);
    const float whole = std::nearbyint(bounded * 1.44269504f);
    // ln 2 in two parts, the first of few digits, so that whole * it is exact.
    const float f = multiply_add(whole, 2.12194440e-4f, multiply_add(whole, -0.693359375f, bounded));
    float series = multiply_add(1.0f / 5040.0f, f, 1.0f / 720.0f);
    series = multiply_add(series, f, 1.0f / 120.0f);
    series = multiply_add(series, f, 1.0f / 24.0f);
    series = multiply_add(series, f, 1.0f / 6.0f);
    series = multiply_add(series, f, 0.5f);
    series = multiply_add(series * f, f, f) + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : series * power;
}

inline float sigmoid(float x) {
    const float e = exp_negative(-std::fabs(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

struct Silu {
    static float of(float x) { return x * sigmoid(x); }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3): x sigmoid(2 u).
struct GeluTanh {
    static float of(float x) {
        return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    }
};

// x (1 + erf(x / sqrt(2))) / 2. erfc to about 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26), so that
// what is left of large negative numbers is as exact as that of others.
struct Gelu {
    static float of(float x) {
        const float z = std::fabs(x) * 0.707106781f;
        const float t = 1.0f / multiply_add(0.3275911f, z, 1.0f);
        float series = multiply_add(1.061405429f, t, -1.453152027f);
        series = multiply_add(series, t, 1.421413741f);
        series = multiply_add(series, t, -0.284496736f);
        series = multiply_add(series, t, 0.254829592f);
        const float rest = 0.5f * (series * t) * exp_negative(-z * z);
        return x * (x < 0.0f ? rest : 1.0f - rest);
    }
};

// Threads that so many numbers are worth, of those that may be used: fewer are done before a second
// one has begun.
constexpr int64_t numbers_a_thread = 1 << 15;

inline int threads_for(int64_t numbers, int64_t num_threads) {
    return static_cast<int>(
        numbers < 2 * numbers_a_thread ? 1 : std::min(numbers / numbers_a_thread, num_threads));
}

void norm_row(const float* __restrict x, const float* __restrict weight, float* __restrict out,
              int64_t width, double epsilon, float offset) {
    const double mean = sum_of_squares(x, width) / static_cast<double>(width);
    const float scale = static_cast<float>(1.0 / std::sqrt(mean + epsilon));
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] * scale) * (offset + weight[i]);
}

// As wide vectors as there are: all is computation here.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#define LORAX_WIDE __attribute__((target("prefer-vector-width=512")))
#else
#define LORAX_WIDE
#endif

template <typename Function>
LORAX_WIDE void gate_row(const float* __restrict gate, const float* __restrict up,
                         float* __restrict out, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = Function::of(gate[i]) * up[i];
}

template <typename Function>
LORAX_WIDE void activate_row(const float* x, float* out, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = Function::of(x[i]);
}

// Sums of a row, in an order that only its width decides.
template <typename Take>
inline float sum_of_row(int64_t width, const Take& take) {
    constexpr int64_t lanes = 32;
    float sums[lanes] = {};
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes)
#pragma omp simd
        for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += take(i + lane);
    for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    float rest = 0.0f;
    for (; i < width; ++i) rest += take(i);
    return sums[0] + rest;
}

void layer_norm_row(const float* __restrict x, const float* __restrict delta,
                    const float* __restrict weight, const float* __restrict bias,
                    float* __restrict out, int64_t width, float epsilon) {
    if (delta) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = x[i] + delta[i];
    } else {
        std::copy(x, x + width, out);
    }
    const float size = static_cast<float>(width);
    const float mean = sum_of_row(width, [&](int64_t i) { return out[i]; }) / size;
    const float squares = sum_of_row(width, [&](int64_t i) {
        const float apart = out[i] - mean;
        return apart * apart;
    });
    const float scale = 1.0f / std::sqrt(squares / size + epsilon);
    if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i)
            out[i] = (out[i] - mean) * scale * weight[i] + bias[i];
    } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) out[i] = (out[i] - mean) * scale * weight[i];
    }
}

// One head. STEP is how far the pairs lie apart from each other: 2 for neighbours, 1 for halves.
template <int STEP>
void rotate_head(const float* __restrict x, const float* __restrict cos,
                 const float* __restrict sin, float* __restrict out, int64_t dim, int64_t width,
                 bool by_pair) {
    const int64_t half = width / 2, apart = STEP == 2 ? 1 : half;
    const int64_t cos_step = by_pair ? 1 : STEP, cos_apart = by_pair ? 0 : apart;
#pragma omp simd
    for (int64_t p = 0; p < half; ++p) {
        const float a = x[p * STEP], b = x[p * STEP + apart];
        const int64_t first = p * cos_step, second = first + cos_apart;
        out[p * STEP] = a * cos[first] - b * sin[first];
        out[p * STEP + apart] = b * cos[second] + a * sin[second];
    }
    std::copy(x + width, x + dim, out + width);
}

// What a call is told, as cpp.py packs it: eight bytes a field. One argument costs a call from
// Python less than twenty.
struct NormCall {
    const float* x;  // outer x inner rows of `width` numbers, with a stride for each
    int64_t outer, outer_stride, inner, inner_stride;
    const float* weight;
    float* out;  // contiguous
    int64_t width;
    double epsilon, offset;
    int64_t num_threads;
};

struct GatedCall {
    const float* gate;
    int64_t gate_stride;
    const float* up;
    int64_t up_stride;
    float* out;  // contiguous
    int64_t rows, width, activation, num_threads;
};

struct ActivatedCall {
    const float* x;
    int64_t stride;
    float* out;  // may be x
    int64_t out_stride, rows, width, activation, num_threads;
};

struct LayerNormCall {
    const float* x;
    int64_t stride;
    const float* delta;  // null: none
    int64_t delta_stride;
    const float* weight;
    const float* bias;  // null: none
    float* out;         // contiguous
    int64_t rows, width;
    double epsilon;
    int64_t num_threads;
};

// Heads x tokens x dim with strides for the first two; dim is contiguous.
struct Heads {
    const float* data;
    int64_t number, head_stride, token_stride;
    float* out;
    int64_t out_head_stride, out_token_stride;
};

struct RotateCall {
    Heads query, key;
    const float* cos;
    int64_t cos_stride;
    const float* sin;
    int64_t sin_stride;
    int64_t tokens, dim, width, is_adjacent, is_by_pair, num_threads;
};

void rotate_token(const Heads& heads, int64_t token, const RotateCall& call) {
    const float* cos = call.cos + token * call.cos_stride;
    const float* sin = call.sin + token * call.sin_stride;
    const auto rotate = call.is_adjacent ? rotate_head<2> : rotate_head<1>;
    for (int64_t h = 0; h < heads.number; ++h)
        rotate(heads.data + h * heads.head_stride + token * heads.token_stride, cos, sin,
               heads.out + h * heads.out_head_stride + token * heads.out_token_stride, call.dim,
               call.width, call.is_by_pair);
}

}  // namespace

// Each function is exported twice: NAME_team is called by all threads of a team.

extern "C" void lorax_rms_norm_team(const NormCall* packed) {
    const NormCall c = *packed;
    const float offset = static_cast<float>(c.offset);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.outer; ++i)
        for (int64_t j = 0; j < c.inner; ++j)
            norm_row(c.x + i * c.outer_stride + j * c.inner_stride, c.weight,
                     c.out + (i * c.inner + j) * c.width, c.width, c.epsilon, offset);
}

extern "C" void lorax_rms_norm(const NormCall* c) {
    const int threads = threads_for(c->outer * c->inner * c->width, c->num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_rms_norm_team(c);
}

extern "C" void lorax_gated_team(const GatedCall* packed) {
    const GatedCall c = *packed;
    const auto row = c.activation == 0 ? gate_row<Silu> : gate_row<GeluTanh>;
    // With fewer rows than threads a row is shared.
    const int64_t threads = omp_get_num_threads();
    const int64_t parts = c.rows >= 4 * threads ? 1 : std::max<int64_t>(1, std::min(threads, c.width / 512));
#pragma omp for schedule(static)
    for (int64_t item = 0; item < c.rows * parts; ++item) {
        const int64_t i = item / parts, part = item % parts;
        const int64_t first = c.width * part / parts / 64 * 64;
        const int64_t last = part + 1 == parts ? c.width : c.width * (part + 1) / parts / 64 * 64;
        row(c.gate + i * c.gate_stride + first, c.up + i * c.up_stride + first,
            c.out + i * c.width + first, last - first);
    }
}

// For products that gate their own results: rows x width numbers of each, with `stride` from row to
// row of both.
extern "C" void lorax_gate_rows(const float* gate, const float* up, int64_t stride, float* out,
                                int64_t out_stride, int64_t rows, int64_t width,
                                int64_t activation) {
    const auto row = activation == 0 ? gate_row<Silu> : gate_row<GeluTanh>;
    for (int64_t i = 0; i < rows; ++i)
        row(gate + i * stride, up + i * stride, out + i * out_stride, width);
}

extern "C" void lorax_gated(const GatedCall* c) {
    const int threads = threads_for(2 * c->rows * c->width, c->num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_gated_team(c);
}

extern "C" void lorax_activated_team(const ActivatedCall* packed) {
    const ActivatedCall c = *packed;
    const auto row = c.activation == 0 ? activate_row<Gelu> : activate_row<GeluTanh>;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.rows; ++i) row(c.x + i * c.stride, c.out + i * c.out_stride, c.width);
}

extern "C" void lorax_activated(const ActivatedCall* c) {
    const int threads = threads_for(2 * c->rows * c->width, c->num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_activated_team(c);
}

extern "C" void lorax_layer_norm_team(const LayerNormCall* packed) {
    const LayerNormCall c = *packed;
    const float epsilon = static_cast<float>(c.epsilon);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.rows; ++i)
        layer_norm_row(c.x + i * c.stride, c.delta ? c.delta + i * c.delta_stride : nullptr,
                       c.weight, c.bias, c.out + i * c.width, c.width, epsilon);
}

extern "C" void lorax_layer_norm(const LayerNormCall* c) {
    const int threads = threads_for(2 * c->rows * c->width, c->num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_layer_norm_team(c);
}

extern "C" void lorax_rotate_team(const RotateCall* packed) {
    const RotateCall c = *packed;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < c.tokens; ++token) {
        rotate_token(c.query, token, c);
        rotate_token(c.key, token, c);
    }
}

extern "C" void lorax_rotate(const RotateCall* c) {
    const int threads = threads_for(c->tokens * c->query.number * c->dim, c->num_threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    lorax_rotate_team(c);
}
