// Products of float32 numbers on a CPU's matrix tiles (AMX), which multiply bfloat16 alone.
//
// A float32 has 24 significant bits, a bfloat16 has 8, and both have the same exponents. So
// every number is the sum of three: its first 8 bits, the next 8, and the last 8, cut off and not
// rounded, so that what is left is exact.
//
//   x = x0 + x1 + x2        |x1| < 2^-7 |x|, |x2| < 2^-15 |x|
//   x w ~ x2 w0 + x0 w2 + x1 w1 + x1 w0 + x0 w1 + x0 w0
//
// What is left out, x1 w2 + x2 w1 + x2 w2, is less than 2^-21 |x w| and 2^-23 of it at a mean:
// as much as rounding costs anyway. Each of the six products is exact, and sums are float32.
// Parts that would be smaller than the smallest normal number count as zero.
//
// A tile has 16 rows of 64 bytes: of inputs and of a weight 32 numbers of 16 bits, in pairs of
// those 16 inputs apart, of sums 16 numbers of 32 bits. A part of a block lies in one KiB.

#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define LORAX_MATRIX_TILES

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace matrix_tiles {

constexpr int64_t rows = 16, columns = 16, depth = 32, parts = 3;
// Numbers of 16 bits in one part of one tile.
constexpr int64_t size = rows * depth;

// Whether the system lets this process use tiles; asked for once.
inline bool are_granted() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
}

// Compilers do not know that tiles are read from memory and written to it: in front of the one
// and behind the other.
inline void settle(const void* at) { asm volatile("" : : "r"(at) : "memory"); }

// While one lives, this thread computes with tiles; those of inputs and of sums have so many rows.
class Session {
   public:
    explicit Session(int64_t num_rows = rows) {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t num_rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        for (int tile = 0; tile < 6; ++tile)
            shape.num_rows[tile] = static_cast<uint8_t>(num_rows < rows ? num_rows : rows);
        settle(&shape);
        _tile_loadconfig(&shape);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
};

// Puts the first parts of 16 numbers and of the 16 that are paired with them side by side.
inline __m512i pair_up(__m512i low, __m512i high) {
    const __m512i first = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    // (low >> 16) | (high & first)
    return _mm512_ternarylogic_epi32(_mm512_srli_epi32(low, 16), high, first, 0xf8);
}

// Cuts 16 numbers and the 16 that are paired with them; part p goes to at + p * size.
inline void split(__m512 x, __m512 paired, uint16_t* at) {
    const __m512i first = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int64_t part = 0; part < parts; ++part, at += size) {
        const __m512i low = _mm512_castps_si512(x), high = _mm512_castps_si512(paired);
        _mm512_store_si512(at, pair_up(low, high));
        if (part + 1 == parts) return;
        x = _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(low, first)));
        paired = _mm512_sub_ps(paired, _mm512_castsi512_ps(_mm512_and_si512(high, first)));
    }
}

// The first `count` of 16 numbers, zeros behind them.
inline __m512 some(const float* at, int64_t count) {
    if (count >= 16) return _mm512_loadu_ps(at);
    return count <= 0 ? _mm512_setzero_ps()
                      : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), at);
}

// Sums are four tiles: two of columns for the first rows, two for the second.
inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// The second columns are `next_columns` numbers behind the first, the second rows `next_rows`, and
// row follows row after `stride`.
template <bool HAS_SECOND_ROWS>
inline void load_sums(const float* at, int64_t next_columns, int64_t next_rows, int64_t stride) {
    settle(at);
    _tile_loadd(0, at, 4 * stride);
    _tile_loadd(1, at + next_columns, 4 * stride);
    if (HAS_SECOND_ROWS) {
        _tile_loadd(2, at + next_rows, 4 * stride);
        _tile_loadd(3, at + next_rows + next_columns, 4 * stride);
    }
}

template <bool HAS_SECOND_ROWS>
inline void store_sums(float* at, int64_t next_columns, int64_t next_rows, int64_t stride) {
    _tile_stored(0, at, 4 * stride);
    _tile_stored(1, at + next_columns, 4 * stride);
    if (HAS_SECOND_ROWS) {
        _tile_stored(2, at + next_rows, 4 * stride);
        _tile_stored(3, at + next_rows + next_columns, 4 * stride);
    }
    settle(at);
}

// Sums that lie tile by tile.
template <bool HAS_SECOND_ROWS>
inline void load_sums(const float* at) {
    load_sums<HAS_SECOND_ROWS>(at, rows * columns, 2 * rows * columns, columns);
}

template <bool HAS_SECOND_ROWS>
inline void store_sums(float* at) {
    store_sums<HAS_SECOND_ROWS>(at, rows * columns, 2 * rows * columns, columns);
}

// Two row tiles by two column tiles: one step of 32 inputs. Rows' parts are at x and x + x_next,
// columns' at w and w + w_next. Rows come from the second
// cache and are loaded once, columns from the first; the largest products come last. A weight of
// one part is exact.
template <bool HAS_SECOND_ROWS, int WEIGHT_PARTS = parts>
inline void multiply(const uint16_t* x, int64_t x_next, const uint16_t* w, int64_t w_next) {
#define LORAX_TILES_ROWS(part)                            \
    _tile_loadd(4, x + (part) * size, 64);                \
    if (HAS_SECOND_ROWS) { _tile_loadd(5, x + x_next + (part) * size, 64); }
#define LORAX_TILES_COLUMNS(part)           \
    _tile_loadd(6, w + (part) * size, 64);  \
    _tile_loadd(7, w + w_next + (part) * size, 64);
#define LORAX_TILES_ADD               \
    _tile_dpbf16ps(0, 4, 6);          \
    _tile_dpbf16ps(1, 4, 7);          \
    if (HAS_SECOND_ROWS) {            \
        _tile_dpbf16ps(2, 5, 6);      \
        _tile_dpbf16ps(3, 5, 7);      \
    }
    LORAX_TILES_ROWS(2) LORAX_TILES_COLUMNS(0) LORAX_TILES_ADD
    LORAX_TILES_ROWS(1) LORAX_TILES_ADD
    if constexpr (WEIGHT_PARTS == 1) {
        LORAX_TILES_ROWS(0) LORAX_TILES_ADD
    } else {
        LORAX_TILES_COLUMNS(1) LORAX_TILES_ADD
        LORAX_TILES_ROWS(0) LORAX_TILES_ADD
        LORAX_TILES_COLUMNS(2) LORAX_TILES_ADD
        LORAX_TILES_COLUMNS(0) LORAX_TILES_ADD
    }
#undef LORAX_TILES_ROWS
#undef LORAX_TILES_COLUMNS
#undef LORAX_TILES_ADD
}

}  // namespace matrix_tiles

#endif
