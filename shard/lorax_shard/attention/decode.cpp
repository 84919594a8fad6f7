// Paged attention of decode rows on a CPU, float32. Loaded by cpp.py.
//
// One query token a row. K and V are read where they lie in the cache, each block
// once, whatever the number of query heads that share it:
//   score[h][t] = cap(scaling * q[h] . k[t, g])     g = h / (H / G)
//   out[h]      = sum_t softmax(score[h])[t] * v[t, g]
// A layer's sink joins the softmax as one more score without a value.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct Step {
    const float* query;  // rows x H x D with the strides below; D is contiguous
    int64_t query_row_stride, query_head_stride;
    const float* keys;    // blocks x block_size x G x D
    const float* values;  // blocks x block_size x G x E
    float* output;        // rows x H x E
    const int64_t* tables;
    int64_t table_stride;
    const int64_t* lengths;  // KV tokens of each row
    int64_t num_heads, num_kv_heads, key_dim, value_dim, block_size;
    float scaling;
    int64_t window, chunk;  // 0: none
    float softcap;          // 0: none
    const float* sinks;     // H, or null
};

// exp(x) for x <= 0 to about 1e-7 relative: 2^n * 2^f with n whole and |f| <= 1/2.
inline float exp_negative(float x) {
    const float scaled = std::max(x, -87.0f) * 1.44269504f;
    const float whole = std::nearbyint(scaled);
    const float f = (scaled - whole) * 0.69314718f;
    float series = 1.0f / 5040.0f;
    series = series * f + 1.0f / 720.0f;
    series = series * f + 1.0f / 120.0f;
    series = series * f + 1.0f / 24.0f;
    series = series * f + 1.0f / 6.0f;
    series = series * f + 0.5f;
    series = series * f + 1.0f;
    series = series * f + 1.0f;
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return series * power;
}

// softcap * tanh(x / softcap), to about 1e-7 of the softcap.
inline float cap(float x, float softcap) {
    const float e = exp_negative(-2.0f * std::fabs(x) / softcap);
    return std::copysign(softcap * (1.0f - e) / (1.0f + e), x);
}

// Vectors that may lie anywhere; the compiler splits them where registers are narrower.
constexpr int num_lanes = 8;
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef float HalfLanes __attribute__((vector_size(16), aligned(4), may_alias));

inline float sum_lanes(const Lanes& lanes) {
    const HalfLanes* halves = reinterpret_cast<const HalfLanes*>(&lanes);
    const HalfLanes sums = halves[0] + halves[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Asks for cache lines [first, last) of one token, ahead of their use.
inline void prefetch(const float* token, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i += 16) __builtin_prefetch(token + i);
}

// DIM is the length when it is known at compile time, else 0.
template <int DIM>
inline float dot(const float* a, const float* b, int64_t n) {
    if constexpr (DIM > 0) {
        const Lanes* x = reinterpret_cast<const Lanes*>(a);
        const Lanes* y = reinterpret_cast<const Lanes*>(b);
        Lanes even = x[0] * y[0], odd = x[1] * y[1];
        for (int i = 2; i < DIM / num_lanes; i += 2) {
            even += x[i] * y[i];
            odd += x[i + 1] * y[i + 1];
        }
        return sum_lanes(even + odd);
    } else {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
        return sum;
    }
}

// total += sum_t weights[t] * v[t], with the total in registers over the whole block.
template <int DIM>
inline void add_block(float* total, const float* v, int64_t stride, const float* weights,
                      int64_t count, int64_t n) {
    if constexpr (DIM > 0) {
        constexpr int num_vectors = DIM / num_lanes;
        Lanes sums[num_vectors];
        for (int i = 0; i < num_vectors; ++i)
            sums[i] = *reinterpret_cast<const Lanes*>(total + i * num_lanes);
        for (int64_t t = 0; t < count; ++t) {
            const Lanes* lanes = reinterpret_cast<const Lanes*>(v + t * stride);
            for (int i = 0; i < num_vectors; ++i) sums[i] += lanes[i] * weights[t];
        }
        for (int i = 0; i < num_vectors; ++i)
            *reinterpret_cast<Lanes*>(total + i * num_lanes) = sums[i];
    } else {
        for (int64_t t = 0; t < count; ++t) {
#pragma omp simd
            for (int64_t i = 0; i < n; ++i) total[i] += weights[t] * v[t * stride + i];
        }
    }
}

// Turns scores into weights; returns the reciprocal of their sum.
float soften(float* scores, int64_t count, const Step& s, int64_t head) {
    if (s.softcap > 0.0f) {
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) scores[t] = cap(scores[t], s.softcap);
    }
    float most = s.sinks ? s.sinks[head] : -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < count; ++t) most = std::max(most, scores[t]);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < count; ++t) {
        scores[t] = exp_negative(scores[t] - most);
        sum += scores[t];
    }
    if (s.sinks) sum += exp_negative(s.sinks[head] - most);
    return 1.0f / sum;
}

inline const float* token_of(const float* pool, const Step& s, const int64_t* table, int64_t at,
                             int64_t token_size) {
    return pool + (table[at / s.block_size] * s.block_size + at % s.block_size) * token_size;
}

// Computes the query heads of KV heads [first_kv, last_kv) of one row.
template <int DIM>
void attend_row(const Step& s, int64_t row, int64_t first_kv, int64_t last_kv) {
    thread_local std::vector<float> buffer;
    const int64_t length = s.lengths[row];
    int64_t first = s.window > 0 ? std::max<int64_t>(0, length - s.window) : 0;
    if (s.chunk > 0) first = std::max(first, length - 1 - (length - 1) % s.chunk);
    const int64_t count = length - first;
    const int64_t group = s.num_heads / s.num_kv_heads;
    const int64_t first_head = first_kv * group, num_heads = (last_kv - first_kv) * group;
    const int64_t key_token = s.num_kv_heads * s.key_dim;
    const int64_t value_token = s.num_kv_heads * s.value_dim;
    const int64_t* table = s.tables + row * s.table_stride;
    const float* query = s.query + row * s.query_row_stride;
    float* output = s.output + row * s.num_heads * s.value_dim;
    buffer.resize(num_heads * count);
    float* scores = buffer.data();

    for (int64_t at = first; at < length;) {
        const int64_t end = std::min(length, at - at % s.block_size + s.block_size);
        const float* keys = token_of(s.keys, s, table, at, key_token);
        const float* next = token_of(s.keys, s, table, std::min(end, length - 1), key_token);
        for (; at < end; ++at, keys += key_token, next += key_token) {
            prefetch(next, first_kv * s.key_dim, last_kv * s.key_dim);
            for (int64_t h = 0; h < num_heads; ++h) {
                const int64_t head = first_head + h;
                scores[h * count + at - first] =
                    s.scaling * dot<DIM>(query + head * s.query_head_stride,
                                         keys + head / group * s.key_dim, s.key_dim);
            }
        }
    }
    for (int64_t h = 0; h < num_heads; ++h) {
        float* weights = scores + h * count;
        const float norm = soften(weights, count, s, first_head + h);
#pragma omp simd
        for (int64_t t = 0; t < count; ++t) weights[t] *= norm;
        std::fill_n(output + (first_head + h) * s.value_dim, s.value_dim, 0.0f);
    }
    for (int64_t at = first; at < length;) {
        const int64_t end = std::min(length, at - at % s.block_size + s.block_size);
        const float* block = token_of(s.values, s, table, at, value_token);
        const float* next = token_of(s.values, s, table, std::min(end, length - 1), value_token);
        for (int64_t t = 0; t < std::min(length - end, s.block_size); ++t)
            prefetch(next + t * value_token, first_kv * s.value_dim, last_kv * s.value_dim);
        for (int64_t h = 0; h < num_heads; ++h) {
            const int64_t head = first_head + h;
            add_block<DIM>(output + head * s.value_dim, block + head / group * s.value_dim,
                           value_token, scores + h * count + at - first, end - at, s.value_dim);
        }
        at = end;
    }
}

template <int DIM>
void attend(const Step& s, int64_t num_rows, int num_threads) {
    // With few rows the KV heads of a row are work of their own.
    const int64_t parts = num_rows >= 4 * num_threads ? 1 : s.num_kv_heads;
    const int64_t heads = s.num_kv_heads / parts;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (num_threads > 1)
    for (int64_t item = 0; item < num_rows * parts; ++item) {
        const int64_t part = item % parts;
        attend_row<DIM>(s, item / parts, part * heads, (part + 1) * heads);
    }
}

}  // namespace

extern "C" void lorax_decode_attention(
    const float* query, int64_t query_row_stride, int64_t query_head_stride, const float* keys,
    const float* values, float* output, const int64_t* tables, int64_t table_stride,
    const int64_t* lengths, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads,
    int64_t key_dim, int64_t value_dim, int64_t block_size, float scaling, int64_t window,
    int64_t chunk, float softcap, const float* sinks, int num_threads) {
    const Step step{query,     query_row_stride, query_head_stride, keys,       values,
                    output,    tables,           table_stride,      lengths,    num_heads,
                    num_kv_heads, key_dim,       value_dim,         block_size, scaling,
                    window,    chunk,            softcap,           sinks};
    if (key_dim == 64 && value_dim == 64)
        attend<64>(step, num_rows, num_threads);
    else if (key_dim == 128 && value_dim == 128)
        attend<128>(step, num_rows, num_threads);
    else
        attend<0>(step, num_rows, num_threads);
}
