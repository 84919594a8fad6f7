// Writes a step's K and V to their slots of a paged cache on a CPU, float32. Loaded by cpp.py.
//
// What is not finite is written as 0: a masked slot is multiplied by zero, and 0 x NaN is NaN.
// A token whose slot is -1 is not written.

#include <cmath>
#include <cstdint>

namespace {

struct Source {
    const float* data;  // tokens x heads x dim with strides for the first two
    int64_t token_stride, head_stride, dim;
    float* pool;  // slots x heads x dim
};

// What a call is told, as cpp.py packs it: eight bytes a field.
struct StoreCall {
    Source key, value;
    const int64_t* slots;
    int64_t num_slots, num_tokens, num_heads;
};

void store_token(const Source& source, int64_t token, int64_t slot, int64_t num_heads) {
    for (int64_t h = 0; h < num_heads; ++h) {
        const float* from = source.data + token * source.token_stride + h * source.head_stride;
        float* to = source.pool + (slot * num_heads + h) * source.dim;
        for (int64_t i = 0; i < source.dim; ++i) to[i] = std::isfinite(from[i]) ? from[i] : 0.0f;
    }
}

}  // namespace

// Called by all threads of a team. Slots were looked at before: there are no others.
extern "C" void lorax_store_team(const StoreCall* packed) {
    const StoreCall c = *packed;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < c.num_tokens; ++token) {
        const int64_t slot = c.slots[token];
        if (slot < 0 || slot >= c.num_slots) continue;
        store_token(c.key, token, slot, c.num_heads);
        store_token(c.value, token, slot, c.num_heads);
    }
}

// By one thread: the caches' lines are wanted by whoever attends next.
extern "C" void lorax_store(const StoreCall* packed) { lorax_store_team(packed); }
