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

typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t num_lanes = 16;

inline const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }

inline float sum_lanes(const Lanes& lanes) {
    float sums[8];
    for (int i = 0; i < 8; ++i) sums[i] = lanes[i] + lanes[i + 8];
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
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

struct Groups {
    const int64_t* table;
    int64_t line_size;
    const int64_t* slots;
    const int64_t* starts;
    const int64_t* rows;
    int64_t count;
    Line line(int64_t group) const { return Line{table + slots[group] * line_size}; }
};

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
    for (; row + 2 <= num_rows; row += 2) dots<RANKS, 2>(a, n, x + row, h + row);
    if (row < num_rows) dots<RANKS, 1>(a, n, x + row, h + row);
}

constexpr int64_t ranks_at_once = 4, most_rows = 64;

// Ranks [first, last) of one group.
void shrink_block(const Line& line, const Groups& groups, int64_t group, int64_t first,
                  int64_t last, const float* x, int64_t x_stride, float* h, int64_t h_stride,
                  int64_t n) {
    const float* inputs[most_rows];
    float* outputs[most_rows];
    for (int64_t at = groups.starts[group]; at < groups.starts[group + 1]; at += most_rows) {
        const int64_t count = std::min(most_rows, groups.starts[group + 1] - at);
        for (int64_t i = 0; i < count; ++i) inputs[i] = x + groups.rows[at + i] * x_stride;
        for (int64_t rank = first; rank < last;) {
            for (int64_t i = 0; i < count; ++i) outputs[i] = h + (at + i) * h_stride + rank;
            const float* a = line.a() + rank * n;
            if (rank + ranks_at_once <= last) {
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

// Columns [first, last) of one group's rows.
void expand_block(const Line& line, int64_t member, const Groups& groups, int64_t group,
                  int64_t first, int64_t last, const float* h, int64_t h_stride, float* y,
                  int64_t y_stride) {
    const int64_t rank = line.rank(member), width = line.width(member);
    const float* b = line.b(member);
    h += line.offset(member);
    constexpr int64_t step = vectors_at_once * num_lanes;
    for (int64_t column = first; column < last;) {
        const int64_t size = column + step <= last ? step : column + num_lanes <= last ? num_lanes : 1;
        for (int64_t at = groups.starts[group]; at < groups.starts[group + 1]; ++at) {
            float* out = y + groups.rows[at] * y_stride + column;
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

// Work below this many multiplications is not worth waking threads for.
constexpr int64_t worth_threads = 16384;

}  // namespace

extern "C" void lorax_lora_shrink(const int64_t* table, int64_t line_size, const int64_t* slots,
                                  const int64_t* starts, const int64_t* rows, int64_t num_groups,
                                  const float* x, int64_t x_stride, int64_t n, float* h,
                                  int64_t h_stride, int num_threads) {
    const Groups groups{table, line_size, slots, starts, rows, num_groups};
    constexpr int64_t block = 8;
    const int64_t parts = (h_stride + block - 1) / block;  // h_stride is the largest R
    const bool threads = num_threads > 1 && starts[num_groups] * h_stride * n > worth_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (threads)
    for (int64_t item = 0; item < num_groups * parts; ++item) {
        const int64_t group = item / parts, first = item % parts * block;
        const Line line = groups.line(group);
        if (first < line.num_ranks())
            shrink_block(line, groups, group, first, std::min(first + block, line.num_ranks()), x,
                         x_stride, h, h_stride, n);
    }
}

extern "C" void lorax_lora_expand(const int64_t* table, int64_t line_size, const int64_t* slots,
                                  const int64_t* starts, const int64_t* rows, int64_t num_groups,
                                  int64_t member, const float* h, int64_t h_stride, float* y,
                                  int64_t y_stride, int64_t most_width, int num_threads) {
    const Groups groups{table, line_size, slots, starts, rows, num_groups};
    constexpr int64_t block = 512;
    const int64_t parts = (most_width + block - 1) / block;
    const bool threads = num_threads > 1 && starts[num_groups] * h_stride * most_width > worth_threads;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (threads)
    for (int64_t item = 0; item < num_groups * parts; ++item) {
        const int64_t group = item / parts, first = item % parts * block;
        const Line line = groups.line(group);
        if (line.num_ranks() == 0 || line.rank(member) == 0) continue;
        const int64_t last = std::min(first + block, line.width(member));
        if (first < last)
            expand_block(line, member, groups, group, first, last, h, h_stride, y, y_stride);
    }
}
