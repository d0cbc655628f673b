// activation_stats on a GPU: see activation_stats.cpp for the method. A row is cut into runs of
// kRun values, each one warp's, a column into segments of kColumnSegment values, each one thread's;
// a second launch combines their moments in float64. No order depends on the timing of a run.
//
// In a run, value s * 256 + p belongs to position p, whose power sums run in float32 over at most
// 64 values; the 256 positions then add up in float64 by a tree of neighbours.
//
//   error    each power sum within (64 + 8) 2^-24 of the sum of its absolute terms
//   bytes    the size of the storage type per element, read once
#include "storage.cuh"

namespace dlzo::gpu {

constexpr int kPositions = kWarp * kGroup;
constexpr int kBlock = 64;      // terms summed in float32
constexpr int kPivotRows = 16;  // rows of a channel whose mean is its first pivot
constexpr uint32_t kNanKey = 0x7f800001u;

// |x| as an integer that orders as the values do; all NaNs are the same, above infinity.
DLZO_DEVICE uint32_t magnitude(float value) {
  return min(__float_as_uint(value) & 0x7fffffffu, kNanKey);
}

DLZO_DEVICE bool is_finite(float value) { return magnitude(value) < 0x7f800000u; }

// Power sums about a pivot of scaled values, and the largest |x|.
struct Sums {
  double s[4];
  uint32_t largest;
  int64_t position;
};

// Power sums in float32: of one position, or of one channel.
struct Terms {
  float s[4] = {0, 0, 0, 0};

  __device__ __forceinline__ void add(float value, float pivot, float scale) {
    const float d = __fsub_rn(__fmul_rn(value, scale), pivot), square = __fmul_rn(d, d);
    s[0] = __fadd_rn(s[0], d);
    s[1] = __fadd_rn(s[1], square);
    s[2] = __fmaf_rn(square, d, s[2]);
    s[3] = __fmaf_rn(square, square, s[3]);
  }
};

// Sums a second and a third time where the first scale and pivot turn out to be poor.
// `sweep(pivot, scale)` returns Sums over `count` values.
template <class Sweep>
DLZO_DEVICE Moments moments_of(int64_t count, float pivot, Sweep sweep) {
  const double n = (double)count;
  double scale = 1;
  bool is_scaled = false, is_centred = false;
  if (!is_finite(pivot)) pivot = 0;
  Sums sums;
#pragma unroll 1
  while (true) {
    sums = sweep(pivot, (float)scale);
    if (!is_scaled) {
      is_scaled = true;
      scale = fmin(scale_for(__uint_as_float(sums.largest)), 0x1p127);  // a float32
      if (scale != 1) {
        pivot = 0;
        continue;
      }
    }
    if (is_centred || !is_poor(n, sums.s)) break;
    is_centred = true;
    pivot = (float)(pivot + sums.s[0] / n);
  }
  Moments moments = central(count, sums.s, pivot);
  if (scale != 1) moments = rescale(moments, 1 / scale);
  moments.argmax = sums.position;
  moments.absmax = __uint_as_float(sums.largest == kNanKey ? 0x7fc00000u : sums.largest);
  return moments;
}

// The sum over all positions of a warp, each lane holding kGroup neighbours; in all lanes.
template <class Number>
DLZO_DEVICE Number sum_positions(const Number (&x)[kGroup]) {
  Number sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// A run in memory, read by one warp.
template <DType dtype>
struct Run {
  const typename Storage<dtype>::Type* x;
  int count;
  bool aligned;
  int lane;

  // This lane's values of a step; returns how many of them exist.
  __device__ __forceinline__ int load(int step, float (&values)[kGroup]) const {
    const int first = step * kPositions + lane * kGroup, left = count - first;
    Group group = {};
    group.end = left < kGroup ? left : kGroup;
    group.whole = aligned && group.end == kGroup;
    load_group<dtype, true>(reinterpret_cast<const char*>(x + first), 1, group, values);
    return group.end;
  }

  __device__ __forceinline__ float first_pivot() const {
    float values[kGroup];
    const int present = load(0, values);
    const float first = __shfl_sync(~0u, values[0], 0);
#pragma unroll
    for (int i = 0; i < kGroup; i++) values[i] = i < present ? __fsub_rn(values[i], first) : 0;
    const float terms = (float)(count < kPositions ? count : kPositions);
    return __fadd_rn(first, __fdiv_rn(sum_positions(values), terms));
  }

  __device__ Sums sweep(float pivot, float scale) const {
    Terms terms[kGroup];
    uint32_t largest = 0;
    int position = lane * kGroup < count ? lane * kGroup : INT32_MAX;
    const auto add = [&](int i, float value, int step) {
      terms[i].add(value, pivot, scale);
      const uint32_t key = magnitude(value);
      if (key > largest) {
        largest = key;
        position = step * kPositions + lane * kGroup + i;
      }
    };
    const int whole_steps = count / kPositions;
    float values[kGroup];
#pragma unroll 1
    for (int step = 0; step < whole_steps; step++) {
      load(step, values);
#pragma unroll
      for (int i = 0; i < kGroup; i++) add(i, values[i], step);
    }
    if (whole_steps * kPositions < count) {
      const int present = load(whole_steps, values);
#pragma unroll
      for (int i = 0; i < kGroup; i++)
        if (i < present) add(i, values[i], whole_steps);
    }
    Sums sums;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      double all[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; i++) all[i] = (double)terms[i].s[k];
      sums.s[k] = sum_positions(all);
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t other = __shfl_xor_sync(~0u, largest, step);
      const int place = __shfl_xor_sync(~0u, position, step);
      if (other > largest || (other == largest && place < position)) {
        largest = other;
        position = place;
      }
    }
    sums.largest = largest;
    sums.position = position;
    return sums;
  }
};

// Moments of the runs of all rows: one warp each.
template <DType dtype>
DLZO_DEVICE void sum_runs(const StatsArguments& arguments) {
  using Type = typename Storage<dtype>::Type;
  const int64_t number = (int64_t)blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (number >= arguments.outputs * arguments.pieces) return;
  const int64_t row = number / arguments.pieces, begin = number % arguments.pieces * kRun;
  const Type* x = reinterpret_cast<const Type*>(arguments.x) + row * arguments.columns + begin;
  const int64_t left = arguments.columns - begin;
  const Run<dtype> run = {x, (int)(left < kRun ? left : kRun),
                          reinterpret_cast<uintptr_t>(x) % 16 == 0, (int)(threadIdx.x % kWarp)};
  Moments moments = moments_of(run.count, run.first_pivot(),
                               [&](float pivot, float scale) { return run.sweep(pivot, scale); });
  moments.argmax += begin;
  if (run.lane != 0) return;
  if (arguments.pieces == 1) write(arguments.out, row, moments);
  else arguments.partials[number] = moments;
}

// A channel's values in a segment of rows, `step` apart, read by one thread.
template <DType dtype>
struct Column {
  const typename Storage<dtype>::Type* x;
  int64_t step;
  int count;

  __device__ __forceinline__ float value(int row) const {
    return Storage<dtype>::load(x[row * step]);
  }

  __device__ __forceinline__ float first_pivot() const {
    const int rows = count < kPivotRows ? count : kPivotRows;
    const float first = value(0);
    float sum = 0;
    for (int row = 1; row < rows; row++) sum = __fadd_rn(sum, __fsub_rn(value(row), first));
    return __fadd_rn(first, __fdiv_rn(sum, (float)rows));
  }

  __device__ Sums sweep(float pivot, float scale) const {
    Sums sums = {{0, 0, 0, 0}, 0, 0};
    for (int begin = 0; begin < count; begin += kBlock) {
      Terms terms;
      const int end = count - begin < kBlock ? count : begin + kBlock;
#pragma unroll 8
      for (int row = begin; row < end; row++) {
        const float x = value(row);
        terms.add(x, pivot, scale);
        const uint32_t key = magnitude(x);
        if (key > sums.largest) {
          sums.largest = key;
          sums.position = row;
        }
      }
#pragma unroll
      for (int k = 0; k < 4; k++) sums.s[k] += (double)terms.s[k];
    }
    return sums;
  }
};

// Moments of the segments of all channels: one thread each.
template <DType dtype>
DLZO_DEVICE void sum_columns(const StatsArguments& arguments) {
  using Type = typename Storage<dtype>::Type;
  const int64_t number = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (number >= arguments.outputs * arguments.pieces) return;
  const int64_t channel = number % arguments.columns;
  const int64_t begin = number / arguments.columns * kColumnSegment;
  const int64_t left = arguments.rows - begin;
  const Column<dtype> column = {
      reinterpret_cast<const Type*>(arguments.x) + begin * arguments.columns + channel,
      arguments.columns, (int)(left < kColumnSegment ? left : kColumnSegment)};
  Moments moments = moments_of(column.count, column.first_pivot(), [&](float pivot, float scale) {
    return column.sweep(pivot, scale);
  });
  moments.argmax += begin;
  if (arguments.pieces == 1) write(arguments.out, channel, moments);
  else arguments.partials[channel * arguments.pieces + number / arguments.columns] = moments;
}

// The partial moments of one output, a block's: piece i at position i % kThreads, in order, and the
// positions by a tree of neighbours.
DLZO_DEVICE void combine_pieces(const StatsArguments& arguments) {
  __shared__ Moments positions[kThreads];
  const int position = (int)threadIdx.x;
  const Moments* pieces = arguments.partials + blockIdx.x * arguments.pieces;
  Moments sum = {};
  for (int64_t i = position; i < arguments.pieces; i += kThreads) sum = combine(sum, pieces[i], 0);
  positions[position] = sum;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    if (position % (2 * step) != 0 || positions[position + step].count == 0) continue;
    positions[position] = combine(positions[position], positions[position + step], 0);
  }
  if (position == 0) write(arguments.out, blockIdx.x, positions[0]);
}

DLZO_KERNEL(sum_runs_float32, StatsArguments, sum_runs<DType::kFloat32>)
DLZO_KERNEL(sum_runs_bfloat16, StatsArguments, sum_runs<DType::kBFloat16>)
DLZO_KERNEL(sum_runs_float16, StatsArguments, sum_runs<DType::kFloat16>)
DLZO_KERNEL(sum_columns_float32, StatsArguments, sum_columns<DType::kFloat32>)
DLZO_KERNEL(sum_columns_bfloat16, StatsArguments, sum_columns<DType::kBFloat16>)
DLZO_KERNEL(sum_columns_float16, StatsArguments, sum_columns<DType::kFloat16>)
DLZO_KERNEL(combine_partials, StatsArguments, combine_pieces)

}  // namespace dlzo::gpu
