// The machine's own limits, measured beside the kernels: benchmarks/kernels.py compiles this file.
#include <stddef.h>
#include <stdint.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Core cycles per second: a chain of additions, of one cycle each.
double clock_hz(void) {
  const long count = 50000000;
  const double start = now();
  uint64_t x = 0;
  for (long i = 0; i < count; i += 10)
    for (int j = 0; j < 10; j++) __asm__ volatile("add $1, %0" : "+r"(x));
  return (double)count / (now() - start);
}

// Reads `bytes` bytes, a multiple of 512, and gives what they add up to.
uint64_t read_all(const void* data, size_t bytes, int threads) {
  typedef uint64_t Vector __attribute__((vector_size(64)));
  const Vector* v = (const Vector*)data;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int part = 0; part < threads; part++) {
    Vector sum[8] = {{0}};
    const size_t groups = bytes / 512, end = groups * (size_t)(part + 1) / (size_t)threads;
    for (size_t g = groups * (size_t)part / (size_t)threads; g < end; g++)
      for (int j = 0; j < 8; j++) sum[j] += v[8 * g + (size_t)j];
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < 8; k++) total += sum[j][k];
  }
  return total;
}

// Work on any OpenMP runtime, by its entry points.
struct Work {
  float* x;
  size_t count;
  int threads;
  int (*thread_number)(void);
};

static void scale_part(void* argument) {
  const struct Work* work = argument;
  const size_t part = (size_t)work->thread_number(), parts = (size_t)work->threads;
  for (size_t i = work->count * part / parts; i < work->count * (part + 1) / parts; i++)
    for (int j = 0; j < 16; j++) work->x[i] = work->x[i] * 0.999f + 0.001f;
}

void scale_on_pool(float* x, size_t count, int threads,
                   void (*parallel)(void (*)(void*), void*, unsigned, unsigned),
                   int (*thread_number)(void)) {
  struct Work work = {x, count, threads, thread_number};
  parallel(scale_part, &work, (unsigned)threads, 0);
}
