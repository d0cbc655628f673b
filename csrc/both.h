// What a function is marked with that the host and a GPU share.
#pragma once

#if defined(__CUDACC__)
#define DLZO_BOTH static __host__ __device__ __forceinline__
#else
#define DLZO_BOTH static inline __attribute__((always_inline))
#endif
