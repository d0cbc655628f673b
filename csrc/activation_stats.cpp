// activation_stats: |x| maximum with its first position, and central moments up to the fourth.
//
// A segment of values is read from memory once. Sums of d, d^2, d^3, d^4 with d = x - pivot run in
// float32 over at most kBlock terms per lane, then in float64. The pivot is the mean of the first
// values; where the mean turns out to lie more than half a standard deviation away, the segment,
// still in cache, is summed again about that mean. Segments combine in float64 (moments.h).
//
//   error    each power sum within (kBlock + 8) 2^-24 of the sum of its absolute terms
//   bytes    the size of the storage type per element, read once
//
// The 32 lanes and every order of summation are fixed: the bits do not depend on the ISA.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

constexpr int kPairs = kWidth / (2 * kLanes);  // pairs of vectors that hold them
constexpr int kBlock = 32;                     // terms per lane summed in float32
constexpr int kPivotRows = 16;                 // rows of a channel whose mean is its pivot
constexpr float kLargest = 0x1p30f, kSmallest = 0x1p-20f;  // beyond these fourth powers overflow

// Largest |x| by its bits, which order as the values do, a NaN above infinity.
template <int64_t size>
struct Magnitude {
  using Int = int32_t;
  static constexpr int kVectors = 2;
  static constexpr Int kMask = 0x7fffffff;
};
template <>
struct Magnitude<2> {
  using Int = int16_t;
  static constexpr int kVectors = 1;
  static constexpr Int kMask = 0x7fff;
};

struct LaneSums {
  double s[4][kWidth];
  int32_t largest[kWidth];  // bits of the largest |x|
  int32_t row[kWidth];      // and the first row that holds it
};

// A pair of vectors in whatever order is cheapest, and which element each lane then holds.
template <DType dtype>
DLZO_INLINE Pair load_any_order(const char* x) {
  if constexpr (dtype == DType::kBFloat16) {
    const U32 both = load<U32>(x);
    return {{bits<F32>(both << 16), bits<F32>(both & 0xffff0000u)}};
  }
  return load_pair<dtype>(x);
}
template <DType dtype>
DLZO_INLINE constexpr int element_of(int vector, int lane) {
  return dtype == DType::kBFloat16 ? 2 * lane + vector : vector * kLanes + lane;
}

// The first `count` of kWidth values at x as float32, in order; the rest are zero.
template <DType dtype>
DLZO_INLINE void to_float32(const char* x, int64_t count, float* values) {
  alignas(64) char stage[kWidth * 4] = {};
  memcpy(stage, x, (size_t)(count * size_of(dtype)));
  for (int p = 0; p < kPairs; p++) {
    const Pair pair = load_pair<dtype>(stage + p * 2 * kLanes * size_of(dtype));
    for (int i = 0; i < 2; i++) store(values + (2 * p + i) * kLanes, pair.v[i]);
  }
}

// Power sums of `rows` rows of kWidth values, `step` bytes apart, each lane about its own pivot.
template <DType dtype>
static LaneSums sweep(const char* x, int64_t rows, int64_t step, const float (&pivot)[kWidth]) {
  using M = Magnitude<size_of(dtype)>;
  using Int = typename M::Int;
  typedef Int Bits __attribute__((vector_size(4 * kLanes)));
  constexpr int kBitsLanes = sizeof(Bits) / sizeof(Int);
  LaneSums sums = {};
  for (int p = 0; p < kPairs; p++) {
    const int first = p * 2 * kLanes;  // element of the pair's lane 0
    F32 centre[2];
    for (int i = 0; i < 2; i++)
      for (int lane = 0; lane < kLanes; lane++)
        centre[i][lane] = pivot[first + element_of<dtype>(i, lane)];
    double total[4][2][kLanes] = {};
    Bits largest[M::kVectors], row[M::kVectors] = {};
    for (int i = 0; i < M::kVectors; i++) largest[i] = Bits{} - (Int)1;  // below the bits of zero
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t end = begin + kBlock < rows ? begin + kBlock : rows;
      F32 s[4][2] = {};
      for (int64_t r = begin; r < end; r++) {
        const char* at = x + r * step + first * size_of(dtype);
        __builtin_prefetch(at + kPivotRows * step);  // a stride of rows is beyond the hardware's
        const Pair value = load_any_order<dtype>(at);
        for (int i = 0; i < 2; i++) {
          const F32 d = value.v[i] - centre[i], square = d * d;
          s[0][i] += d;
          s[1][i] += square;
          s[2][i] = fused_multiply_add(square, d, s[2][i]);
          s[3][i] = fused_multiply_add(square, square, s[3][i]);
        }
        for (int i = 0; i < M::kVectors; i++) {
          const Bits magnitude = load<Bits>(at + i * (int64_t)sizeof(Bits)) & M::kMask;
          const auto larger = magnitude > largest[i];
          largest[i] = larger ? magnitude : largest[i];
          row[i] = larger ? Bits{} + (Int)r : row[i];
        }
      }
      for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2; i++)
          for (int lane = 0; lane < kLanes; lane++) total[k][i][lane] += (double)s[k][i][lane];
    }
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < 2; i++)
        for (int lane = 0; lane < kLanes; lane++)
          sums.s[k][first + element_of<dtype>(i, lane)] = total[k][i][lane];
    for (int i = 0; i < M::kVectors; i++)
      for (int lane = 0; lane < kBitsLanes; lane++) {
        sums.largest[first + i * kBitsLanes + lane] = largest[i][lane];
        sums.row[first + i * kBitsLanes + lane] = row[i][lane];
      }
  }
  return sums;
}

// Whether d about the pivot loses digits: its mean is more than half a standard deviation off.
DLZO_INLINE bool is_poor(double count, const double (&s)[4]) {
  return 5 * s[0] * s[0] > count * s[1];
}

// The power of two that brings |x| up to `largest` near 1, or 1 where the powers fit as they are.
DLZO_INLINE double scale_for(float largest) {
  const bool fits = largest >= kSmallest && largest <= kLargest;
  if (fits || largest == 0 || !(largest <= 0x1.fffffep127f)) return 1;
  int exponent;
  (void)__builtin_frexp((double)largest, &exponent);
  return __builtin_ldexp(1.0, -exponent);
}

// About the mean of the first values, which a constant segment equals exactly.
DLZO_INLINE float first_pivot(const float* values, int64_t count, int64_t step) {
  double sum = 0;
  for (int64_t i = 1; i < count; i++) sum += (double)values[i * step] - (double)values[0];
  return (float)(values[0] + sum / (double)count);
}

// The sums of a run of `count` values about one pivot, its lanes added up in order.
template <DType dtype>
static void run_sums(const char* x, int64_t count, float pivot, double (&s)[4], int64_t* argmax) {
  float pivots[kWidth];
  for (int lane = 0; lane < kWidth; lane++) pivots[lane] = pivot;
  const int64_t rows = count / kWidth, tail = count % kWidth;
  alignas(64) char stage[kWidth * 4] = {};
  memcpy(stage, x + rows * kWidth * size_of(dtype), (size_t)(tail * size_of(dtype)));
  const LaneSums parts[2] = {sweep<dtype>(x, rows, kWidth * size_of(dtype), pivots),
                             sweep<dtype>(stage, 1, 0, pivots)};
  int32_t largest = -1;
  for (int k = 0; k < 4; k++) s[k] = 0;
  for (int part = 0; part < 2; part++)
    for (int lane = 0; lane < (part == 0 ? kWidth : tail); lane++) {
      for (int k = 0; k < 4; k++) s[k] += parts[part].s[k][lane];
      const int64_t at = (parts[part].row[lane] + part * rows) * kWidth + lane;
      const int32_t magnitude = parts[part].largest[lane];
      if (magnitude > largest || (magnitude == largest && at < *argmax)) {
        largest = magnitude;
        *argmax = at;
      }
    }
}

template <DType dtype>
static Moments run_moments(const char* x, int64_t count) {
  double s[4];
  int64_t argmax = 0;
  float values[kWidth];
  const int64_t first = count < kWidth ? count : kWidth;
  to_float32<dtype>(x, first, values);
  float pivot = first_pivot(values, first, 1);
  run_sums<dtype>(x, count, pivot, s, &argmax);
  to_float32<dtype>(x + argmax * size_of(dtype), 1, values);
  const float absmax = __builtin_fabsf(values[0]);
  const double scale = scale_for(absmax);
  Moments result;
  if (scale != 1) {
    alignas(64) float scaled[kSegment + kWidth];
    for (int64_t i = 0; i < count; i += kWidth) {
      to_float32<dtype>(x + i * size_of(dtype), count - i < kWidth ? count - i : kWidth,
                        scaled + i);
      for (int lane = 0; lane < kWidth; lane++)
        scaled[i + lane] = (float)(scaled[i + lane] * scale);
    }
    const Moments moments = run_moments<DType::kFloat32>((const char*)scaled, count);
    result = rescale(moments, 1 / scale);
  } else {
    if (is_poor((double)count, s)) {
      pivot = (float)(pivot + s[0] / (double)count);
      run_sums<dtype>(x, count, pivot, s, &argmax);
    }
    result = central(count, s, pivot);
  }
  result.argmax = argmax;
  result.absmax = absmax;
  return result;
}

// kWidth channels (or the `width` that there are) over at most kSegmentRows rows.
template <DType dtype>
static void tile_moments(const char* x, int64_t rows, int64_t step, int width, Moments* result) {
  alignas(64) char stage[kSegmentRows * kWidth * 4];
  if (width < kWidth) {
    memset(stage, 0, sizeof stage);
    for (int64_t r = 0; r < rows; r++)
      memcpy(stage + r * kWidth * size_of(dtype), x + r * step, (size_t)(width * size_of(dtype)));
    x = stage, step = kWidth * size_of(dtype);
  }
  const int64_t first = rows < kPivotRows ? rows : kPivotRows;
  float values[kPivotRows][kWidth], pivots[kWidth];
  for (int64_t r = 0; r < first; r++) to_float32<dtype>(x + r * step, kWidth, values[r]);
  for (int lane = 0; lane < kWidth; lane++)
    pivots[lane] = first_pivot(&values[0][lane], first, kWidth);
  LaneSums sums = sweep<dtype>(x, rows, step, pivots);
  bool again = false;
  for (int lane = 0; lane < width; lane++) {
    const double s[4] = {sums.s[0][lane], sums.s[1][lane], sums.s[2][lane], sums.s[3][lane]};
    if (!is_poor((double)rows, s)) continue;
    pivots[lane] = (float)(pivots[lane] + s[0] / (double)rows);
    again = true;
  }
  if (again) sums = sweep<dtype>(x, rows, step, pivots);
  for (int lane = 0; lane < width; lane++) {
    const double s[4] = {sums.s[0][lane], sums.s[1][lane], sums.s[2][lane], sums.s[3][lane]};
    const char* largest = x + sums.row[lane] * step + lane * size_of(dtype);
    float value[kWidth];
    to_float32<dtype>(largest, 1, value);
    const float absmax = __builtin_fabsf(value[0]);
    if (scale_for(absmax) != 1) {  // rare: gather the column and let the run's path scale it
      alignas(64) char column[kSegmentRows * 4];
      for (int64_t r = 0; r < rows; r++)
        memcpy(column + r * size_of(dtype), x + r * step + lane * size_of(dtype),
               (size_t)size_of(dtype));
      result[lane] = run_moments<dtype>(column, rows);
      continue;
    }
    result[lane] = central(rows, s, pivots[lane]);
    result[lane].argmax = sums.row[lane];
    result[lane].absmax = absmax;
  }
}

Moments moments(const char* x, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      return run_moments<DType::kFloat32>(x, count);
    case DType::kBFloat16:
      return run_moments<DType::kBFloat16>(x, count);
    default:
      return run_moments<DType::kFloat16>(x, count);
  }
}

void channel_moments(const char* x, DType dtype, int64_t rows, int64_t step, int width,
                     Moments* result) {
  switch (dtype) {
    case DType::kFloat32:
      return tile_moments<DType::kFloat32>(x, rows, step, width, result);
    case DType::kBFloat16:
      return tile_moments<DType::kBFloat16>(x, rows, step, width, result);
    default:
      return tile_moments<DType::kFloat16>(x, rows, step, width, result);
  }
}

}  // namespace dlzo::DLZO_ISA
