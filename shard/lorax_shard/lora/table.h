// What slots hold and which rows are theirs, as numbers that Python writes (host_rows.py).

#pragma once

#include <cstdint>
#include <cstring>

#include "../numbers/elements.h"

namespace {

// What is added to the type of a matrix that lies in panels.
constexpr int64_t in_panels = 8;

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
    // Where B of the last of some members ends that has one.
    const char* end(int64_t num_members) const {
        while (num_members > 1 && rank(num_members - 1) == 0) --num_members;
        const int64_t last = num_members - 1;
        const int64_t bytes = b_type(last) % in_panels == is_float32 ? 4 : 2;
        return static_cast<const char*>(b(last)) + rank(last) * width(last) * bytes;
    }
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

}  // namespace
