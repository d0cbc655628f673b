// The CPU column: each op over a whole view, on several threads, with the kernels of one ISA.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dlzo {

// A tensor's elements in row-major order, wherever they lie in memory.
struct View {
  char* data;
  DType dtype;
  std::vector<int64_t> strides;  // in elements, one per dimension of the shape
};

// How the elements are numbered: element (i, j) of the shape, seen as rows of the last dimension,
// has the logical index offset + i * row_stride + j.
struct Numbering {
  std::vector<int64_t> shape;
  uint64_t offset;
  int64_t row_stride;
};

void gaussian(const View& out, const Numbering& numbering, Direction direction, int threads);

// Scales are rounded to float32 where subnormals are kept (parallel.h): a caller may flush them.
void perturb(const View& out, const View& base, const Numbering& numbering, Direction direction,
             double scale, int threads);

// base += scales[k] * z(directions[k]) in order; then out = round(base) where out.data is not null.
void accumulate(const View& out, const View& base, const Numbering& numbering,
                const std::vector<Direction>& directions, const std::vector<double>& scales,
                int threads);

// Whether `count` values of out are the bits of round(master).
bool is_rounded(const char* out, DType out_dtype, const char* master, int64_t count, int threads);

// out = round(master + scale * U V^T) of a (rows, columns) matrix: `u` has `rank` numbers for each
// row side by side, `v` `columns` for each of V^T; out may be the master.
void add_low_rank(const View& out, const View& master, const std::vector<int64_t>& shape,
                  const float* u, const float* v, int64_t rank, double scale, int threads);

// Statistics of a contiguous (rows, channels) matrix: over all of it, or along one side; `out` has
// arrays of length 1, `channels` or `rows`.
void activation_stats(const char* x, DType dtype, int64_t rows, int64_t channels,
                      Reduction reduction, const StatsOut& out, int threads);

struct AttentionSizes {
  int64_t batch, heads, key_heads, tokens, head_size, value_size;
};

// Views of shape (batch, heads, tokens, size), with the last dimension's elements side by side.
void tree_attention(const View& query, const View& key, const View& value, const View& out,
                    const int64_t* parents, const AttentionSizes& sizes, float scale,
                    int64_t window, float softcap, int threads);

// Each row of a contiguous (rows, size) matrix by itself; `weight` has `size` values.
void rms_norm(char* out, const char* x, const char* weight, DType dtype, int64_t rows, int64_t size,
              float eps, int threads);

}  // namespace dlzo
