#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dlzo {
namespace {

// A second OpenMP runtime would spin against torch's on the same cores, so this library links none
// and borrows the one that torch loaded: libgomp, libomp and libiomp5 all export this entry.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpThreadNumber = int (*)();

template <class Function>
Function find(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

struct Pool {
  GompParallel parallel = find<GompParallel>("GOMP_parallel");
  OmpThreadNumber thread_number = find<OmpThreadNumber>("omp_get_thread_num");
  OmpThreadNumber team_size = find<OmpThreadNumber>("omp_get_num_threads");
  bool found() const { return parallel && thread_number && team_size; }
};

const Pool& pool() {
  static const Pool instance;
  return instance;
}

// torch.set_flush_denormal changes a thread's arithmetic; the contract's bits need the default.
class DefaultRounding {
#if defined(__x86_64__)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultRounding() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~DefaultRounding() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

struct Job {
  int64_t count;
  const std::function<void(int64_t, int64_t)>& body;

  void run_part(int part, int parts) const {
    const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    if (begin == end) return;
    const DefaultRounding guard;
    body(begin, end);
  }
};

void run_openmp_part(void* job) {
  static_cast<const Job*>(job)->run_part(pool().thread_number(), pool().team_size());
}

}  // namespace

const char* thread_pool() { return pool().found() ? "openmp" : "threads"; }

void parallel_for(int64_t count, int64_t grain, int threads,
                  const std::function<void(int64_t, int64_t)>& body) {
  Job job{count, body};
  const int parts = static_cast<int>(std::min<int64_t>(threads, count / grain));
  if (parts <= 1) return job.run_part(0, 1);
  if (pool().found())
    return pool().parallel(run_openmp_part, &job, static_cast<unsigned>(parts), 0);
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(parts));
  int part = 1;
  try {
    for (; part < parts; part++)
      workers.emplace_back([&job, part, parts] { job.run_part(part, parts); });
  } catch (const std::system_error&) {  // there are no more threads to be had
  }
  job.run_part(0, parts);
  for (; part < parts; part++) job.run_part(part, parts);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace dlzo
