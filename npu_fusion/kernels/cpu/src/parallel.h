// Loops over threads, on the OpenMP runtime that torch has loaded into the process.
//
// These sources are compiled without OpenMP: linking a runtime here could bring a second one, with a second pool of
// threads that spin against torch's. ../_library.py looks the runtime's entry points up in torch's own libraries
// and hands them to npu_use_openmp; without them, and in a forked child (whose copy of the pool has no
// threads), everything runs on the calling thread.
#pragma once

#include <cstdint>

#include "isa.h"

extern "C" {
// Calls body(data) on up to `threads` threads and waits for them.
void npu_run_on_threads(int64_t threads, void (*body)(void*), void* data);
// Inside of such a body: which thread this is, of how many.
void npu_thread(int64_t* index, int64_t* count);
}

namespace npu {
namespace {

// fn(begin, end) over parts of 0..count, each of `grain` or more, on at most `threads` threads at once.
template <class Fn>
void parallel_for(int64_t count, int64_t threads, int64_t grain, const Fn& fn) {
    int64_t most = grain > 0 ? (count + grain - 1) / grain : count;
    if (threads > most) threads = most;
    if (threads <= 1) {
        if (count > 0) fn(int64_t{0}, count);
        return;
    }
    struct Work {
        const Fn* fn;
        int64_t count;
    } work{&fn, count};
    npu_run_on_threads(
        threads,
        [](void* data) {
            Work* w = static_cast<Work*>(data);
            int64_t index, threads_here;
            npu_thread(&index, &threads_here);
            int64_t begin = w->count * index / threads_here, end = w->count * (index + 1) / threads_here;
            if (begin < end) (*w->fn)(begin, end);
        },
        &work);
}

}  // namespace
}  // namespace npu
