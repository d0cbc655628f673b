// How a kernel is declared: its one argument, and the name under which the host launches it.
#pragma once
#include "gpu.h"

#define DLZO_DEVICE static __device__ __forceinline__

namespace dlzo::gpu {

// An entry of the table of kernels (cuda.cu).
struct Kernel {
  Kernel(const char* name, const void* function);
};

}  // namespace dlzo::gpu

// Used inside the namespace; the name has C linkage.
#define DLZO_KERNEL(name, Argument, ...)                 \
  extern "C" __global__ void __launch_bounds__(kThreads) \
      name(const __grid_constant__ Argument arguments) { \
    __VA_ARGS__(arguments);                              \
  }                                                      \
  static const Kernel name##_entry(#name, reinterpret_cast<const void*>(&name));
