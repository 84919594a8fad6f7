// Vectors of float32, and what attention computes with them: powers of two, sums over lanes,
// transposition.
//
// All of it rounds the same way wherever it is inlined: nothing here is an a * b + c * d, of which
// a compiler may fuse either product.

#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>

constexpr int num_lanes = 16;
#elif defined(__AVX__)
constexpr int num_lanes = 8;
#else
constexpr int num_lanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef int32_t IntLanes __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));

inline const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }

// Lanes of a and b by number; those of b follow those of a.
template <int... I>
inline Lanes pick(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, IntLanes{I...});
#endif
}

using Numbers = std::make_integer_sequence<int, num_lanes>;

template <int STEP, int... I>
inline Lanes rotated(Lanes x, std::integer_sequence<int, I...>) {
    return pick(x, x, std::integer_sequence<int, (I + STEP) % num_lanes...>{});
}

inline float sum_lanes(Lanes x) {
    if constexpr (num_lanes > 8) x += rotated<8>(x, Numbers{});
    if constexpr (num_lanes > 4) x += rotated<4>(x, Numbers{});
    x += rotated<2>(x, Numbers{});
    x += rotated<1>(x, Numbers{});
    return x[0];
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline float largest_lane(Lanes x) {
    if constexpr (num_lanes > 8) x = larger(x, rotated<8>(x, Numbers{}));
    if constexpr (num_lanes > 4) x = larger(x, rotated<4>(x, Numbers{}));
    x = larger(x, rotated<2>(x, Numbers{}));
    return larger(x, rotated<1>(x, Numbers{}))[0];
}

// Scores are counted in units of ln 2, so that their weights are powers of two.
constexpr float score_units = 1.44269504f;

// 2^x for x <= 0, to about 1e-7 of it; 1 for 0, and 0 for what is below -126.
inline Lanes power_of_two(Lanes x) {
    // The nearest whole number: what is added leaves no bits behind the point.
    const Lanes whole = (x + 12582912.0f) - 12582912.0f;
    const Lanes f = x - whole;
    Lanes series = f * 1.53533620e-4f + 1.33988750e-3f;
    series = series * f + 9.61843692e-3f;
    series = series * f + 5.55033237e-2f;
    series = series * f + 2.40226477e-1f;
    series = series * f + 6.93147182e-1f;
    series = series * f + 1.0f;
#if defined(__AVX512F__)
    // NaN stays what it is.
    const auto counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return (Lanes)_mm512_maskz_scalef_ps(counts, (__m512)series, (__m512)whole);
#else
    const Lanes low = Lanes{} - 126.0f;
    const IntLanes power =
        (__builtin_convertvector(whole < low ? low : whole, IntLanes) + 127) << 23;
    return x < low ? Lanes{} : series * reinterpret_cast<const Lanes&>(power);
#endif
}

inline float power_of_two(float x) { return power_of_two(Lanes{} + x)[0]; }

// softcap * tanh(x / softcap), to about 1e-7 of the softcap.
inline Lanes cap(Lanes x, float softcap) {
    const Lanes size = x < 0.0f ? -x : x;
    const Lanes e = power_of_two(size * (-2.0f * score_units / softcap));
    const Lanes capped = softcap * (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -capped : capped;
}

// Of each four lanes: pairs of a and b, of one lane or of two, from the lower half or the upper.
template <int SIZE, bool UPPER, int... I>
inline Lanes zipped(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
    constexpr int half = UPPER ? 2 : 0;
    if constexpr (SIZE == 1)
        return pick(a, b, std::integer_sequence<int, (I / 4 * 4 + half + I % 4 / 2 +
                                                      I % 2 * num_lanes)...>{});
    else
        return pick(a, b, std::integer_sequence<int, (I / 4 * 4 + half + I % 2 +
                                                      I % 4 / 2 * num_lanes)...>{});
}

// Quarters of four lanes: two of a and then two of b, from FIRST on, STEP apart.
template <int FIRST, int STEP, int... I>
inline Lanes joined(Lanes a, Lanes b, std::integer_sequence<int, I...>) {
    constexpr int half = num_lanes / 2;
    return pick(a, b, std::integer_sequence<int, ((FIRST + I % half / 4 * STEP) * 4 + I % 4 +
                                                  I / half * num_lanes)...>{});
}

// Turns rows into columns: within each four lanes of four rows, and then the fours.
inline void transpose(Lanes (&rows)[num_lanes]) {
    constexpr Numbers all{};
    Lanes fours[num_lanes];
#pragma GCC unroll 4
    for (int i = 0; i < num_lanes; i += 4) {
        const Lanes low = zipped<1, false>(rows[i], rows[i + 1], all);
        const Lanes high = zipped<1, true>(rows[i], rows[i + 1], all);
        const Lanes next_low = zipped<1, false>(rows[i + 2], rows[i + 3], all);
        const Lanes next_high = zipped<1, true>(rows[i + 2], rows[i + 3], all);
        fours[i] = zipped<2, false>(low, next_low, all);
        fours[i + 1] = zipped<2, true>(low, next_low, all);
        fours[i + 2] = zipped<2, false>(high, next_high, all);
        fours[i + 3] = zipped<2, true>(high, next_high, all);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        if constexpr (num_lanes == 4) {
            rows[i] = fours[i];
        } else if constexpr (num_lanes == 8) {
            rows[i] = joined<0, 1>(fours[i], fours[i + 4], all);
            rows[i + 4] = joined<1, 1>(fours[i], fours[i + 4], all);
        } else {
            const Lanes low = joined<0, 1>(fours[i], fours[i + 4], all);
            const Lanes high = joined<2, 1>(fours[i], fours[i + 4], all);
            const Lanes next_low = joined<0, 1>(fours[i + 8], fours[i + 12], all);
            const Lanes next_high = joined<2, 1>(fours[i + 8], fours[i + 12], all);
            rows[i] = joined<0, 2>(low, next_low, all);
            rows[i + 4] = joined<1, 2>(low, next_low, all);
            rows[i + 8] = joined<0, 2>(high, next_high, all);
            rows[i + 12] = joined<1, 2>(high, next_high, all);
        }
    }
}
