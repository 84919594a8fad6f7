// Products of float32 rows and a quantized weight packed into panels, on a CPU. Loaded by kernel.py.
//
//   y[i] = W . x[i] + b        W: out x in, x: rows x in, y: rows x out
//
// Rows and sums are float32; only the weight is stored in fewer bits, and each of its numbers takes
// part as the float32 that `dense` gives. A panel is a few columns of y, as many as two registers
// hold. The weight lies in blocks of up to 128 inputs; in each block panel follows panel, and a panel
// is a row of groups. A group is what its inputs share for each column, scales and then what is
// added, and after that the codes in the order in which they are used.
//
// A tile is some rows of one panel, whose sums stay in registers while a block of the panel streams
// past. Where one tile takes all rows, codes become floats in its registers. More rows take turns
// with floats that are made once, in the first cache: the same numbers in the same order, so that
// what a row gets depends neither on the rows beside it nor on threads.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

// One register; vectors may lie anywhere.
#if defined(__AVX512F__)
constexpr int num_lanes = 16, tile_rows = 12;
#elif defined(__AVX__)
constexpr int num_lanes = 8, tile_rows = 6;
#elif defined(__aarch64__)
constexpr int num_lanes = 4, tile_rows = 12;
#else
constexpr int num_lanes = 4, tile_rows = 6;
#endif
constexpr int columns = 2 * num_lanes;

typedef float Lanes __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * num_lanes), aligned(4), may_alias));
typedef int8_t Bytes __attribute__((vector_size(num_lanes), aligned(1), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * num_lanes), aligned(2), may_alias));

inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }
inline const Lanes& lanes_at(const void* at) { return *reinterpret_cast<const Lanes*>(at); }
inline const Words& words_at(const void* at) { return *reinterpret_cast<const Words*>(at); }
inline const Bytes& bytes_at(const void* at) { return *reinterpret_cast<const Bytes*>(at); }
inline const Halves& halves_at(const void* at) { return *reinterpret_cast<const Halves*>(at); }

// Rows that are computed while a block of the weight passes through once, and the most inputs of
// a block: a panel's block in floats and a tile's inputs fit into the first cache.
constexpr int64_t most_rows = 96, most_depth = 128;
// From row to row of the inputs of a block; no multiple of 4 KiB.
constexpr int64_t input_stride = most_depth + 16;
// How far ahead a weight is asked for, in bytes.
constexpr int64_t lead = 4096;

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

// Where the results of a tile go.
struct Out {
    float* at;
    int64_t stride;
    bool is_first;       // the first block writes, the others add
    bool is_last;
    const float* scale;  // of a column, after the last block; null where groups have theirs
    const float* bias;   // null without one
};

inline void finish(const Out& out, int row, int half, Lanes sum) {
    float* at = out.at + row * out.stride + half * num_lanes;
    if (!out.is_first) sum = lanes_at(at) + sum;
    if (out.is_last) {
        if (out.scale) sum = sum * lanes_at(out.scale + half * num_lanes);
        if (out.bias) sum = sum + lanes_at(out.bias + half * num_lanes);
    }
    lanes_at(at) = sum;
}

// `ahead`: what to ask for meanwhile; `rate` bytes with every input.
template <int ROWS, class Codes>
void compute_tile(const float* x, const uint8_t* w, int64_t depth, const Out& out,
                  const uint8_t* ahead, int64_t rate) {
    Lanes sums[ROWS][2] = {};
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            __builtin_prefetch(out.at + row * out.stride + half * num_lanes, 1);
    for (int64_t k = 0; k < depth; k += Codes::group, w += Codes::bytes) {
        Codes codes(w);
        for (int part = 0; part < Codes::group / Codes::step; ++part) {
            codes.load(part);
#pragma GCC unroll 8
            for (int index = 0; index < Codes::step; ++index, ++x) {
                __builtin_prefetch(ahead);
                ahead += rate;
                const Lanes left = codes.read(index, 0), right = codes.read(index, 1);
                for (int row = 0; row < ROWS; ++row) {
                    const float input = x[row * input_stride];
                    sums[row][0] += left * input;
                    sums[row][1] += right * input;
                }
            }
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) finish(out, row, half, sums[row][half]);
}

typedef void Tile(const float*, const uint8_t*, int64_t, const Out&, const uint8_t*, int64_t);

// What computes one format: tiles of its codes, and its codes as floats.
struct Format {
    // Inputs of a group, and its bytes.
    int64_t group, bytes;
    Tile* tiles[tile_rows + 1];
    void (*widen)(const uint8_t* w, int64_t depth, float* floats);
};

template <class Codes>
void widen(const uint8_t* w, int64_t depth, float* floats) {
    for (int64_t k = 0; k < depth; k += Codes::group, w += Codes::bytes) {
        Codes codes(w);
        for (int part = 0; part < Codes::group / Codes::step; ++part) {
            codes.load(part);
#pragma GCC unroll 8
            for (int index = 0; index < Codes::step; ++index, floats += columns)
                for (int half = 0; half < 2; ++half)
                    lanes_at(floats + half * num_lanes) = codes.read(index, half);
        }
    }
}

template <class Codes>
constexpr Format format_of() {
    return {Codes::group,
            Codes::bytes,
            {nullptr, compute_tile<1, Codes>, compute_tile<2, Codes>, compute_tile<3, Codes>,
             compute_tile<4, Codes>, compute_tile<5, Codes>, compute_tile<6, Codes>,
#if defined(__AVX512F__) || defined(__aarch64__)
             compute_tile<7, Codes>, compute_tile<8, Codes>, compute_tile<9, Codes>,
             compute_tile<10, Codes>, compute_tile<11, Codes>, compute_tile<12, Codes>,
#endif
            },
            widen<Codes>};
}

// In the order of formats.py.
constexpr Format formats[] = {
    format_of<ChannelBytes>(),
    format_of<Bfloat>(),
    format_of<GroupedNibbles<Half, 32, false>>(),
    format_of<GroupedNibbles<Half, 32, true>>(),
    format_of<GroupedBytes<Half, 32, false>>(),
    format_of<GroupedNibbles<Full, 32, true>>(),
    format_of<GroupedBytes<Full, 16, true>>(),
};
constexpr Format plain = format_of<Plain>();

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

namespace {

// Some rows and some neighbouring panels: what one thread computes in one go.
class Part {
   public:
    Part(const QuantizedCall& call, int64_t first_row, int64_t last_row, int64_t first_panel,
         int64_t last_panel)
        : call(call), format(formats[call.format]), first_row(first_row),
          rows(last_row - first_row), first_panel(first_panel), last_panel(last_panel),
          num_panels((call.num_out + columns - 1) / columns),
          num_tiles((rows + tile_rows - 1) / tile_rows) {}

    void compute() {
        const uint8_t* block = call.weight;
        for (int64_t k = 0; k < call.num_in; k += most_depth) {
            const int64_t size = std::min(most_depth, call.num_in - k);
            const int64_t panel_bytes = size / format.group * format.bytes;
            for (int64_t row = 0; row < rows; ++row)
                std::memcpy(inputs + row * input_stride,
                            call.x + (first_row + row) * call.x_stride + k, size * sizeof(float));
            for (int64_t panel = first_panel; panel < last_panel; ++panel)
                compute_panel(panel, block + panel * panel_bytes, panel_bytes, k, size);
            block += num_panels * panel_bytes;
        }
        if (call.num_out % columns && last_panel == num_panels) copy_edge();
    }

   private:
    void compute_panel(int64_t panel, const uint8_t* w, int64_t num_bytes, int64_t k,
                       int64_t size) {
        const bool is_edge = (panel + 1) * columns > call.num_out;
        float* y = is_edge ? edge : call.y + first_row * call.y_stride + panel * columns;
        const int64_t stride = is_edge ? columns : call.y_stride;
        Out out{y, stride, k == 0, k + size == call.num_in,
                call.scale ? call.scale + panel * columns : nullptr,
                call.bias ? call.bias + panel * columns : nullptr};
        if (num_tiles == 1) {
            format.tiles[rows](inputs, w, size, out, w + lead, num_bytes / size);
            return;
        }
        format.widen(w, size, floats);
        const uint8_t* next = w + num_bytes;
        const int64_t rate = (num_bytes / size + num_tiles - 1) / num_tiles;
        for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
            // Rows are spread evenly: a tile of one row takes as long as one of four.
            const int64_t end = rows * (tile + 1) / num_tiles;
            out.at = y + row * stride;
            plain.tiles[end - row](inputs + row * input_stride, (const uint8_t*)floats, size, out,
                                   next + tile * rate * size, rate);
            row = end;
        }
    }

    void copy_edge() {
        const int64_t column = (num_panels - 1) * columns;
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(call.y + (first_row + row) * call.y_stride + column, edge + row * columns,
                        (call.num_out - column) * sizeof(float));
    }

    const QuantizedCall& call;
    const Format& format;
    const int64_t first_row, rows, first_panel, last_panel, num_panels, num_tiles;
    alignas(64) float inputs[most_rows * input_stride];
    // A panel's block of the weight, where several tiles read it.
    alignas(64) float floats[most_depth * columns];
    // Results of a panel that is wider than what is left of y.
    alignas(64) float edge[most_rows * columns];
};

// Multiplications from which on each thread gets several parts, so that one which is held up leaves
// some to the others. Few are done faster in one go.
constexpr int64_t much = 1 << 26, parts_a_thread = 4;
// Numbers of y that a part has: they stay in the second cache from block to block.
constexpr int64_t part_results = 65536;
// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 65536;

bool needs_threads(const QuantizedCall& call) {
    return call.num_threads > 1 && call.num_rows * call.num_in * call.num_out >= too_little;
}

}  // namespace

extern "C" int64_t lorax_quantized_columns() { return columns; }

// Called by all threads of a team; it has ended when it returns in any of them.
extern "C" void lorax_quantized_linear_team(const QuantizedCall* given) {
    const QuantizedCall& call = *given;
    const int64_t num_panels = (call.num_out + columns - 1) / columns;
    const int64_t work = call.num_rows * call.num_in * call.num_out;
    const int64_t parts = !needs_threads(call) ? 1
                          : work < much        ? call.num_threads
                                               : call.num_threads * parts_a_thread;
    const int64_t row_parts = (call.num_rows + most_rows - 1) / most_rows;
    const int64_t part_columns = call.num_rows ? part_results * row_parts / call.num_rows : 1;
    const int64_t fitting = std::max<int64_t>(1, part_columns / columns);
    const int64_t panel_parts =
        std::min(num_panels, std::max((num_panels + fitting - 1) / fitting,
                                      row_parts ? (parts + row_parts - 1) / row_parts : 1));
#pragma omp for schedule(dynamic, 1)
    for (int64_t part = 0; part < row_parts * panel_parts; ++part) {
        const int64_t row = part / panel_parts, panel = part % panel_parts;
        Part(call, call.num_rows * row / row_parts, call.num_rows * (row + 1) / row_parts,
             num_panels * panel / panel_parts, num_panels * (panel + 1) / panel_parts)
            .compute();
    }
}

extern "C" void lorax_quantized_linear(const QuantizedCall* call) {
    if (call->num_rows == 0) return;
#pragma omp parallel num_threads(call->num_threads) if (needs_threads(*call))
    lorax_quantized_linear_team(call);
}
