// Threads: one loop over a range, on torch's own OpenMP pool where there is one.
#pragma once
#include <cstdint>
#include <functional>

namespace dlzo {

// Calls body(begin, end) on disjoint parts that cover [0, count), on at most `threads` threads and
// no more than count / grain of them. Subnormals are kept in every part, whatever the caller set.
void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body);

// "openmp" (torch's pool) or "threads" (started for each call).
const char* thread_pool();

}  // namespace dlzo
