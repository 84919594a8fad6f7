// What functions of others are told by the kernels of experts.cpp, while they compute.

#pragma once

#include <cstdint>

// The pairs of a step, in their order: told once, by one thread.
struct PairsMade {
    const int64_t* tokens;
    const int64_t* experts;
    int64_t num_pairs;
    const int64_t* slots;  // of tokens
    const void* own;       // what the function knows of its own
};

// The product of a step's pairs: told to each thread of a team when it has made its part. All of it is
// there at the team's next barrier.
struct ProductMade {
    const float* x;
    int64_t x_stride;
    const int64_t* tokens;  // whose input is each pair's; null: row i of x is pair i's
    float* y;
    int64_t y_stride;
    const void* own;
};
