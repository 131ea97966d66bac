// Splitting work over threads. The caller passes the number of threads with every call, so that
// torch.set_num_threads holds here too; with OpenMP the threads are torch's own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace FB_NAMESPACE {

// One compiled copy of each body, wherever it is called from: inlined twice it may be vectorized in
// two ways, and the number of threads would decide the last bit.
template <class Body>
#if defined(__GNUC__)
__attribute__((noinline))
#endif
static void run_part(const Body& body, int64_t begin, int64_t end, int thread) {
  body(begin, end, thread);
}

// Calls body(begin, end, thread) on equal parts of [0, count), none smaller than `grain`.
template <class Body>
static inline void parallel(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  int64_t parts = std::min<int64_t>(threads, (count + grain - 1) / std::max<int64_t>(grain, 1));
#ifdef _OPENMP
  if (parts > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(static_cast<int>(parts))
    {
      // fewer threads may have been granted than asked for
      int64_t given = omp_get_num_threads(), mine = omp_get_thread_num();
      int64_t begin = count * mine / given, end = count * (mine + 1) / given;
      if (begin < end) run_part(body, begin, end, static_cast<int>(mine));
    }
    return;
  }
#endif
  run_part(body, 0, count, 0);
}

// Calls body(unit, thread) for each of [0, count). A thread takes the next unit when it is done with
// one, so that a core that others slow down does less.
template <class Body>
static inline void share(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel(std::min<int64_t>(threads, count), 1, threads, [&](int64_t, int64_t, int thread) {
    for (int64_t unit = next++; unit < count; unit = next++) body(unit, thread);
  });
}

}  // namespace FB_NAMESPACE
