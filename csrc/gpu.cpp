// The plans of launches: which kernel, how many blocks, and the bytes of its argument.
#include "gpu.h"

#include <algorithm>

namespace dlzo::gpu {
namespace {

const char* name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

template <class Argument>
Launch make_launch(const std::string& kernel, int64_t blocks, const Argument& argument) {
  return {kernel, blocks, std::string(reinterpret_cast<const char*>(&argument), sizeof argument)};
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether groups of consecutive elements lie side by side from addresses divisible by 16.
bool is_flat(const char* data, DType dtype, int64_t column_step, const Part& part) {
  const auto phase = static_cast<int64_t>(part.offset % kGroup);
  const auto first =
      reinterpret_cast<uintptr_t>(data) - static_cast<uintptr_t>(phase * size_of(dtype));
  return part.rows == 1 && column_step == 1 && first % 16 == 0;
}

// A kernel over all parts, as many of them at a time as its argument holds.
std::vector<Launch> over_parts(const std::string& kernel, const std::vector<Part>& parts,
                               const Directions& directions, const int32_t* gate) {
  std::vector<Launch> launches;
  for (size_t begin = 0; begin < parts.size(); begin += kMaxParts) {
    NoiseArguments arguments = {};
    arguments.directions = directions;
    arguments.gate = gate;
    arguments.count = static_cast<int32_t>(std::min<size_t>(parts.size() - begin, kMaxParts));
    int64_t blocks = 0;
    for (int i = 0; i < arguments.count; i++) {
      Part& part = arguments.parts[i] = parts[begin + static_cast<size_t>(i)];
      part.first_block = blocks;
      blocks += ceil_divide(part.rows * groups_per_row(part.columns), kThreads * kTurns);
    }
    launches.push_back(make_launch(kernel, blocks, arguments));
  }
  return launches;
}

struct Cut {
  int64_t outputs, pieces;  // as in StatsArguments
};

Cut cut_of(int64_t rows, int64_t channels, Reduction reduction) {
  if (reduction == Reduction::kTensor) return {1, ceil_divide(rows * channels, kRun)};
  if (reduction == Reduction::kChannel) return {channels, ceil_divide(rows, kColumnSegment)};
  return {rows, ceil_divide(channels, kRun)};
}

}  // namespace

std::vector<Launch> gaussian(DType out, std::vector<Part> parts, const Directions& directions) {
  for (Part& part : parts) part.is_flat = is_flat(part.out, out, part.out_column, part);
  return over_parts(std::string("gaussian_") + name_of(out), parts, directions, nullptr);
}

std::vector<Launch> perturb(DType out, DType base, std::vector<Part> parts,
                            const Directions& directions) {
  for (Part& part : parts)
    part.is_flat = is_flat(part.out, out, part.out_column, part) &&
                   is_flat(part.base, base, part.base_column, part);
  const bool indirect = directions.seeds || directions.scales;
  return over_parts(
      std::string("perturb_") + name_of(out) + "_" + name_of(base) + (indirect ? "_indirect" : ""),
      parts, directions, nullptr);
}

std::vector<Launch> accumulate(DType out, DType base, bool writes_out, std::vector<Part> parts,
                               const Directions& directions, const int32_t* gate) {
  for (Part& part : parts)
    part.is_flat = is_flat(part.base, base, part.base_column, part) &&
                   (!writes_out || is_flat(part.out, out, part.out_column, part));
  return over_parts(std::string("accumulate_") + name_of(base) +
                        (writes_out ? std::string("_into_") + name_of(out) : ""),
                    parts, directions, gate);
}

int64_t partials(int64_t rows, int64_t channels, Reduction reduction) {
  const Cut cut = cut_of(rows, channels, reduction);
  return cut.pieces == 1 ? 0 : cut.outputs * cut.pieces;
}

std::vector<Launch> activation_stats(const char* x, DType dtype, int64_t rows, int64_t channels,
                                     Reduction reduction, const StatsOut& out, Moments* workspace) {
  const Cut cut = cut_of(rows, channels, reduction);
  StatsArguments arguments = {x, rows, channels, cut.outputs, cut.pieces, out, workspace};
  const bool columns = reduction == Reduction::kChannel;
  if (reduction == Reduction::kTensor) {
    arguments.rows = 1;
    arguments.columns = rows * channels;
  }
  const int64_t threads = arguments.outputs * arguments.pieces * (columns ? 1 : kWarp);
  const std::string kernel = std::string(columns ? "sum_columns_" : "sum_runs_") + name_of(dtype);
  std::vector<Launch> launches = {make_launch(kernel, ceil_divide(threads, kThreads), arguments)};
  if (arguments.pieces > 1)
    launches.push_back(make_launch("combine_partials", arguments.outputs, arguments));
  return launches;
}

}  // namespace dlzo::gpu
