// Vectors of float32, and what attention computes with them: exp, sums over lanes, transposition.
//
// All of it rounds the same way wherever it is inlined: nothing here is an a * b + c * d, of which
// a compiler may fuse either product.

#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
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

// exp(x) for x <= 0, to about 1e-7 of it; 1 for 0, and 0 for what is below -87.
inline Lanes exp_negative(Lanes x) {
    const Lanes low = Lanes{} - 87.0f;
    const Lanes clamped = x < low ? low : x;  // NaN stays what it is
    // The nearest whole number: what is added leaves no bits behind the point.
    const Lanes whole = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    // Less whole times ln 2, in two parts, of which the first is short.
    const Lanes f = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Lanes series = f * (1.0f / 5040.0f) + 1.0f / 720.0f;
    series = series * f + 1.0f / 120.0f;
    series = series * f + 1.0f / 24.0f;
    series = series * f + 1.0f / 6.0f;
    series = series * f + 0.5f;
    series = series * f + 1.0f;
    series = series * f + 1.0f;
    const IntLanes power = (__builtin_convertvector(whole, IntLanes) + 127) << 23;
    return x < low ? Lanes{} : series * reinterpret_cast<const Lanes&>(power);
}

inline float exp_negative(float x) { return exp_negative(Lanes{} + x)[0]; }

// softcap * tanh(x / softcap), to about 1e-7 of the softcap.
inline Lanes cap(Lanes x, float softcap) {
    const Lanes size = x < 0.0f ? -x : x;
    const Lanes e = exp_negative(size * (-2.0f / softcap));
    const Lanes capped = softcap * (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -capped : capped;
}

// Exchanges the lanes of a that have bit STEP in their number with those of b that have not.
template <int STEP, int... I>
inline void exchange(Lanes& a, Lanes& b, std::integer_sequence<int, I...>) {
    const Lanes first =
        pick(a, b, std::integer_sequence<int, (I & STEP ? num_lanes + I - STEP : I)...>{});
    b = pick(a, b, std::integer_sequence<int, (I & STEP ? num_lanes + I : I + STEP)...>{});
    a = first;
}

template <int STEP>
inline void exchange_all(Lanes (&rows)[num_lanes]) {
#pragma GCC unroll 16
    for (int i = 0; i < num_lanes; ++i)
        if (!(i & STEP)) exchange<STEP>(rows[i], rows[i | STEP], Numbers{});
}

inline void transpose(Lanes (&rows)[num_lanes]) {
    exchange_all<1>(rows);
    exchange_all<2>(rows);
    if constexpr (num_lanes > 4) exchange_all<4>(rows);
    if constexpr (num_lanes > 8) exchange_all<8>(rows);
}
