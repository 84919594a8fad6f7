// Low-rank products of many adapters on a CPU, summed in float32. Loaded by cpp.py.
//
// Rows are grouped by adapter slot: group g has slot slots[g] and the rows
// rows[starts[g]] .. rows[starts[g + 1] - 1]. What a slot holds stands in a table of
// numbers, one line a slot (table.h), so that nothing is looked up from outside.
//   shrink: h[i]       = x[rows[i]] . A^T              A: R x in
//   expand: y[rows[i]] += scale * h[i, part] . B       B: r x out
// Each matrix is read where it lies, once for up to block_rows rows that share it.
//
// What a row gets does not depend on the rows beside it nor on threads: each sum has one
// accumulator a lane, which runs through its products from first to last.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../mixture/told.h"
#include "panels.h"
#include "table.h"

namespace {

// Rows for which a matrix is read once: their inputs stay in the second cache.
constexpr int64_t block_rows = 48;
// Up to here memory sets the pace.
constexpr int64_t few_rows = 4;

// Calls `use` with the address of a matrix and whether it lies in panels.
template <class Use>
inline void with_matrix(int64_t type, const void* at, Use use) {
    if (type == in_panels + is_bfloat16)
        use(static_cast<const Zipped*>(at), true);
    else
        with_type(type % in_panels, at, [&](auto* known) { use(known, type >= in_panels); });
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
    // `next` is what this thread reads after it, as far as that is known, or null.
    Rows(const LoraCall& call, const Block& block, const void* next = nullptr)
        : call(call), line(block.line), count(block.count), width_in(call.table->width_in),
          jump(next ? Jump::to(next, line.end(call.first_member + call.num_members)) : Jump()) {
        const Layout& layout = *call.layout;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = layout.rows[block.first + i];
            x[i] = call.x + (call.x_rows ? call.x_rows[row] : row) * call.x_stride;
            y[i] = call.y + row * call.y_stride;
            h[i] = layout.h + (block.first + i) * layout.h_stride;
        }
    }

    // Has memory, or another thread's cache, send what a member adds to, while x is shrunk.
    void ask_for_outputs(int64_t member) const {
        const int64_t width = line.rank(member) ? line.width(member) : 0;
        for (int64_t i = 0; i < count; ++i) {
            const float* at = y[i] + call.columns[member - call.first_member];
            for (int64_t column = 0; column < width; column += line_bytes / 4)
                __builtin_prefetch(at + column, 1);
        }
    }

    // Ranks [first, last) of all members; `first` begins a panel.
    void shrink(int64_t first, int64_t last) const {
        last = std::min(last, line.num_ranks());
        with_matrix(line.type(), line.a(), [&](auto* a, bool is_packed) {
            for (int64_t rank = first; rank < last; rank += panel_ranks)
                shrink(Panel(a, rank, line.num_ranks(), width_in, is_packed), rank);
        });
    }

    // Columns [first, last) of a member, which begin a block.
    void expand(int64_t member, int64_t first, int64_t last) const {
        with_matrix(line.b_type(member), line.b(member), [&](auto* b, bool is_packed) {
            const int64_t rank = line.rank(member), width = line.width(member);
            for (int64_t from = 0; from < rank; from += panel_ranks)
                expand(Panel(b, from, rank, width, is_packed), member, from, first, last);
        });
    }

   private:
    template <class E>
    void shrink(const Panel<E>& panel, int64_t rank) const {
        float* out[block_rows];
        for (int64_t i = 0; i < count; ++i) out[i] = h[i] + rank;
        with_rows(count, [&](auto rows, int64_t row) {
            with_ranks<ranks_a_tile<rows()>>(panel.ranks, [&](auto ranks, int64_t at) {
                shrink_tile<E, ranks(), rows()>(panel, at, row ? nullptr : &jump, x + row, out + row);
            });
        });
    }

    template <class E>
    void expand(const Panel<E>& panel, int64_t member, int64_t rank, int64_t first,
                int64_t last) const {
        const float scale = line.scale(member);
        const float* left[block_rows];
        float* out[block_rows];
        for (int64_t i = 0; i < count; ++i) {
            left[i] = h[i] + line.offset(member) + rank;
            out[i] = y[i] + call.columns[member - call.first_member];
        }
        with_rows(count, [&](auto rows, int64_t row) {
            with_ranks<8>(panel.ranks, [&](auto ranks, int64_t at) {
                expand_tile<E, ranks(), rows()>(panel, at, first / block_size<E>,
                                                last / block_size<E>, row ? nullptr : &jump, scale,
                                                left + row, out + row);
            });
        });
        if (last > panel.rest_column())
            for (int64_t i = 0; i < count; ++i) expand_rest(panel, scale, left[i], out[i]);
    }

    const LoraCall& call;
    const Line line;
    const int64_t count, width_in;
    const Jump jump;
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

    // Of so many rows in so many blocks: about as many in each.
    static int64_t rows_a_block(int64_t rows, int64_t count) { return (rows + count - 1) / count; }

    // How many blocks a group has.
    int64_t count(int64_t group) const {
        if (line_of(group).num_ranks() == 0) return 0;
        return (num_rows(group) + block_rows - 1) / block_rows;
    }

    Block at(int64_t number) {
        while (number >= before + count(group)) before += count(group++);
        const int64_t rows = rows_a_block(num_rows(group), count(group));
        const int64_t start = call.layout->starts[group] + (number - before) * rows;
        const int64_t left = call.layout->starts[group + 1] - start;
        return Block{line_of(group), start, std::min(rows, left)};
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

    // Has memory send what a thread reads first, as far as that is known.
    void ask_for_first(int64_t num_threads) const {
        if (!is_worth_threads() || !is_even(num_threads) || !are_equal()) return;
        const int64_t first = first_of(omp_get_thread_num(), num_threads);
        if (first == num_blocks) return;
        const char* at = static_cast<const char*>(Blocks(call).at(first).line.a());
        for (int64_t byte = 0; byte < ahead; byte += line_bytes) __builtin_prefetch(at + byte);
    }

    // Called by all threads of a team.
    void run(int64_t num_threads) const {
        if (work == 0) return;
        if (!is_worth_threads()) {
#pragma omp single
            run_blocks();
        } else if (!is_even(num_threads)) {
            run_pieces();
        } else if (are_equal()) {
            const int64_t thread = omp_get_thread_num();
            run_blocks(first_of(thread, num_threads), first_of(thread + 1, num_threads));
#pragma omp barrier
        } else {
            Blocks blocks(call), nexts(call);
#pragma omp for schedule(dynamic, 1)
            for (int64_t number = 0; number < num_blocks; ++number) {
                const int64_t next = std::min(number + num_threads, num_blocks - 1);
                run_block(blocks.at(number), nexts.at(next).line.a());
            }
        }
    }

    // In one thread.
    void run_blocks() const { run_blocks(0, num_blocks); }

   private:
    // Multiplications that are not worth waking threads for.
    static constexpr int64_t too_little = 16384;
    // To read a matrix takes as long as to multiply it by so many rows.
    static constexpr int64_t rows_of_reading = 4;
    static constexpr int64_t ranks_a_piece = panel_ranks, columns_a_piece = 256;

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
        most_cost = std::max(most_cost, (Blocks::rows_a_block(rows, count) + rows_of_reading) * size);
    }

    // Whether all blocks cost the same: then threads share them beforehand.
    bool are_equal() const { return cost == most_cost * num_blocks; }

    int64_t first_of(int64_t thread, int64_t num_threads) const {
        return num_blocks * thread / num_threads;
    }

    // Whether whole blocks, taken one by one, keep all threads about equally busy. No thread has
    // more than the most blocks of the largest size, nor takes one when it has had its share.
    bool is_even(int64_t num_threads) const {
        const int64_t most_blocks = (num_blocks + num_threads - 1) / num_threads;
        const int64_t longest = std::min(most_blocks * most_cost * num_threads,
                                         cost + most_cost * (num_threads - 1));
        return longest * 8 <= cost * 9;
    }

    // Behind the last of them a thread reads on where the first one ends: there lies what the same
    // adapter has for the next group of linears.
    void run_blocks(int64_t first, int64_t last) const {
        Blocks blocks(call), nexts(call);
        const void* behind = nullptr;
        for (int64_t number = first; number < last; ++number) {
            const Block block = blocks.at(number);
            if (number == first) behind = block.line.end(end_member());
            run_block(block, number + 1 < last ? nexts.at(number + 1).line.a() : behind);
        }
    }

    void run_block(const Block& block, const void* next) const {
        const Rows rows(call, block, next == block.line.a() ? nullptr : next);
        for (int64_t member = call.first_member; member < end_member(); ++member)
            if (block.count <= few_rows) rows.ask_for_outputs(member);
        if (call.x) rows.shrink(0, block.line.num_ranks());
        for (int64_t member = call.first_member; member < end_member(); ++member)
            if (block.line.rank(member)) rows.expand(member, 0, block.line.width(member));
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

// What lays out the pairs of a step, beside what it is told of them: see LayoutCall.
struct PairsLayout {
    Layout* layout;  // with room for all of them
    int64_t* group_of_slot;
    int64_t num_slots;
    int64_t per_slot;
};

extern "C" void lorax_lora_lay_out_pairs(const PairsMade* made) {
    const PairsLayout& own = *static_cast<const PairsLayout*>(made->own);
    const LayoutCall call{own.layout,    made->slots,  made->num_pairs, own.group_of_slot,
                          own.num_slots, made->tokens, made->experts,   own.per_slot};
    lorax_lora_lay_out(&call);
}

// What Python hands over with a matrix that shall lie in panels.
struct PackCall {
    const void* from;
    void* to;  // room for as many numbers
    int64_t type;
    int64_t num_ranks;
    int64_t width;
    int64_t to_rank, to_column;  // distances in `from`
};

extern "C" void lorax_lora_pack(const PackCall* call) {
    with_type(call->type, call->from, [&](auto* from) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(from)>> E;
        pack(from, static_cast<E*>(call->to), call->num_ranks, call->width, call->to_rank,
             call->to_column);
    });
}

// Called by all threads of a team; outside of one it computes alone.
extern "C" void lorax_lora_apply_team(const LoraCall* call) {
    Plan(*call).run(omp_get_num_threads());
}

// What adds to the product of a step's pairs: the group of one linear, and how they are laid out.
struct PairsAddition {
    const Table* table;
    const Layout* layout;
    const int64_t* columns;
};

// Called by all threads of a team.
extern "C" void lorax_lora_add_team(const ProductMade* made) {
    const PairsAddition& own = *static_cast<const PairsAddition*>(made->own);
    LoraCall call{own.table, own.layout, made->x, made->x_stride, made->y, made->y_stride};
    call.columns = own.columns;
    call.num_members = 1;
    call.x_rows = made->tokens;
    const Plan plan(call);
    // What can be found out before is, where threads wait for each other.
    plan.ask_for_first(omp_get_num_threads());
#pragma omp barrier
    plan.run(omp_get_num_threads());
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
