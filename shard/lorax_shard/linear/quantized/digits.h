// Products with a quantized weight by instructions that multiply bytes (AVX-512 VNNI): of codes
// themselves, with inputs as whole numbers of three signed digits.
//
//   x[i] = s (2^16 d2[i] + 2^8 d1[i] + d0[i])        -128 <= d <= 127
//
// s is a power of two, of a row and a block: the largest input of the block keeps 23 bits, as many
// as the rounding of its product would leave. Sums of codes times digits are whole numbers, without
// an error. Three instructions of 64 products each do what takes four of 16 floats.

#pragma once

#include <algorithm>
#include <utility>

#include "floats.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__)
#define LORAX_DIGITS

namespace {

constexpr int num_digits = 3;
// Inputs whose digits one instruction multiplies.
constexpr int64_t quad = 4;

// The codes of four inputs for the columns of half a panel, made numbers without a sign by taking
// off `lowest`; `at` is what follows a group's shared numbers. A run is the inputs of one sum.
struct NotCodes {};
template <class Codes>
struct Quads : NotCodes {};

struct ByteQuads {
    static constexpr int lowest = -128;
    // Whether those of eight inputs are the even ones and the odd ones.
    static constexpr bool by_parity = false;

    static __m512i read(const uint8_t* at, int64_t index, int half) {
        at += index * quad * columns;
        return gather(_mm512_loadu_si512(at), _mm512_loadu_si512(at + 2 * columns), half);
    }

   private:
    // Byte j of lane c is that of input j and column c.
    static __m512i gather(__m512i first, __m512i second, int half) {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i inputs = _mm512_set1_epi32(0x60402000 + half * 0x10101010);
        const __m512i places = _mm512_add_epi32(
            inputs, _mm512_mullo_epi32(lanes, _mm512_set1_epi32(0x01010101)));
        return _mm512_xor_si512(_mm512_permutex2var_epi8(first, places, second),
                                _mm512_set1_epi8(static_cast<char>(0x80)));
    }
};

template <>
struct Quads<ChannelBytes> : ByteQuads {
    static constexpr int64_t run = most_depth, shared_bytes = 0;
};

// Groups of 16 have too many sums for what they multiply.
template <class Number, bool HAS_OFFSET>
struct Quads<GroupedBytes<Number, 32, HAS_OFFSET>> : ByteQuads {
    static constexpr int64_t run = 32, shared_bytes = Shared<Number, HAS_OFFSET>::bytes;
};

template <class Number, int GROUP, bool HAS_OFFSET>
struct Quads<GroupedNibbles<Number, GROUP, HAS_OFFSET>> {
    static constexpr int64_t run = GROUP, shared_bytes = Shared<Number, HAS_OFFSET>::bytes;
    static constexpr int lowest = HAS_OFFSET ? 0 : -8;
    static constexpr bool by_parity = true;

    static __m512i read(const uint8_t* at, int64_t index, int half) {
        const __m512i words = _mm512_loadu_si512(at + (index / 2 * 2 + half) * 4 * num_lanes);
        return _mm512_and_si512(index % 2 ? _mm512_srli_epi32(words, 4) : words,
                                _mm512_set1_epi8(15));
    }
};

constexpr int64_t most_runs = most_depth / 32;

// A block's inputs of some rows as digits.
struct Digits {
    static constexpr int most_tile = 4;

    // Of each four inputs four words: digit 0, 1, 2 of each, and nothing.
    alignas(64) int32_t words[most_rows][input_stride];
    // Of each run what its sums begin with, since codes are taken with too much.
    alignas(64) int32_t starts[most_rows][most_runs][4];
    // Of each run the sum of its inputs, and of all what they are times; both by s.
    float totals[most_rows][most_runs], scales[most_rows];

    void put(int64_t row, const float* x, int64_t size, const Cut& cut) {
        const float factor = find_scale(row, x, size);
        const __m512 factors = _mm512_set1_ps(factor);
        for (int64_t k = 0; k < size; k += cut.run) {
            __m512i sums = _mm512_setzero_si512();
            for (int64_t at = k; at < std::min(k + cut.run, size); at += num_lanes) {
                const __m512i digits =
                    split(_mm512_mul_ps(some(x, at, size), factors), cut.by_parity);
                _mm512_store_si512(words[row] + at, digits);
                sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), digits);
            }
            const __m128i all = total(sums);
            alignas(16) int32_t of[4];
            _mm_store_si128((__m128i*)of, all);
            totals[row][k / cut.run] = static_cast<float>(int64_t{of[2]} * 65536 + of[1] * 256 + of[0]);
            _mm_store_si128((__m128i*)starts[row][k / cut.run],
                            _mm_mullo_epi32(all, _mm_set1_epi32(cut.lowest)));
        }
    }

   private:
    static __m512 some(const float* x, int64_t at, int64_t size) {
        const int64_t left = size - at;
        if (left >= num_lanes) return _mm512_loadu_ps(x + at);
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), x + at);
    }

    // Notes s, and returns what makes whole numbers of inputs. Where one of them is no number, s is
    // none, and a block of numbers below 2^-103 counts as zeros.
    float find_scale(int64_t row, const float* x, int64_t size) {
        __m512i largest = _mm512_setzero_si512();
        for (int64_t at = 0; at < size; at += num_lanes)
            largest = _mm512_max_epi32(
                largest, _mm512_castps_si512(_mm512_abs_ps(some(x, at, size))));
        // The exponent of its next power of two; digits of up to 127 hold a little less than that.
        const int32_t bits = _mm512_reduce_max_epi32(largest);
        const int32_t exponent = static_cast<int32_t>((static_cast<uint32_t>(bits) + (1 << 17)) >> 23);
        if (bits >= 0x7f800000) scales[row] = __builtin_nanf("");
        else scales[row] = exponent < 24 ? 0.0f : power(exponent - 22);
        return exponent < 24 ? 0.0f : power(276 - exponent);
    }

    static float power(int32_t exponent) {
        const int32_t bits = exponent << 23;
        float number;
        std::memcpy(&number, &bits, sizeof number);
        return number;
    }

    // Added and taken off again bit by bit, 128 a digit leaves signed digits.
    static __m512i split(__m512 x, bool by_parity) {
        const __m512i even = _mm512_set1_epi32(0x00808080);
        __m512i digits =
            _mm512_xor_si512(_mm512_add_epi32(_mm512_cvtps_epi32(x), even), even);
        if (by_parity) {
            const __m512i order =
                _mm512_set_epi32(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
            digits = _mm512_permutexvar_epi32(order, digits);
        }
        return _mm512_shuffle_epi8(
            digits, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3,
                                                         7, 11, 15)));
    }

    // The sums of digits 0, 1 and 2, of those of each four inputs.
    static __m128i total(__m512i sums) {
        const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(sums),
                                              _mm512_extracti64x4_epi64(sums, 1));
        return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
};

// Adds to each lane the products of its four codes and four digits. Compilers move sums about where
// they are not told the instruction.
inline void multiply_add(__m512i& sum, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// Calls `f`, which is LORAX_INLINED, with each number below SIZE as a constant: what it indexes stays
// in registers.
#define LORAX_INLINED __attribute__((always_inline))
template <class F, size_t... N>
inline LORAX_INLINED void each(std::index_sequence<N...>, F f) {
    (f(std::integral_constant<int, N>()), ...);
}

template <int SIZE, class F>
inline LORAX_INLINED void each(F f) {
    each(std::make_index_sequence<SIZE>(), f);
}

// Some rows of a panel, as many as have their sums for all digits in registers.
template <int ROWS, class Codes>
class DigitTile {
    typedef Quads<Codes> Of;
    // By rows and digits, for both halves of a panel; and by rows.
    typedef __m512i Products[2 * ROWS * num_digits];
    typedef Lanes Sums[2 * ROWS];

   public:
    // See compute_floats.
    static void compute(const Digits& in, int64_t row, const uint8_t* w, int64_t depth,
                        const Out& out, const uint8_t* ahead, int64_t rate) {
        Sums sums = {};
        // Others have read or written these last.
        each<2 * ROWS>([&](auto n) LORAX_INLINED {
            __builtin_prefetch(out.at + n / 2 * out.stride + n % 2 * num_lanes, 1);
        });
        for (int64_t k = 0, run = 0; k < depth; k += Of::run, ++run) {
            Products products;
            begin(products, in.starts[row] + run);
            // They wait in memory: all registers are those of products.
            asm("" : "+m"(sums));
            const int64_t inputs = Codes::group > 1 ? Of::run : std::min(Of::run, depth - k);
            const int32_t* digits = in.words[row] + k;
            const uint8_t* codes = w + Of::shared_bytes;
            for (int64_t index = 0; index < inputs / quad; ++index, digits += quad) {
                __builtin_prefetch(ahead);
                if (quad * rate > cache_line) __builtin_prefetch(ahead + quad / 2 * rate);
                ahead += quad * rate;
                multiply(products, Of::read(codes, index, 0), Of::read(codes, index, 1), digits);
            }
            if constexpr (Codes::group == 1)
                if (inputs % quad) multiply_last(products, codes, inputs, digits);
            add(sums, products, in, row, run, w);
            w += Codes::bytes * (Of::run / Codes::group);
        }
        each<ROWS>([&](auto i) LORAX_INLINED {
            for (int half = 0; half < 2; ++half)
                finish(out, i, half, sums[2 * i + half] * in.scales[row + i]);
        });
    }

   private:
    static void begin(Products& products, const int32_t (*starts)[4]) {
        each<ROWS * num_digits>([&](auto n) LORAX_INLINED {
            const int32_t start = Of::lowest ? starts[n / num_digits * most_runs][n % num_digits] : 0;
            products[2 * n] = products[2 * n + 1] = _mm512_set1_epi32(start);
        });
    }

    static void multiply(Products& products, __m512i left, __m512i right, const int32_t* digits) {
        each<ROWS * num_digits>([&](auto n) LORAX_INLINED {
            const __m512i same =
                _mm512_set1_epi32(digits[n / num_digits * input_stride + n % num_digits]);
            multiply_add(products[2 * n], left, same);
            multiply_add(products[2 * n + 1], right, same);
        });
    }

    // The last inputs of a row, where they are fewer than four.
    static void multiply_last(Products& products, const uint8_t* codes, int64_t inputs,
                              const int32_t* digits) {
        alignas(64) uint8_t last[quad * columns] = {};
        const int64_t first = inputs / quad * quad;
        std::memcpy(last, codes + first * columns, (inputs - first) * columns);
        multiply(products, Of::read(last, 0, 0), Of::read(last, 0, 1), digits);
    }

    // Adds the sums of a run, times its scale, and its inputs times its offset.
    static void add(Sums& sums, const Products& products, const Digits& in, int64_t row, int64_t run,
                    const uint8_t* w) {
        each<2 * ROWS>([&](auto n) LORAX_INLINED {
            constexpr int i = n % ROWS, half = n / ROWS;
            constexpr int first = 2 * i * num_digits + half;
            const Lanes product =
                join(products[first], products[first + 2], products[first + 4]);
            if constexpr (Codes::group == 1) {
                sums[2 * i + half] += product;
            } else {
                const typename Codes::Same same(w);
                sums[2 * i + half] += product * same.scales[half];
                if constexpr (Codes::Same::has_offset)
                    sums[2 * i + half] += same.offsets[half] * in.totals[row + i][run];
            }
        });
    }

    // Sums of products with each digit, as one.
    static Lanes join(__m512i last, __m512i middle, __m512i first) {
        const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(middle, 8), last);
        return (Lanes)_mm512_fmadd_ps(_mm512_cvtepi32_ps(first), _mm512_set1_ps(65536.0f),
                                      _mm512_cvtepi32_ps(low));
    }
};

template <class Codes, size_t... ROWS>
constexpr Tiles<Digits> digit_tiles(std::index_sequence<ROWS...>) {
    return {nullptr, DigitTile<ROWS + 1, Codes>::compute...};
}

// None for numbers that are no codes.
template <class Codes>
constexpr Tiles<Digits> digit_tiles() {
    if constexpr (std::is_base_of_v<NotCodes, Quads<Codes>>)
        return {};
    else
        return digit_tiles<Codes>(std::make_index_sequence<Digits::most_tile>());
}

template <class Codes>
constexpr Cut cut_of() {
    if constexpr (std::is_base_of_v<NotCodes, Quads<Codes>>)
        return {};
    else
        return {Quads<Codes>::run, Quads<Codes>::lowest, Quads<Codes>::by_parity};
}

}  // namespace

#else

namespace {

// No format has tiles for them.
struct Digits : Floats {};

template <class Codes>
constexpr Tiles<Digits> digit_tiles() {
    return {};
}

template <class Codes>
constexpr Cut cut_of() {
    return {};
}

}  // namespace

#endif
