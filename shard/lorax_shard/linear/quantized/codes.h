// The formats of a quantized weight's codes, as float32 and as they lie in memory.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "../lanes.h"

namespace {

typedef int32_t Ints __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef int8_t Bytes __attribute__((vector_size(num_lanes), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * num_lanes), aligned(2), may_alias));

inline const Lanes& lanes_at(const void* at) { return *reinterpret_cast<const Lanes*>(at); }
inline const Words& words_at(const void* at) { return *reinterpret_cast<const Words*>(at); }
inline const Bytes& bytes_at(const void* at) { return *reinterpret_cast<const Bytes*>(at); }
inline const Halves& halves_at(const void* at) { return *reinterpret_cast<const Halves*>(at); }

// The most inputs of a block: a panel's block in floats and a tile's inputs fit into the first
// cache.
constexpr int64_t most_depth = 128;

// Four bytes hold eight codes of four bits.
constexpr int codes_a_word = 8;

// 16-bit floats as float32: exactly.
inline Lanes widen_halves(const uint8_t* at) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at));
#elif defined(__F16C__) && defined(__AVX__)
    return (Lanes)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at));
#elif defined(__aarch64__)
    typedef __fp16 Narrow __attribute__((vector_size(8), aligned(2), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Narrow*>(at), Lanes);
#else
    const Words half = __builtin_convertvector(halves_at(at), Words);
    // Exponents are put right by a product, which is exact and normalises what is not normal.
    const Words magnitude = (half & 0x7fff) << 13;
    const Words sign = (half & 0x8000) << 16;
    return (Lanes)((Words)((Lanes)magnitude * 0x1p112f) | sign);
#endif
}

struct Half {
    static constexpr int bytes = 2;
    static Lanes load(const uint8_t* at) { return widen_halves(at); }
};

struct Full {
    static constexpr int bytes = 4;
    static Lanes load(const uint8_t* at) { return lanes_at(at); }
};

// Floats, as a block lies that was made ready in the first cache.
struct Plain {
    static constexpr int group = 1, step = 1, bytes = 4 * columns;
    const uint8_t* at;
    explicit Plain(const uint8_t* at) : at(at) {}
    void load(int) {}
    Lanes read(int, int half) const { return lanes_at(at + 4 * num_lanes * half); }
};

// The upper half of each float32.
struct Bfloat {
    static constexpr int group = 1, step = 1, bytes = 2 * columns;
    const uint8_t* at;
    explicit Bfloat(const uint8_t* at) : at(at) {}
    void load(int) {}
    Lanes read(int, int half) const {
        const Halves narrow = halves_at(at + 2 * num_lanes * half);
        return (Lanes)(__builtin_convertvector(narrow, Words) << 16);
    }
};

inline Lanes widen_bytes(const uint8_t* at) {
    // Compilers take vectors of bytes apart for this, unless they are told the instruction.
#if defined(__AVX512F__)
    const Ints whole = (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at));
#elif defined(__AVX2__)
    const Ints whole = (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
    const Ints whole = __builtin_convertvector(bytes_at(at), Ints);
#endif
    return __builtin_convertvector(whole, Lanes);
}

// Whole numbers of eight bits; what they are multiplied by stands for all inputs, and comes last.
struct ChannelBytes {
    static constexpr int group = 1, step = 1, bytes = columns;
    const uint8_t* at;
    explicit ChannelBytes(const uint8_t* at) : at(at) {}
    void load(int) {}
    Lanes read(int, int half) const { return widen_bytes(at + num_lanes * half); }
};

// What the inputs of a group share: code x scale + offset.
template <class Number, bool HAS_OFFSET>
struct Shared {
    static constexpr bool has_offset = HAS_OFFSET;
    static constexpr int bytes = (HAS_OFFSET ? 2 : 1) * Number::bytes * columns;
    Lanes scales[2], offsets[2];
    explicit Shared(const uint8_t* at) {
        for (int half = 0; half < 2; ++half) {
            scales[half] = Number::load(at + half * num_lanes * Number::bytes);
            if (HAS_OFFSET)
                offsets[half] = Number::load(at + (2 + half) * num_lanes * Number::bytes);
        }
    }
    Lanes apply(Lanes code, int half) const {
        return HAS_OFFSET ? code * scales[half] + offsets[half] : code * scales[half];
    }
};

// Eight bits a code, with a sign.
template <class Number, int GROUP, bool HAS_OFFSET>
struct GroupedBytes {
    typedef Shared<Number, HAS_OFFSET> Same;
    static constexpr int group = GROUP, step = 1, bytes = Same::bytes + GROUP * columns;
    const uint8_t *codes, *at;
    Same same;
    explicit GroupedBytes(const uint8_t* at) : codes(at + Same::bytes), same(at) {}
    void load(int part) { at = codes + part * columns; }
    Lanes read(int, int half) const {
        return same.apply(widen_bytes(at + num_lanes * half), half);
    }
};

// Four bits a code; without an offset they stand for -8 to 7, with one for 0 to 15.
template <class Number, int GROUP, bool HAS_OFFSET>
struct GroupedNibbles {
    typedef Shared<Number, HAS_OFFSET> Same;
    static constexpr int group = GROUP, step = codes_a_word,
                         bytes = Same::bytes + GROUP * columns / 2;
    const uint8_t* codes;
    Words words[2];
    Same same;
    explicit GroupedNibbles(const uint8_t* at) : codes(at + Same::bytes), same(at) {}
    void load(int part) {
        for (int half = 0; half < 2; ++half)
            words[half] = words_at(codes + (part * 2 + half) * 4 * num_lanes);
    }
    Lanes read(int index, int half) const {
        constexpr int lowest = HAS_OFFSET ? 0 : -8;
        const Words shifted = words[half] >> (4 * index);
#if defined(__AVX512F__)
        // Of an index into a table of sixteen only four bits count.
        const __m512 table = _mm512_setr_ps(
            lowest, lowest + 1, lowest + 2, lowest + 3, lowest + 4, lowest + 5, lowest + 6,
            lowest + 7, lowest + 8, lowest + 9, lowest + 10, lowest + 11, lowest + 12,
            lowest + 13, lowest + 14, lowest + 15);
        return same.apply((Lanes)_mm512_permutexvar_ps((__m512i)shifted, table), half);
#else
        const Ints code = (Ints)(shifted & 15) + lowest;
        return same.apply(__builtin_convertvector(code, Lanes), half);
#endif
    }
};

}  // namespace

// What Python hands over: all fields have eight bytes.
struct QuantizedCall {
    const float* x;
    int64_t x_stride;
    const uint8_t* weight;
    const float* scale;  // of each column, padded to whole panels; null where groups have theirs
    const float* bias;   // padded likewise; null without one
    float* y;
    int64_t y_stride;
    int64_t num_rows;
    int64_t num_in;
    int64_t num_out;
    int64_t format;
    int64_t num_threads;
};
