// See parallel.h. Compiled once, for every variant of the kernels.
#include "parallel.h"

#include <pthread.h>

namespace {

typedef void (*RunParallel)(void (*)(void*), void*, unsigned, unsigned);
typedef int (*Query)();

// GNU's entry point of a parallel region (LLVM's and Intel's runtimes have it, too) and the standard queries.
RunParallel run_parallel = nullptr;
Query thread_index = nullptr, thread_count = nullptr, in_parallel = nullptr;

// Where there is no runtime, or in a forked child: one thread, whatever the runtime's state says.
thread_local bool serial = true;

void forked() { run_parallel = nullptr; }

}  // namespace

extern "C" {

NPU_EXPORT void npu_use_openmp(void* run, void* index, void* count, void* nested) {
    thread_index = reinterpret_cast<Query>(index);
    thread_count = reinterpret_cast<Query>(count);
    in_parallel = reinterpret_cast<Query>(nested);
    pthread_atfork(nullptr, nullptr, forked);
    run_parallel = reinterpret_cast<RunParallel>(run);
}

void npu_run_on_threads(int64_t threads, void (*body)(void*), void* data) {
    if (run_parallel == nullptr || in_parallel()) {
        bool before = serial;
        serial = true;
        body(data);
        serial = before;
        return;
    }
    struct Call {
        void (*body)(void*);
        void* data;
    } call{body, data};
    run_parallel(
        [](void* opaque) {
            Call* c = static_cast<Call*>(opaque);
            serial = false;
            c->body(c->data);
            serial = true;
        },
        &call, static_cast<unsigned>(threads), 0);
}

void npu_thread(int64_t* index, int64_t* count) {
    *index = serial ? 0 : thread_index();
    *count = serial ? 1 : thread_count();
}
}
