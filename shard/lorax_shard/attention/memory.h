// Memory that a thread keeps from call to call.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Numbers that begin at a cache line.
class Buffer {
   public:
    float* numbers(int64_t count) {
        if (static_cast<int64_t>(held.size()) < count + 16) held.resize(count + 16);
        const auto address = reinterpret_cast<uintptr_t>(held.data());
        return held.data() + (round_up(address, 64) - address) / sizeof(float);
    }

   private:
    std::vector<float> held;
};

// Hands out pieces of it, each of which begins at a cache line.
struct Pieces {
    float* at;
    float* take(int64_t count) { return std::exchange(at, at + round_up(count, 16)); }
};
