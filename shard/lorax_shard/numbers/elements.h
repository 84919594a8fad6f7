// Numbers of several types, read into registers of float32.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// One register; vectors may lie anywhere.
#if defined(__AVX512F__)
constexpr int num_lanes = 16, rows_at_once = 4;
#else
constexpr int num_lanes = 8, rows_at_once = 2;
#endif
typedef float Lanes __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * num_lanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * num_lanes), aligned(2), may_alias));

inline const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

// Lane i plus lane i + n/2, and so on by halves, down to four.
inline Quad fold(const Lanes& lanes) {
    const Quad* quads = reinterpret_cast<const Quad*>(&lanes);
    if constexpr (num_lanes == 16)
        return (quads[0] + quads[2]) + (quads[1] + quads[3]);
    else
        return quads[0] + quads[1];
}

// The sums of all lanes, of COUNT registers: the same whatever their number.
template <int COUNT>
inline void sum_lanes(const Lanes* lanes, float* sums) {
    for (int i = 0; i < COUNT; ++i) {
        const Quad quad = fold(lanes[i]);
        sums[i] = (quad[0] + quad[2]) + (quad[1] + quad[3]);
    }
}

#if defined(__clang__) || __GNUC__ >= 12
template <>
inline void sum_lanes<4>(const Lanes* lanes, float* sums) {
    const Quad a = fold(lanes[0]), b = fold(lanes[1]), c = fold(lanes[2]), d = fold(lanes[3]);
    const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    *reinterpret_cast<Quad*>(sums) =
        __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
#endif

// The types in which matrices are kept, as tables number them.
enum Type : int64_t { is_float32 = 0, is_bfloat16 = 1, is_float16 = 2 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline Lanes load(const float* at) { return lanes_at(at); }

#if defined(__AVX512F__)
// One instruction each, of which GCC 12 makes five where it is left to itself.
inline Lanes load(const BFloat16* at) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
#else
inline Lanes load(const BFloat16* at) {
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words) << 16;
    return reinterpret_cast<const Lanes&>(words);
}
#endif

#if defined(__AVX512F__)
inline Lanes load(const Float16* at) {
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}
#elif defined(__F16C__) && defined(__AVX__)
inline Lanes load(const Float16* at) {
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}
#else
// Widened by a product: 2^112 takes one bias of the exponent to the other, exactly, and subnormal
// numbers with it; only infinities and what is no number need the exponent that they have.
inline Lanes load(const Float16* at) {
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(at), Words);
    const Words magnitude = (words & 0x7fff) << 13;
    const Lanes scaled = reinterpret_cast<const Lanes&>(magnitude) * 0x1p112f;
    const Words special = (Words)((words & 0x7c00) == 0x7c00) & 0x7f800000;
    const Words result = (Words)scaled | special | ((words & 0x8000) << 16);
    return (Lanes)result;
}
#endif

// The first `count` numbers, fewer than a register holds; the others are zero.
template <class E>
inline Lanes load_some(const E* at, int64_t count) {
    E values[num_lanes] = {};
    std::memcpy(values, at, count * sizeof(E));
    return load(values);
}

// Calls `use` with the address of numbers of a type.
template <class Use>
inline void with_type(int64_t type, const void* at, Use use) {
    if (type == is_bfloat16)
        use(static_cast<const BFloat16*>(at));
    else if (type == is_float16)
        use(static_cast<const Float16*>(at));
    else
        use(static_cast<const float*>(at));
}

}  // namespace
