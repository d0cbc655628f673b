// A card's own limits, measured beside the kernels: benchmarks/gpu.py compiles and runs this file.
// Prints bytes copied and warp instructions issued, each per second.
#include <cstdio>
#include <cuda_runtime.h>

constexpr int kThreads = 256, kChains = 8, kRounds = 4096;

__global__ void copy(const uint4* from, uint4* to, size_t count) {
  const size_t step = (size_t)gridDim.x * blockDim.x;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    to[i] = from[i];
}

// Independent additions, which every arithmetic unit of a multiprocessor can begin in each cycle.
__global__ void issue(float* out, float seed) {
  float chains[kChains];
  for (int i = 0; i < kChains; i++) chains[i] = seed + (float)i;
  for (int round = 0; round < kRounds; round++)
#pragma unroll
    for (int i = 0; i < kChains; i++)
      asm volatile("add.rn.f32 %0, %0, %1;" : "+f"(chains[i]) : "f"(seed));
  float sum = 0;
  for (int i = 0; i < kChains; i++) sum += chains[i];
  if (sum == -1) *out = sum;  // never: the chains must be kept
}

template <class Run>
double seconds(Run run) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  float best = 1e30f;
  for (int i = 0; i < 10; i++) {
    cudaEventRecord(begin);
    run();
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float ms;
    cudaEventElapsedTime(&ms, begin, end);
    best = ms < best ? ms : best;
  }
  return 1e-3 * best;
}

int main() {
  cudaDeviceProp device;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  const size_t bytes = (size_t)1 << 31;
  uint4 *from, *to;
  cudaMalloc(&from, bytes);
  cudaMalloc(&to, bytes);
  cudaMemset(from, 1, bytes);
  const int blocks = 32 * device.multiProcessorCount;
  const double copying = seconds([&] { copy<<<blocks, kThreads>>>(from, to, bytes / 16); });
  const double issuing = seconds([&] { issue<<<blocks, kThreads>>>((float*)to, 1e-9f); });
  if (cudaDeviceSynchronize() != cudaSuccess) {
    fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
    return 1;
  }
  const double instructions = (double)blocks * (kThreads / 32) * kRounds * kChains;
  printf("{\"copy_bytes_per_s\": %.6e, \"warp_instructions_per_s\": %.6e}\n",
         2 * (double)bytes / copying, instructions / issuing);
}
