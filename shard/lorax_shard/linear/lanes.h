// Registers of float32, and the rows and columns of a weight's panel that are computed in them.

#pragma once

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

inline const Lanes& lanes_at(const float* at) { return *reinterpret_cast<const Lanes*>(at); }
inline Lanes& lanes_at(float* at) { return *reinterpret_cast<Lanes*>(at); }

}  // namespace
