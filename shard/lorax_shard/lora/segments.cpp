// Low-rank products of few rows each on a CPU, float32. Loaded by cpp.py.
//
// Rows are grouped by adapter slot: group g has slot slots[g] and the rows
// rows[starts[g]] .. rows[starts[g + 1] - 1]. What a slot holds stands in a table of
// numbers, one line a slot (see Line below), so that nothing is looked up from outside.
//   shrink: h[i]       = x[rows[i]] . A^T        A: R x in
//   expand: y[rows[i]] += h[i, part] . B         B: r x out
// Each matrix is read once, where it lies, whatever the number of rows that share it.

#include <algorithm>
#include <cstdint>

namespace {

// One register; vectors may lie anywhere.
#ifdef __AVX512F__
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int num_lanes = 16, rows_at_once = 4;
#else
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int num_lanes = 8, rows_at_once = 2;
#endif

inline const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }

inline float sum_lanes(const Lanes& lanes) {
    float sums[num_lanes];
    lanes_at(sums) = lanes;
    for (int half = num_lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    return sums[0];
}

// A line: address of A, R, then for each member: address of B, r, where it begins in R, out.
// A slot that is not loaded has R = 0; a member without a low-rank part has r = 0.
struct Line {
    const int64_t* at;
    const float* a() const { return reinterpret_cast<const float*>(at[0]); }
    int64_t num_ranks() const { return at[1]; }
    const float* b(int64_t member) const {
        return reinterpret_cast<const float*>(at[2 + 4 * member]);
    }
    int64_t rank(int64_t member) const { return at[3 + 4 * member]; }
    int64_t offset(int64_t member) const { return at[4 + 4 * member]; }
    int64_t width(int64_t member) const { return at[5 + 4 * member]; }
};

// What a group of linears keeps from step to step.
struct Table {
    const int64_t* lines;
    int64_t line_size;
    int64_t most_ranks;     // the largest R
    int64_t width_in;
    int64_t num_lines;      // slots from here on were never loaded in this group
    int64_t most_width[1];  // of each member, the largest over all slots
};

// Which rows of a step belong to which slot.
struct Layout {
    const int64_t* slots;
    const int64_t* starts;
    const int64_t* rows;
    int64_t num_groups;
};

// How far ahead memory is asked for: matrices are too short for the processor to foresee it.
constexpr int64_t ahead = 512;

// One dot product per row, A read as one stream. For one or two rows, where memory sets the pace.
template <int ROWS>
inline void stream_dots(const float* a, int64_t n, const float* const* x, float* const* h) {
    constexpr int parts = 4;
    Lanes sums[ROWS][parts] = {};
    int64_t i = 0;
    for (; i + parts * num_lanes <= n; i += parts * num_lanes)
        for (int part = 0; part < parts; ++part) {
            const int64_t at = i + part * num_lanes;
            __builtin_prefetch(a + at + ahead);
            for (int row = 0; row < ROWS; ++row)
                sums[row][part] += lanes_at(a + at) * lanes_at(x[row] + at);
        }
    for (int row = 0; row < ROWS; ++row) {
        float sum = sum_lanes((sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]));
        for (int64_t rest = i; rest < n; ++rest) sum += x[row][rest] * a[rest];
        *h[row] = sum;
    }
}

// RANKS x ROWS dot products of length n at a time.
template <int RANKS, int ROWS>
inline void dots(const float* a, int64_t n, const float* const* x, float* const* h) {
    Lanes sums[ROWS][RANKS] = {};
    int64_t i = 0;
    for (; i + num_lanes <= n; i += num_lanes)
        for (int row = 0; row < ROWS; ++row) {
            const Lanes input = lanes_at(x[row] + i);
            for (int rank = 0; rank < RANKS; ++rank)
                sums[row][rank] += input * lanes_at(a + rank * n + i);
        }
    for (int row = 0; row < ROWS; ++row)
        for (int rank = 0; rank < RANKS; ++rank) {
            float sum = sum_lanes(sums[row][rank]);
            for (int64_t rest = i; rest < n; ++rest) sum += x[row][rest] * a[rank * n + rest];
            h[row][rank] = sum;
        }
}

template <int RANKS>
inline void shrink_ranks(const float* a, int64_t n, const float* const* x, float* const* h,
                         int64_t num_rows) {
    int64_t row = 0;
    for (; row + rows_at_once <= num_rows; row += rows_at_once)
        dots<RANKS, rows_at_once>(a, n, x + row, h + row);
    for (; row < num_rows; ++row) dots<RANKS, 1>(a, n, x + row, h + row);
}

constexpr int64_t ranks_at_once = 4, most_rows = 64;

// Ranks [first, last) of one group of rows.
void shrink_block(const Line& line, const Layout& layout, int64_t group, int64_t first,
                  int64_t last, const float* x, int64_t x_stride, float* h, int64_t h_stride,
                  int64_t n) {
    const float* inputs[most_rows];
    float* outputs[most_rows];
    for (int64_t at = layout.starts[group]; at < layout.starts[group + 1]; at += most_rows) {
        const int64_t count = std::min(most_rows, layout.starts[group + 1] - at);
        for (int64_t i = 0; i < count; ++i) inputs[i] = x + layout.rows[at + i] * x_stride;
        for (int64_t rank = first; rank < last;) {
            for (int64_t i = 0; i < count; ++i) outputs[i] = h + (at + i) * h_stride + rank;
            const float* a = line.a() + rank * n;
            if (count <= 2) {
                count == 1 ? stream_dots<1>(a, n, inputs, outputs)
                           : stream_dots<2>(a, n, inputs, outputs);
                rank += 1;
            } else if (rank + ranks_at_once <= last) {
                shrink_ranks<ranks_at_once>(a, n, inputs, outputs, count);
                rank += ranks_at_once;
            } else {
                shrink_ranks<1>(a, n, inputs, outputs, count);
                rank += 1;
            }
        }
    }
}

// VECTORS * num_lanes columns of one output row, kept in registers over all ranks.
template <int VECTORS>
inline void add_columns(float* y, const float* h, const float* b, int64_t rank, int64_t width) {
    Lanes sums[VECTORS];
    for (int v = 0; v < VECTORS; ++v) sums[v] = lanes_at(y + v * num_lanes);
    for (int64_t j = 0; j < rank; ++j, b += width)
        for (int v = 0; v < VECTORS; ++v) sums[v] += lanes_at(b + v * num_lanes) * h[j];
    for (int v = 0; v < VECTORS; ++v) lanes_at(y + v * num_lanes) = sums[v];
}

constexpr int vectors_at_once = 8;

// Columns [first, last) of one group of rows.
void expand_block(const Line& line, int64_t member, const Layout& layout, int64_t group,
                  int64_t first, int64_t last, const float* h, int64_t h_stride, float* y,
                  int64_t y_stride) {
    const int64_t rank = line.rank(member), width = line.width(member);
    const int64_t begin = layout.starts[group], end = layout.starts[group + 1];
    const float* b = line.b(member);
    h += line.offset(member);
    constexpr int64_t step = vectors_at_once * num_lanes;
    for (int64_t column = first; column < last;) {
        const int64_t size = column + step <= last ? step : column + num_lanes <= last ? num_lanes : 1;
        for (int64_t at = begin; at < end; ++at) {
            float* out = y + layout.rows[at] * y_stride + column;
            const float* left = h + at * h_stride;
            if (size == step)
                add_columns<vectors_at_once>(out, left, b + column, rank, width);
            else if (size == num_lanes)
                add_columns<1>(out, left, b + column, rank, width);
            else
                for (int64_t j = 0; j < rank; ++j) *out += left[j] * b[column + j * width];
        }
        column += size;
    }
}

// Multiplications that are not worth waking threads for.
constexpr int64_t too_little = 16384;
// Of a slot that is not loaded; whoever reads R = 0 reads no further.
constexpr int64_t no_line[2] = {0, 0};

constexpr int64_t ranks_a_task = 8, columns_a_task = 512;

}  // namespace

// Shrinks the input unless x is null (h then holds it already), and adds one member's output.
extern "C" void lorax_lora_apply(const Table* group, const Layout* step, const float* x,
                                 int64_t x_stride, float* h, float* y, int64_t y_stride,
                                 int64_t member, int num_threads) {
    const Table& table = *group;
    const Layout& layout = *step;
    const int64_t ranks = table.most_ranks, width = table.most_width[member];
    const int64_t shrinks = x ? (ranks + ranks_a_task - 1) / ranks_a_task : 0;
    const int64_t expands = (width + columns_a_task - 1) / columns_a_task;
    const int64_t work = layout.starts[layout.num_groups] * ranks * ((x ? table.width_in : 0) + width);
    const auto line_of = [&](int64_t g) {
        const int64_t slot = layout.slots[g];
        return Line{slot < table.num_lines ? table.lines + slot * table.line_size : no_line};
    };
#pragma omp parallel num_threads(num_threads) if (num_threads > 1 && work > too_little)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < layout.num_groups * shrinks; ++item) {
            const int64_t at = item / shrinks, first = item % shrinks * ranks_a_task;
            const Line line = line_of(at);
            const int64_t last = std::min(first + ranks_a_task, line.num_ranks());
            if (first < last)
                shrink_block(line, layout, at, first, last, x, x_stride, h, ranks, table.width_in);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < layout.num_groups * expands; ++item) {
            const int64_t at = item / expands, first = item % expands * columns_a_task;
            const Line line = line_of(at);
            if (line.num_ranks() == 0 || line.rank(member) == 0) continue;
            const int64_t last = std::min(first + columns_a_task, line.width(member));
            if (first < last)
                expand_block(line, member, layout, at, first, last, h, ranks, y, y_stride);
        }
    }
}
