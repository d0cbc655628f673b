// Launches kernels by name.
#include "cuda.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <unordered_map>

#include "kernel.cuh"

namespace dlzo::gpu {
namespace {

std::unordered_map<std::string, const void*>& kernels() {
  static std::unordered_map<std::string, const void*> table;
  return table;
}

void check(cudaError_t error, const std::string& doing) {
  if (error != cudaSuccess) throw std::runtime_error(doing + ": " + cudaGetErrorString(error));
}

}  // namespace

Kernel::Kernel(const char* name, const void* function) { kernels()[name] = function; }

void launch(const std::vector<Launch>& launches, void* stream) {
  for (const Launch& launch : launches) {
    void* arguments[] = {const_cast<char*>(launch.argument.data())};
    check(cudaLaunchKernel(kernels().at(launch.kernel), dim3(static_cast<unsigned>(launch.blocks)),
                           dim3(kThreads), arguments, 0, static_cast<cudaStream_t>(stream)),
          "launching " + launch.kernel);
  }
}

std::string why_no_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();  // an error that stays would surface in somebody else's call
  if (error == cudaSuccess && count > 0) return "";
  return std::string("no CUDA device (") +
         (error == cudaSuccess ? "none is visible" : cudaGetErrorString(error)) + ")";
}

}  // namespace dlzo::gpu
