// What one ISA offers: a function per op over one contiguous run of elements. Everything else
// (views, threads, dispatch) is written once, in layout.h, parallel.cpp and dispatch.cpp.
#pragma once
#include <cstdint>

#include "moments.h"
#include "noise.h"
#include "storage.h"

namespace dlzo {

// Sizes that fix the order of summation of the statistics, on every ISA.
constexpr int kWidth = 32;                           // lanes summed side by side
constexpr int64_t kSegment = 16384;                  // values of a run about one pivot
constexpr int64_t kSegmentRows = kSegment / kWidth;  // rows of a tile of kWidth channels
constexpr int kTiles = 16;                           // tiles side by side, at most

struct Kernels {
  void (*gaussian)(char* out, DType dtype, int64_t count, uint64_t index, Direction direction);
  void (*perturb)(char* out, DType out_dtype, const char* base, DType base_dtype, int64_t count,
                  uint64_t index, Direction direction, float scale);
  void (*round_into)(char* out, DType out_dtype, const char* base, int64_t count);
  Moments (*moments)(const char* x, DType dtype, int64_t count);
  void (*channel_moments)(const char* x, DType dtype, int64_t rows, int64_t step, int channels,
                          Moments* result);
};

#define DLZO_DECLARE_ISA(isa)                                                          \
  namespace isa {                                                                      \
  void gaussian(char*, DType, int64_t, uint64_t, Direction);                           \
  void perturb(char*, DType, const char*, DType, int64_t, uint64_t, Direction, float); \
  void round_into(char*, DType, const char*, int64_t);                                 \
  Moments moments(const char*, DType, int64_t);                                        \
  void channel_moments(const char*, DType, int64_t, int64_t, int, Moments*);           \
  }
DLZO_DECLARE_ISA(baseline)
DLZO_DECLARE_ISA(avx2)
DLZO_DECLARE_ISA(avx512)
#undef DLZO_DECLARE_ISA

}  // namespace dlzo
