// What one ISA offers: a function per op over one contiguous run of elements. Everything else
// (views, threads, dispatch) is written once, in cpu.cpp, parallel.cpp and dispatch.cpp.
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

// Of tree_attention: how keys and rows are taken together.
constexpr int kPanel = 16;  // keys side by side
constexpr int kRows = 6;    // queries

DLZO_INLINE int64_t padded(int64_t count) { return (count + kPanel - 1) / kPanel * kPanel; }

// Consecutive keys on a path: their first slot among the packed ones, a multiple of kPanel, and
// their place on the path.
struct Piece {
  int64_t slot, count, position;
};

// Vectors of consecutive tokens, `step` bytes apart.
struct Vectors {
  const char* first;
  int64_t step, count;
  DType dtype;
  __attribute__((always_inline)) const char* at(int64_t i) const { return first + i * step; }
};

// What a run of queries attends to. Packed keys lie in panels: of each kPanel slots the first
// channels, then the second ones, ...; packed values in rows of padded(value_size). A number takes
// a float's place, or a pair of numbers does.
struct Attention {
  const float *keys, *values;
  const Piece* path;
  int64_t pieces, head_size, value_size, window;
  float scale, softcap;  // no cap where it is 0
  DType dtype;           // of queries and results
};

struct Row {
  const char* query;
  char* out;
  int64_t position;  // on the path
};

// Of a row of U V^T: that of U, and the rows of V^T, `v_step` floats apart.
struct Factors {
  const float *u, *v;
  int64_t v_step, rank;
};

struct Kernels {
  void (*gaussian)(char* out, DType dtype, int64_t count, uint64_t index, Direction direction);
  void (*perturb)(char* out, DType out_dtype, const char* base, DType base_dtype, int64_t count,
                  uint64_t index, Direction direction, float scale);
  void (*round_into)(char* out, DType out_dtype, const char* base, int64_t count);
  bool (*is_rounded)(const char* out, DType out_dtype, const char* base, int64_t count);
  void (*add_low_rank)(char* out, DType out_dtype, const char* base, const Factors& factors,
                       int64_t count, float scale);
  // `known`: the bits of the largest |x| in earlier runs, -1 for none; raised where x has a larger
  // one. Of a maximum that is no larger the position is not sought.
  Moments (*moments)(const char* x, DType dtype, int64_t count, int32_t* known);
  // Adds rows of channels to moments of the `before` rows above them.
  void (*channel_moments)(const char* x, DType dtype, int64_t before, int64_t rows, int64_t step,
                          int channels, Moments* moments);
  void (*pack_keys)(float* keys, const Vectors& of, int64_t size);
  void (*pack_values)(float* values, const Vectors& of, int64_t size);
  void (*attend)(const Attention& attention, const Row* rows, int count, float* scratch);
  void (*rms_norm)(char* out, const char* x, const char* weight, DType dtype, int64_t size,
                   float eps);
};

namespace DLZO_ISA {
void gaussian(char*, DType, int64_t, uint64_t, Direction);
void perturb(char*, DType, const char*, DType, int64_t, uint64_t, Direction, float);
void round_into(char*, DType, const char*, int64_t);
bool is_rounded(const char*, DType, const char*, int64_t);
void add_low_rank(char*, DType, const char*, const Factors&, int64_t, float);
Moments moments(const char*, DType, int64_t, int32_t*);
void channel_moments(const char*, DType, int64_t, int64_t, int64_t, int, Moments*);
void pack_keys(float*, const Vectors&, int64_t);
void pack_values(float*, const Vectors&, int64_t);
void attend(const Attention&, const Row*, int, float*);
void rms_norm(char*, const char*, const char*, DType, int64_t, float);
extern const Kernels table;  // of all of these
}  // namespace DLZO_ISA

}  // namespace dlzo
