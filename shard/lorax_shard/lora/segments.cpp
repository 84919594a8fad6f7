// Low-rank products of many adapters on a CPU, summed in float32. Loaded by cpp.py.
//
// Rows are grouped by adapter slot: group g has slot slots[g] and the rows
// rows[starts[g]] .. rows[starts[g + 1] - 1]. What a slot holds stands in a table of
// numbers, one line a slot (see Line below), so that nothing is looked up from outside.
//   shrink: h[i]       = scale * (x[rows[i]] . A^T)    A: R x in
//   expand: y[rows[i]] += h[i, part] . B               B: r x out
// Each matrix is read where it lies, once for up to block_rows rows that share it.
//
// What a row gets does not depend on the rows beside it nor on threads: each sum has one
// accumulator a lane, which runs through its products from first to last.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../numbers/dots.h"

namespace {

// A line: address of A, R, type of A, then for each member: address of B, r, where it begins in
// R, out, type of B, scale (a double). A slot that is not loaded has R = 0; a member without a
// low-rank part has r = 0.
struct Line {
    const int64_t* at;
    static constexpr int64_t head = 3, part = 6;
    const void* a() const { return reinterpret_cast<const void*>(at[0]); }
    int64_t num_ranks() const { return at[1]; }
    int64_t type() const { return at[2]; }
    const int64_t* of(int64_t member) const { return at + head + part * member; }
    const void* b(int64_t member) const { return reinterpret_cast<const void*>(of(member)[0]); }
    int64_t rank(int64_t member) const { return of(member)[1]; }
    int64_t offset(int64_t member) const { return of(member)[2]; }
    int64_t width(int64_t member) const { return of(member)[3]; }
    int64_t b_type(int64_t member) const { return of(member)[4]; }
    float scale(int64_t member) const {
        double scale;
        std::memcpy(&scale, of(member) + 5, sizeof scale);
        return static_cast<float>(scale);
    }
};

// What a group of linears keeps from step to step.
struct Table {
    const int64_t* lines;
    int64_t line_size;
    int64_t num_lines;   // slots from here on were never loaded in this group
    int64_t num_loaded;  // lines that are in use
    int64_t width_in;
    int64_t num_members;
};

// Which rows of a step belong to which slot, and the shrunk rows.
struct Layout {
    int64_t* slots;
    int64_t* starts;
    int64_t* rows;
    int64_t num_groups;
    float* h;  // one row after the other, in the order of `rows`
    int64_t h_stride;
};

// Of a slot that is not loaded; whoever reads R = 0 reads no further.
constexpr int64_t no_line[2] = {0, 0};

// Rows for which a matrix is read once: their inputs stay in the second cache.
constexpr int64_t block_rows = 48;
// Up to here memory sets the pace.
constexpr int64_t few_rows = 4;
// Of so many rows a matrix is one stream whose results are stored with every rank; of more, up to
// few_rows, it is several, and results are stored less often. How far ahead memory is asked for, in
// bytes: matrices are too short for the processor to get going. Measured on Intel's cores with
// matrix tiles, and on AMD's Zen 5.
#if defined(__AMX_TILE__)
constexpr int64_t one_stream_rows = 0, ahead = 4096;
#else
constexpr int64_t one_stream_rows = 2, ahead = 8192;
#endif
constexpr int ranks_at_once = 4, vectors_at_once = 8;
template <class E>
constexpr int64_t lead = ahead / int64_t{sizeof(E)};

// Memory is asked for ahead of what is read, up to an address; from there on elsewhere, where the
// thread reads next: matrices of one adapter follow each other, those of the next lie apart.
struct Jump {
    const char* from;
    int64_t distance;
    void ask_for(const void* at) const {
        const char* there = static_cast<const char*>(at) + ahead;
        __builtin_prefetch(there < from ? there : there + distance);
    }
};

template <class E, int RANKS>
inline void shrink_ranks(const E* a, int64_t n, float scale, const float* const* x,
                         float* const* h, int64_t count) {
    int64_t row = 0;
    for (; row + rows_at_once <= count; row += rows_at_once)
        dots<E, RANKS, rows_at_once>(a, n, row ? 0 : lead<E>, scale, x + row, h + row);
    for (; row < count; ++row) dots<E, RANKS, 1>(a, n, row ? 0 : lead<E>, scale, x + row, h + row);
}

// VECTORS * num_lanes columns of some output rows, kept in registers over all ranks. The first
// rows of a block ask for the next columns of B.
template <class E, int VECTORS, int ROWS>
inline void add_columns(const E* b, int64_t rank, int64_t width, bool is_first,
                        const float* const* h, float* const* y, int64_t column) {
    constexpr int64_t size = VECTORS * num_lanes;
    Lanes sums[ROWS][VECTORS];
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) sums[row][v] = lanes_at(y[row] + column + v * num_lanes);
    b += column;
    for (int64_t j = 0; j < rank; ++j, b += width) {
        for (int64_t at = 0; is_first && at < size; at += line_size<E>)
            __builtin_prefetch(b + size + at);
        for (int v = 0; v < VECTORS; ++v) {
            const Lanes values = load(b + v * num_lanes);
            for (int row = 0; row < ROWS; ++row) sums[row][v] += values * h[row][j];
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) lanes_at(y[row] + column + v * num_lanes) = sums[row][v];
}

template <class E, int VECTORS>
inline void add_to_rows(const E* b, int64_t rank, int64_t width, const float* const* h,
                        float* const* y, int64_t count, int64_t column) {
    int64_t row = 0;
    for (; row + 2 <= count; row += 2)
        add_columns<E, VECTORS, 2>(b, rank, width, row == 0, h + row, y + row, column);
    if (row < count)
        add_columns<E, VECTORS, 1>(b, rank, width, row == 0, h + row, y + row, column);
}

// RANKS ranks' part of whole registers of columns, for few rows: B is read from its begin to its
// end, and what lies in the cache, y, is what is read again and again.
template <class E, int RANKS, int ROWS>
inline void stream_ranks(const E* b, int64_t width, const float* const* h, int64_t j,
                         float* const* y, int64_t first, int64_t last, Jump jump) {
    Lanes factors[ROWS][RANKS];
    for (int row = 0; row < ROWS; ++row)
        for (int rank = 0; rank < RANKS; ++rank) factors[row][rank] = Lanes{} + h[row][j + rank];
    b += j * width;
    const auto add_at = [&](int64_t column) {
        Lanes values[RANKS];
        for (int rank = 0; rank < RANKS; ++rank) values[rank] = load(b + rank * width + column);
        for (int row = 0; row < ROWS; ++row) {
            Lanes sum = lanes_at(y[row] + column);
            for (int rank = 0; rank < RANKS; ++rank) sum += values[rank] * factors[row][rank];
            lanes_at(y[row] + column) = sum;
        }
    };
    int64_t column = first;
    for (; column + line_size<E> <= last; column += line_size<E>) {
        for (int rank = 0; rank < RANKS; ++rank) jump.ask_for(b + rank * width + column);
        for (int64_t at = column; at < column + line_size<E>; at += num_lanes) add_at(at);
    }
    for (; column + num_lanes <= last; column += num_lanes) add_at(column);
}

// The last columns, fewer than a register holds.
template <class E>
inline void add_rest(const E* b, int64_t rank, int64_t width, const float* const* h,
                     float* const* y, int64_t count, int64_t column, int64_t last) {
    const int64_t size = last - column;
    for (int64_t row = 0; row < count; ++row) {
        Lanes sum = load_some(y[row] + column, size);
        for (int64_t j = 0; j < rank; ++j)
            sum += load_some(b + j * width + column, size) * h[row][j];
        std::memcpy(y[row] + column, &sum, size * sizeof(float));
    }
}

// Some rows of one slot: what is read together.
struct Block {
    Line line;
    int64_t first, count;  // in the order of the layout's rows
};

}  // namespace

// What Python hands over: all fields have eight bytes.
struct LoraCall {
    const Table* table;
    const Layout* layout;
    const float* x;  // null: h holds it shrunk already
    int64_t x_stride;
    float* y;
    int64_t y_stride;
    const int64_t* columns;  // where in y the members begin
    int64_t first_member;
    int64_t num_members;
    int64_t num_threads;
    const int64_t* x_rows;  // which of x each row reads; null: the one of its number
};

namespace {

// One call's work on one block of rows.
class Rows {
   public:
    Rows(const LoraCall& call, const Block& block) : call(call), line(block.line),
        count(block.count), width_in(call.table->width_in) {
        const Layout& layout = *call.layout;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = layout.rows[block.first + i];
            x[i] = call.x + (call.x_rows ? call.x_rows[row] : row) * call.x_stride;
            y[i] = call.y + row * call.y_stride;
            h[i] = layout.h + (block.first + i) * layout.h_stride;
        }
    }

    // Ranks [first, last) of all members.
    void shrink(int64_t first, int64_t last) const {
        for (int64_t member = 0; member < call.table->num_members; ++member) {
            const int64_t begin = line.offset(member), end = begin + line.rank(member);
            const int64_t from = std::max(first, begin), to = std::min(last, end);
            if (from >= to) continue;
            const float scale = line.scale(member);
            with_type(line.type(), line.a(), [&](auto* a) { shrink(a, scale, from, to); });
        }
    }

    // Columns [first, last) of a member. Its B is followed by the next member's, or by what lies at
    // `next`, unless that is null.
    void expand(int64_t member, int64_t first, int64_t last, const void* next = nullptr) const {
        with_type(line.b_type(member), line.b(member),
                  [&](auto* b) { expand(b, member, first, last, next); });
    }

   private:
    template <class E>
    void shrink(const E* a, float scale, int64_t first, int64_t last) const {
        float* out[block_rows];
        for (int64_t rank = first, size; rank < last; rank += size) {
            const E* from = a + rank * width_in;
            for (int64_t i = 0; i < count; ++i) out[i] = h[i] + rank;
            size = 1;
            if (count <= few_rows && (count <= one_stream_rows || rank + 2 > last)) {
                with_few(count, [&](auto rows) {
                    dots<E, 1, rows()>(from, width_in, lead<E>, scale, x, out);
                });
            } else if (count <= few_rows) {
                // Inputs that are read for several ranks at once are read less often.
                size = 2;
                with_few(count, [&](auto rows) {
                    dots<E, 2, rows()>(from, width_in, lead<E>, scale, x, out);
                });
            } else if (rank + ranks_at_once <= last) {
                size = ranks_at_once;
                shrink_ranks<E, ranks_at_once>(from, width_in, scale, x, out, count);
            } else {
                shrink_ranks<E, 1>(from, width_in, scale, x, out, count);
            }
        }
    }

    template <class E>
    void expand(const E* b, int64_t member, int64_t first, int64_t last, const void* next) const {
        const int64_t rank = line.rank(member), width = line.width(member);
        const float* left[block_rows];
        float* out[block_rows];
        for (int64_t i = 0; i < count; ++i) {
            left[i] = h[i] + line.offset(member);
            out[i] = y[i] + call.columns[member - call.first_member];
        }
        int64_t column = first;
        if (count <= few_rows) {
            column += (last - first) / num_lanes * num_lanes;
            const char* end = reinterpret_cast<const char*>(b + rank * width);
            const Jump jump{end, next ? static_cast<const char*>(next) - end : 0};
            expand_few(b, rank, width, left, out, first, column, jump);
        }
        constexpr int64_t step = vectors_at_once * num_lanes;
        for (; column + step <= last; column += step)
            add_to_rows<E, vectors_at_once>(b, rank, width, left, out, count, column);
        for (; column + num_lanes <= last; column += num_lanes)
            add_to_rows<E, 1>(b, rank, width, left, out, count, column);
        if (column < last) add_rest(b, rank, width, left, out, count, column, last);
    }

    template <class E>
    void expand_few(const E* b, int64_t rank, int64_t width, const float* const* left,
                    float* const* out, int64_t first, int64_t last, Jump jump) const {
        int64_t j = 0;
        // Outputs of several rows are stored less often, at the price of several streams.
        for (; count > one_stream_rows && j + ranks_at_once <= rank; j += ranks_at_once)
            with_few(count, [&](auto rows) {
                stream_ranks<E, ranks_at_once, rows()>(b, width, left, j, out, first, last, jump);
            });
        for (; j < rank; ++j)
            with_few(count, [&](auto rows) {
                stream_ranks<E, 1, rows()>(b, width, left, j, out, first, last, jump);
            });
    }

    const LoraCall& call;
    const Line line;
    const int64_t count, width_in;
    const float* x[block_rows];
    float* y[block_rows];
    float* h[block_rows];
};

// The blocks of a call, one after the other: asked for by ascending numbers.
class Blocks {
   public:
    explicit Blocks(const LoraCall& call) : call(call) {}

    Line line_of(int64_t group) const {
        const Table& table = *call.table;
        const int64_t slot = call.layout->slots[group];
        return Line{slot < table.num_lines ? table.lines + slot * table.line_size : no_line};
    }

    // Has memory send a line's part of this group of linears and of the next one.
    void ask_for(int64_t group) const {
        const int64_t numbers = Line::head + Line::part * call.table->num_members;
        for (int64_t at = 0; at < 2 * numbers; at += 64 / int64_t{sizeof(int64_t)})
            __builtin_prefetch(line_of(group).at + at);
    }

    int64_t num_rows(int64_t group) const {
        return call.layout->starts[group + 1] - call.layout->starts[group];
    }

    // How many blocks a group has.
    int64_t count(int64_t group) const {
        if (line_of(group).num_ranks() == 0) return 0;
        return (num_rows(group) + block_rows - 1) / block_rows;
    }

    Block at(int64_t number) {
        while (number >= before + count(group)) before += count(group++);
        const int64_t start = call.layout->starts[group] + (number - before) * block_rows;
        const int64_t left = call.layout->starts[group + 1] - start;
        return Block{line_of(group), start, std::min(block_rows, left)};
    }

   private:
    const LoraCall& call;
    int64_t group = 0, before = 0;  // blocks of the groups before this one
};

// What a call has to do, and how threads share it.
class Plan {
   public:
    explicit Plan(const LoraCall& call) : call(call) {
        if (call.table->num_loaded == 0) return;
        const Blocks blocks(call);
        for (int64_t group = 0; group < call.layout->num_groups; ++group) blocks.ask_for(group);
        for (int64_t group = 0; group < call.layout->num_groups; ++group)
            if (const int64_t count = blocks.count(group))
                add(blocks.line_of(group), blocks.num_rows(group), count);
    }

    bool is_worth_threads() const { return work > too_little; }

    // Called by all threads of a team.
    void run(int64_t num_threads) const {
        if (work == 0) return;
        if (!is_worth_threads()) {
#pragma omp single
            run_blocks();
        } else if (is_even(num_threads)) {
            Blocks blocks(call), nexts(call);
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < num_blocks; ++number)
                run_block(blocks.at(number), nexts.at(std::min(number + num_threads, num_blocks - 1)));
        } else {
            run_pieces();
        }
    }

    // In one thread.
    void run_blocks() const {
        Blocks blocks(call), nexts(call);
        for (int64_t number = 0; number < num_blocks; ++number)
            run_block(blocks.at(number), nexts.at(std::min(number + 1, num_blocks - 1)));
    }

   private:
    // Multiplications that are not worth waking threads for.
    static constexpr int64_t too_little = 16384;
    // To read a matrix takes as long as to multiply it by so many rows.
    static constexpr int64_t rows_of_reading = 4;
    static constexpr int64_t ranks_a_piece = 8, columns_a_piece = 256;

    int64_t end_member() const { return call.first_member + call.num_members; }

    void add(const Line& line, int64_t rows, int64_t count) {
        int64_t size = call.x ? line.num_ranks() * call.table->width_in : 0;
        for (int64_t member = call.first_member; member < end_member(); ++member) {
            size += line.rank(member) * line.width(member);
            most_width = std::max(most_width, line.width(member));
        }
        most_ranks = std::max(most_ranks, line.num_ranks());
        num_blocks += count;
        work += rows * size;
        cost += (rows + count * rows_of_reading) * size;
        most_cost = std::max(most_cost, (std::min(rows, block_rows) + rows_of_reading) * size);
    }

    // Whether whole blocks, taken one by one, keep all threads about equally busy. No thread has
    // more than the most blocks of the largest size, nor takes one when it has had its share.
    bool is_even(int64_t num_threads) const {
        const int64_t most_blocks = (num_blocks + num_threads - 1) / num_threads;
        const int64_t longest = std::min(most_blocks * most_cost * num_threads,
                                         cost + most_cost * (num_threads - 1));
        return longest * 8 <= cost * 9;
    }

    // `next` is the one that this thread computes after it, as far as that is known.
    void run_block(const Block& block, const Block& next) const {
        const Rows rows(call, block);
        if (call.x) rows.shrink(0, block.line.num_ranks());
        for (int64_t member = call.first_member; member < end_member(); ++member) {
            if (block.line.rank(member) == 0) continue;
            const bool is_last = member + 1 == end_member() && next.line.at != block.line.at;
            rows.expand(member, 0, block.line.width(member), is_last ? next.line.a() : nullptr);
        }
    }

    // Few blocks, or some much larger than others: shared by ranks, then by columns.
    void run_pieces() const {
        if (call.x) {
            const int64_t pieces = (most_ranks + ranks_a_piece - 1) / ranks_a_piece;
            Blocks blocks(call);
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < num_blocks * pieces; ++number) {
                const Block block = blocks.at(number / pieces);
                const int64_t first = number % pieces * ranks_a_piece;
                if (first < block.line.num_ranks())
                    Rows(call, block).shrink(first, first + ranks_a_piece);
            }
        }
        const int64_t pieces = (most_width + columns_a_piece - 1) / columns_a_piece;
        Blocks blocks(call);
#pragma omp for schedule(dynamic, 1)
        for (int64_t number = 0; number < num_blocks * pieces * call.num_members; ++number) {
            const int64_t piece = number % (pieces * call.num_members);
            const Block block = blocks.at(number / (pieces * call.num_members));
            const int64_t member = call.first_member + piece / pieces;
            const int64_t first = piece % pieces * columns_a_piece;
            const int64_t width = block.line.rank(member) ? block.line.width(member) : 0;
            if (first < width)
                Rows(call, block).expand(member, first, std::min(first + columns_a_piece, width));
        }
    }

    const LoraCall& call;
    int64_t num_blocks = 0, most_ranks = 0, most_width = 0;
    int64_t work = 0, cost = 0, most_cost = 0;
};

}  // namespace

// What Python hands over with the rows of another step.
struct LayoutCall {
    Layout* layout;  // with room for num_rows
    const int64_t* slots;
    int64_t num_rows;
    int64_t* group_of_slot;  // -1 of each slot, and so it is left
    int64_t num_slots;       // none from here on is loaded in any group
    // Of pairs of a token and an expert, else null: `slots` are the tokens', and an expert has
    // matrices of its own in each of them.
    const int64_t* tokens;
    const int64_t* experts;
    int64_t per_slot;

    int64_t slot_of(int64_t row) const {
        if (!tokens) return slots[row];
        const int64_t slot = slots[tokens[row]];
        return slot < 0 ? slot : slot * per_slot + experts[row];
    }
};

// Groups rows by slot, in the order in which slots come first; rows of a group stay in their order.
extern "C" void lorax_lora_lay_out(const LayoutCall* call) {
    Layout& layout = *call->layout;
    int64_t* group_of = call->group_of_slot;
    const auto is_used = [&](int64_t slot) { return 0 <= slot && slot < call->num_slots; };
    layout.num_groups = 0;
    layout.starts[0] = 0;
    for (int64_t row = 0; row < call->num_rows; ++row) {
        const int64_t slot = call->slot_of(row);
        if (!is_used(slot)) continue;
        if (group_of[slot] < 0) {
            layout.slots[layout.num_groups] = slot;
            group_of[slot] = layout.num_groups++;
            layout.starts[layout.num_groups] = 0;
        }
        ++layout.starts[group_of[slot] + 1];
    }
    for (int64_t group = 0; group < layout.num_groups; ++group)
        layout.starts[group + 1] += layout.starts[group];
    for (int64_t row = 0; row < call->num_rows; ++row) {
        const int64_t slot = call->slot_of(row);
        if (is_used(slot)) layout.rows[layout.starts[group_of[slot]]++] = row;
    }
    // Each start has become the next one's.
    for (int64_t group = layout.num_groups; group > 0; --group)
        layout.starts[group] = layout.starts[group - 1];
    layout.starts[0] = 0;
    for (int64_t group = 0; group < layout.num_groups; ++group) group_of[layout.slots[group]] = -1;
}

// Called by all threads of a team; outside of one it computes alone.
extern "C" void lorax_lora_apply_team(const LoraCall* call) {
    Plan(*call).run(omp_get_num_threads());
}

extern "C" void lorax_lora_apply(const LoraCall* call) {
    const Plan plan(*call);
    if (call->num_threads == 1 || !plan.is_worth_threads()) {
        plan.run_blocks();
        return;
    }
#pragma omp parallel num_threads(call->num_threads)
    plan.run(omp_get_num_threads());
}
