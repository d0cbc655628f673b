// What the host tells a GPU kernel: plain structs and the plan of a launch; no CUDA in here, so
// that the plans are built, and tested, where there is none.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "both.h"
#include "dtype.h"
#include "moments.h"

namespace dlzo::gpu {

constexpr int kWarp = 32, kThreads = 256;  // threads of a warp, and of every block
constexpr int kGroup = 8;                  // consecutive elements that a thread handles at a time
constexpr int kTurns = 4;                  // groups of a thread
constexpr int kMaxParts = 36;  // matrices in one launch: a kernel's arguments are 4 kB at most

// A matrix: see dlzo_kernels/ops/_parts.py, which makes it.
struct Part {
  char* out;
  const char* base;
  int64_t rows, columns;
  int64_t out_row, out_column, base_row, base_column;  // distances in elements
  uint64_t offset;                                     // logical index of element (0, 0)
  int64_t row_stride;                                  // between rows, in logical indices
  uint32_t stream;
  uint32_t is_flat;  // one row, side by side in memory, whole groups at addresses divisible by 16
  int64_t first_block;
};

constexpr int kRounds = 10;  // of Philox

// The round keys of a seed.
struct Keys {
  uint32_t low[kRounds], high[kRounds];
};

// On the host, keys of a seed given by value are made once, and read as constants.
DLZO_BOTH Keys make_keys(uint64_t seed) {
  Keys keys;
  uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
  for (int r = 0; r < kRounds; r++, low += 0x9E3779B9u, high += 0xBB67AE85u) {
    keys.low[r] = low;
    keys.high[r] = high;
  }
  return keys;
}

// Groups that cover a row of this many columns, whatever the phase of its first logical index.
DLZO_BOTH int64_t groups_per_row(int64_t columns) {
  return (int64_t)(((uint64_t)columns + 2 * (kGroup - 1)) / kGroup);
}

// K directions of noise and their scales: in device memory where the pointers are not null, else
// one by value. Seeds and scales may come from different places.
struct Directions {
  const uint64_t* seeds;
  const uint32_t* queries;
  const float* scales;
  Keys keys;
  uint32_t query;
  float scale;
  int32_t count;
};

// The one argument of the kernels that make noise. Where `gate` is not null and *gate is zero, no
// direction is applied.
struct NoiseArguments {
  Part parts[kMaxParts];
  Directions directions;
  const int32_t* gate;
  int32_t count;  // parts in use
};
static_assert(sizeof(NoiseArguments) <= 4096, "a kernel takes 4 kB of arguments");

constexpr int64_t kRun = 16384;          // values of a row that one warp sums up
constexpr int64_t kColumnSegment = 256;  // rows of a channel that one thread sums up

// The one argument of the kernels of activation_stats, on a (rows, columns) matrix.
struct StatsArguments {
  const char* x;
  int64_t rows, columns;
  int64_t outputs, pieces;  // results; and partial moments of each, piece i of all before i + 1
  StatsOut out;
  Moments* partials;  // outputs * pieces of them, where there is more than one piece
};

// A kernel's name, its grid of blocks of kThreads, and the bytes of its one argument.
struct Launch {
  std::string kernel;
  int64_t blocks;
  std::string argument;
};

std::vector<Launch> gaussian(DType out, std::vector<Part> parts, const Directions& directions);

std::vector<Launch> perturb(DType out, DType base, std::vector<Part> parts,
                            const Directions& directions);

// `writes_out`: also out = round(base); without it `out` of the parts is not looked at.
std::vector<Launch> accumulate(DType out, DType base, bool writes_out, std::vector<Part> parts,
                               const Directions& directions, const int32_t* gate);

// Partial moments that activation_stats needs room for.
int64_t partials(int64_t rows, int64_t channels, Reduction reduction);

// `workspace` has room for them.
std::vector<Launch> activation_stats(const char* x, DType dtype, int64_t rows, int64_t channels,
                                     Reduction reduction, const StatsOut& out, Moments* workspace);

}  // namespace dlzo::gpu
