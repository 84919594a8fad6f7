// A list of kernels, computed by one team of threads; and what a model does between kernels that
// have rooms of their own. float32, on a CPU. Loaded by operations.py.
//
//   add     out = a + b
//   scale   out = a * factor
//   multiply out[i] = a[i] * b[i]
//   gather  out[i] = x[rows[i]]

#include <omp.h>

#ifdef __linux__
#include <sched.h>
#endif

#include <cstdint>
#include <cstring>

namespace {

typedef void Kernel(const int64_t* fields);

struct AddCall {
    const float *a, *b;
    float* out;
    int64_t size, num_threads;
};

struct ScaleCall {
    const float* a;
    float* out;
    double factor;
    int64_t size, num_threads;
};

// Rows that lie so many numbers apart; those of `out` follow each other.
struct MultiplyCall {
    const float* a;
    int64_t a_stride;
    const float* b;
    int64_t b_stride;
    float* out;
    int64_t num_rows, width, num_threads;
};

struct GatherCall {
    const float* x;
    int64_t stride;
    const int64_t* rows;
    float* out;
    int64_t num_rows, width, num_threads;
};

// Numbers that a thread takes at once.
constexpr int64_t chunk = 4096;

#ifdef __linux__
// Gives each thread of a team a core of its own where the team has as many threads as the caller
// may use cores. The threads wait for each other hundreds of times in a pass; where a core is
// wanted by others as well, the system wakes one thread behind another, and both wait for each
// other's turns. The caller's thread is its own again afterwards; the others do nothing else.
class Cores {
  public:
    explicit Cores(int64_t num_threads)
        : is_spread(num_threads > 1 && sched_getaffinity(0, sizeof all, &all) == 0 &&
                    CPU_COUNT(&all) == num_threads) {
        if (is_spread) set(core_of(0));
    }
    ~Cores() {
        if (is_spread) sched_setaffinity(0, sizeof all, &all);
    }
    // Called by each thread of the team.
    void take(int thread) const {
        if (!is_spread || thread == 0) return;
        static thread_local int own = -1;
        const int core = core_of(thread);
        if (own != core) set(own = core);
    }

  private:
    cpu_set_t all;
    const bool is_spread;

    int core_of(int thread) const {
        int core = -1;
        while (thread >= 0) thread -= CPU_ISSET(++core, &all) ? 1 : 0;
        return core;
    }
    static void set(int core) {
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        sched_setaffinity(0, sizeof one, &one);
    }
};
#else
class Cores {
  public:
    explicit Cores(int64_t) {}
    void take(int) const {}
};
#endif

}  // namespace

// Calls kernel i with the fields from starts[i] on; each has ended when the next begins. Those that
// are too small for several threads are computed by one, and wake nobody. What each took is added
// to seconds[i], unless that is null.
extern "C" void lorax_run(Kernel* const* kernels, const int64_t* starts, const int8_t* are_small,
                          int64_t num_kernels, const int64_t* fields, int64_t num_threads,
                          double* seconds) {
    const Cores cores(num_threads);
    double last = seconds ? omp_get_wtime() : 0.0;
    const auto note = [&](int64_t kernel) {
        const double now = omp_get_wtime();
        seconds[kernel] += now - last;
        last = now;
    };
    for (int64_t i = 0; i < num_kernels;) {
        if (are_small[i] || num_threads == 1) {
            kernels[i](fields + starts[i]);
            if (seconds) note(i);
            ++i;
            continue;
        }
        const int64_t first = i;
        while (i < num_kernels && !are_small[i]) ++i;
#pragma omp parallel num_threads(num_threads)
        {
            cores.take(omp_get_thread_num());
            for (int64_t k = first; k < i; ++k) {
                kernels[k](fields + starts[k]);
                if (seconds && omp_get_thread_num() == 0) note(k);
            }
        }
    }
}

extern "C" void lorax_add_team(const AddCall* packed) {
    const AddCall c = *packed;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < c.size; first += chunk) {
        const int64_t last = first + chunk < c.size ? first + chunk : c.size;
        for (int64_t i = first; i < last; ++i) c.out[i] = c.a[i] + c.b[i];
    }
}

extern "C" void lorax_add(const AddCall* packed) { lorax_add_team(packed); }

extern "C" void lorax_scale_team(const ScaleCall* packed) {
    const ScaleCall c = *packed;
    const float factor = static_cast<float>(c.factor);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < c.size; first += chunk) {
        const int64_t last = first + chunk < c.size ? first + chunk : c.size;
        for (int64_t i = first; i < last; ++i) c.out[i] = c.a[i] * factor;
    }
}

extern "C" void lorax_scale(const ScaleCall* packed) { lorax_scale_team(packed); }

extern "C" void lorax_multiply_team(const MultiplyCall* packed) {
    const MultiplyCall c = *packed;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < c.num_rows; ++row) {
        const float *a = c.a + row * c.a_stride, *b = c.b + row * c.b_stride;
        float* out = c.out + row * c.width;
        for (int64_t i = 0; i < c.width; ++i) out[i] = a[i] * b[i];
    }
}

extern "C" void lorax_multiply(const MultiplyCall* packed) { lorax_multiply_team(packed); }

extern "C" void lorax_gather_team(const GatherCall* packed) {
    const GatherCall c = *packed;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c.num_rows; ++i)
        std::memcpy(c.out + i * c.width, c.x + c.rows[i] * c.stride, c.width * sizeof(float));
}

extern "C" void lorax_gather(const GatherCall* packed) { lorax_gather_team(packed); }
