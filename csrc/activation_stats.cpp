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
constexpr int kBlock = 64;                     // terms per lane summed in float32
constexpr int kPivotRows = 16;                 // rows of a channel whose mean is its first pivot
constexpr int kAhead = 80;  // rows between what is fetched and what is summed: 5 KB, past a page

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

// The bits of |x| that stand for every NaN: the next above infinity's.
template <DType dtype>
constexpr int32_t kNan = dtype == DType::kFloat32    ? 0x7f800001
                         : dtype == DType::kBFloat16 ? 0x7f81
                                                     : 0x7c01;

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
  memset(values, 0, kWidth * sizeof(float));
  widen<dtype>(x, count, values);
}

// Of |x|: its bits, -1 for none, and its first position.
struct Maximum {
  int32_t bits;
  int64_t position;
};

// What the lanes add up to, in element order.
struct LaneSums {
  double s[4][kWidth];
  int32_t largest[kWidth];  // bits of the largest |x|
  int32_t block[kWidth];    // and a row at or before the first that holds it, in its block
};

// Power sums and maxima of rows of kWidth values, each lane about its own pivot.
template <DType dtype>
class Sweep {
  using Int = typename Magnitude<size_of(dtype)>::Int;
  typedef Int Bits __attribute__((vector_size(4 * kLanes)));
  static constexpr int kVectors = Magnitude<size_of(dtype)>::kVectors;
  static constexpr int kBitsLanes = sizeof(Bits) / sizeof(Int);

 public:
  Sweep() = default;
  __attribute__((always_inline)) explicit Sweep(const float* pivots) {
    for (int p = 0; p < kPairs; p++) {
      for (int i = 0; i < 2; i++)
        for (int lane = 0; lane < kLanes; lane++)
          pivot_[p][i][lane] = pivots[p * 2 * kLanes + element_of<dtype>(i, lane)];
      for (int i = 0; i < kVectors; i++) largest_[p][i] = Bits{} - (Int)1;  // below zero's bits
    }
  }

  // Adds rows [begin, end), row r lying `step` r bytes from x.
  __attribute__((always_inline)) void add(const char* x, int64_t begin, int64_t end, int64_t step) {
    for (; begin < end; begin += kBlock)
      for (int p = 0; p < kPairs; p++)
        add_block(p, x, begin, begin + kBlock < end ? begin + kBlock : end, step);
  }

  __attribute__((always_inline)) void finish(LaneSums* sums) const {
    for (int p = 0; p < kPairs; p++) {
      const int first = p * 2 * kLanes;
      for (int k = 0; k < 4; k++)
        for (int i = 0; i < 2; i++)
          for (int lane = 0; lane < kLanes; lane++)
            sums->s[k][first + element_of<dtype>(i, lane)] = total_[p][k][i][lane];
      for (int i = 0; i < kVectors; i++)
        for (int lane = 0; lane < kBitsLanes; lane++) {
          const int32_t largest = largest_[p][i][lane];
          const bool is_nan = largest >= kNan<dtype>;
          sums->largest[first + i * kBitsLanes + lane] = is_nan ? kNan<dtype> : largest;
          sums->block[first + i * kBitsLanes + lane] = is_nan ? 0 : block_[p][i][lane];
        }
    }
  }

 private:
  __attribute__((always_inline)) void add_block(int p, const char* x, int64_t begin, int64_t end,
                                                int64_t step) {
    const F32 zero = {}, pivot[2] = {pivot_[p][0], pivot_[p][1]};
    F32 s[4][2];
    for (int k = 0; k < 4; k++) s[k][0] = s[k][1] = zero;
    Bits largest[kVectors];
    for (int i = 0; i < kVectors; i++) largest[i] = Bits{};
    for (int64_t r = begin; r < end; r++) {
      const char* at = x + r * step + p * 2 * kLanes * size_of(dtype);
      __builtin_prefetch(at + kAhead * step, 0, 2);  // the hardware stops at a page, or a long step
      const Pair value = load_any_order<dtype>(at);
      for (int i = 0; i < 2; i++) {
        const F32 d = value.v[i] - pivot[i], square = d * d;
        s[0][i] += d;
        s[1][i] += square;
        s[2][i] = fused_multiply_add(square, d, s[2][i]);
        s[3][i] = fused_multiply_add(square, square, s[3][i]);
      }
      for (int i = 0; i < kVectors; i++) {
        const Bits magnitude =
            load<Bits>(at + i * (int64_t)sizeof(Bits)) & Magnitude<size_of(dtype)>::kMask;
        largest[i] = magnitude > largest[i] ? magnitude : largest[i];
      }
    }
    for (int i = 0; i < kVectors; i++) {
      const auto larger = largest[i] > largest_[p][i];
      block_[p][i] = larger ? Bits{} + (Int)begin : block_[p][i];
      largest_[p][i] = larger ? largest[i] : largest_[p][i];
    }
    for (int k = 0; k < 4; k++)
      for (int i = 0; i < 2; i++)
        for (int lane = 0; lane < kLanes; lane++) total_[p][k][i][lane] += (double)s[k][i][lane];
  }

  F32 pivot_[kPairs][2];
  double total_[kPairs][4][2][kLanes] = {};
  Bits largest_[kPairs][kVectors], block_[kPairs][kVectors] = {};
};

// The first row whose value in this lane has these magnitude bits, or is a NaN as they are.
template <DType dtype>
DLZO_INLINE int32_t find_row(const char* x, int64_t step, const LaneSums& sums, int lane) {
  using M = Magnitude<size_of(dtype)>;
  int32_t row = sums.block[lane];
  for (;; row++) {
    typename M::Int raw;
    memcpy(&raw, x + row * step + lane * size_of(dtype), sizeof raw);
    const int32_t magnitude = raw & M::kMask;
    if (magnitude == sums.largest[lane] || magnitude > kNan<dtype>) return row;
  }
}

// Each lane's mean of the first rows, which equals a constant exactly.
DLZO_INLINE void first_pivots(const float (*values)[kWidth], int64_t rows, float* pivots) {
  double sum[kWidth] = {};
  for (int64_t r = 1; r < rows; r++)
    for (int lane = 0; lane < kWidth; lane++)
      sum[lane] += (double)values[r][lane] - (double)values[0][lane];
  for (int lane = 0; lane < kWidth; lane++)
    pivots[lane] = (float)(values[0][lane] + sum[lane] / (double)rows);
}

// The mean of the first `count` values, by halves; a constant comes out exactly.
DLZO_INLINE float first_pivot(const float* values, int64_t count) {
  double sum[kWidth];
  for (int lane = 0; lane < kWidth; lane++)
    sum[lane] = lane < count ? (double)values[lane] - (double)values[0] : 0;
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; lane++) sum[lane] += sum[lane + half];
  return (float)(values[0] + sum[0] / (double)count);
}

// Adds the first `lanes` lanes to s by halves, and their maximum to another, with its position
// counted from `offset`. That of one not above `known` nobody asks for.
template <DType dtype>
DLZO_INLINE void reduce(const char* x, LaneSums* sums, int64_t lanes, int64_t offset, int32_t known,
                        double (&s)[4], Maximum* largest) {
  for (int64_t lane = lanes; lane < kWidth; lane++) {
    for (int k = 0; k < 4; k++) sums->s[k][lane] = 0;
    sums->largest[lane] = -1;
  }
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int k = 0; k < 4; k++)
      for (int lane = 0; lane < half; lane++) sums->s[k][lane] += sums->s[k][lane + half];
  for (int k = 0; k < 4; k++) s[k] += sums->s[k][0];
  int32_t best = -1;
  for (int lane = 0; lane < kWidth; lane++)
    best = sums->largest[lane] > best ? sums->largest[lane] : best;
  if (best <= largest->bits) return;
  *largest = {best, 0};
  if (best <= known) return;
  largest->position = INT64_MAX;
  for (int lane = 0; lane < lanes; lane++) {
    if (sums->largest[lane] != best) continue;
    const int64_t at =
        offset + find_row<dtype>(x, kWidth * size_of(dtype), *sums, lane) * kWidth + lane;
    largest->position = at < largest->position ? at : largest->position;
  }
}

// The sums of a run of `count` values about one pivot, and their maximum.
template <DType dtype>
static Maximum run_sums(const char* x, int64_t count, float pivot, int32_t known, double (&s)[4]) {
  float pivots[kWidth];
  for (int lane = 0; lane < kWidth; lane++) pivots[lane] = pivot;
  const int64_t rows = count / kWidth, tail = count % kWidth, step = kWidth * size_of(dtype);
  Maximum largest = {-1, 0};
  for (int k = 0; k < 4; k++) s[k] = 0;
  LaneSums lanes;
  if (rows > 0) {
    Sweep<dtype> sweep(pivots);
    sweep.add(x, 0, rows, step);
    sweep.finish(&lanes);
    reduce<dtype>(x, &lanes, kWidth, 0, known, s, &largest);
  }
  if (tail > 0) {
    alignas(64) char stage[kWidth * 4] = {};
    memcpy(stage, x + rows * step, (size_t)(tail * size_of(dtype)));
    Sweep<dtype> sweep(pivots);
    sweep.add(stage, 0, 1, step);
    sweep.finish(&lanes);
    reduce<dtype>(stage, &lanes, tail, rows * kWidth, known, s, &largest);
  }
  return largest;
}

template <DType dtype>
static Moments run_moments(const char* x, int64_t count, int32_t* known) {
  double s[4];
  float values[kWidth];
  const int64_t first = count < kWidth ? count : kWidth;
  to_float32<dtype>(x, first, values);
  float pivot = first_pivot(values, first);
  const Maximum largest = run_sums<dtype>(x, count, pivot, *known, s);
  to_float32<dtype>((const char*)&largest.bits, 1, values);
  const float absmax = values[0];
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
    int32_t any = INT32_MAX;
    const Moments moments = run_moments<DType::kFloat32>((const char*)scaled, count, &any);
    result = rescale(moments, 1 / scale);
  } else {
    if (is_poor((double)count, s)) {
      pivot = (float)(pivot + s[0] / (double)count);
      run_sums<dtype>(x, count, pivot, INT32_MAX, s);
    }
    result = central(count, s, pivot);
  }
  result.argmax = largest.position;
  result.absmax = absmax;
  *known = largest.bits > *known ? largest.bits : *known;
  return result;
}

// Whether a lane's powers overflow or vanish, by its largest |x| and its pivot.
DLZO_INLINE bool needs_scale(float absmax, float pivot) {
  return scale_for(absmax) != 1 || __builtin_fabsf(pivot) > kLargest;
}

// A column of a tile as a run, about a pivot of its own: the way of the rare one that needs it.
template <DType dtype>
static Moments column_moments(const char* x, int64_t rows, int64_t step) {
  alignas(64) char column[kSegmentRows * 4];
  for (int64_t r = 0; r < rows; r++)
    memcpy(column + r * size_of(dtype), x + r * step, (size_t)size_of(dtype));
  int32_t none = -1;
  return run_moments<dtype>(column, rows, &none);
}

// Each lane's largest |x|.
template <DType dtype>
DLZO_INLINE void largest_of(const LaneSums& sums, float* absmax) {
  typename Magnitude<size_of(dtype)>::Int magnitudes[kWidth];
  for (int lane = 0; lane < kWidth; lane++)
    magnitudes[lane] = (typename Magnitude<size_of(dtype)>::Int)sums.largest[lane];
  to_float32<dtype>((const char*)magnitudes, kWidth, absmax);
}

// Puts the pivots of lanes whose sums are poor where these say that the mean is; says whether any
// was. A lane whose powers need a scale has no use for sums.
DLZO_INLINE bool move_pivots(const LaneSums& sums, const float* absmax, int64_t rows,
                             float* pivots) {
  bool any = false;
  for (int lane = 0; lane < kWidth; lane++) {
    const double s[4] = {sums.s[0][lane], sums.s[1][lane]};
    if (!is_poor((double)rows, s) || needs_scale(absmax[lane], pivots[lane])) continue;
    pivots[lane] = (float)(pivots[lane] + s[0] / (double)rows);
    any = true;
  }
  return any;
}

// The moments of a lane's values, whose maximum is found where it is larger than that before.
template <DType dtype>
DLZO_INLINE Moments lane_moments(const char* x, int64_t rows, int64_t step, int lane,
                                 const LaneSums& sums, float pivot, float absmax,
                                 const Moments& before) {
  if (needs_scale(absmax, pivot))
    return column_moments<dtype>(x + lane * size_of(dtype), rows, step);
  const double s[4] = {sums.s[0][lane], sums.s[1][lane], sums.s[2][lane], sums.s[3][lane]};
  Moments moments = central(rows, s, pivot);
  moments.absmax = absmax;
  if (before.count == 0 || !(absmax <= before.absmax))
    moments.argmax = find_row<dtype>(x, step, sums, lane);
  return moments;
}

// The first pivots of a tile: means of channels so far, or of their first rows.
template <DType dtype>
DLZO_INLINE void tile_pivots(const char* x, int64_t rows, int64_t step, int width,
                             const Moments* result, float* pivots) {
  if (result->count == 0) {
    float values[kPivotRows][kWidth];
    const int64_t first = rows < kPivotRows ? rows : kPivotRows;
    for (int64_t r = 0; r < first; r++) to_float32<dtype>(x + r * step, kWidth, values[r]);
    return first_pivots(values, first, pivots);
  }
  for (int lane = 0; lane < kWidth; lane++)
    pivots[lane] = lane < width ? (float)result[lane].mean : 0.0f;
}

// Tiles of kWidth channels side by side over the same rows, in blocks of rows: memory is read along
// the rows, a page at a time.
template <DType dtype>
static void tiles_moments(const char* x, int64_t before, int64_t rows, int64_t step, int channels,
                          Moments* result) {
  constexpr int64_t kTile = kWidth * size_of(dtype);
  alignas(64) char stage[kSegmentRows * kTile];
  const int tiles = channels / kWidth, tail = channels % kWidth;
  const char* data[kTiles];
  int64_t steps[kTiles];
  float pivots[kTiles][kWidth];
  Sweep<dtype> sweeps[kTiles];
  const int all = tiles + (tail > 0);
  const auto width = [&](int t) { return t < tiles ? kWidth : tail; };
  for (int t = 0; t < all; t++) {
    data[t] = x + t * kTile, steps[t] = step;
    if (t == tiles) {  // the last channels, in a tile of their own that zeros fill up
      memset(stage, 0, sizeof stage);
      for (int64_t r = 0; r < rows; r++)
        memcpy(stage + r * kTile, x + t * kTile + r * step, (size_t)(tail * size_of(dtype)));
      data[t] = stage, steps[t] = kTile;
    }
    tile_pivots<dtype>(data[t], rows, steps[t], width(t), result + t * kWidth, pivots[t]);
    sweeps[t] = Sweep<dtype>(pivots[t]);
  }
  for (int64_t begin = 0; begin < rows; begin += kBlock)
    for (int t = 0; t < all; t++)
      sweeps[t].add(data[t], begin, begin + kBlock < rows ? begin + kBlock : rows, steps[t]);
  for (int t = 0; t < all; t++) {
    LaneSums sums;
    float absmax[kWidth];
    sweeps[t].finish(&sums);
    largest_of<dtype>(sums, absmax);
    if (move_pivots(sums, absmax, rows, pivots[t])) {
      Sweep<dtype> again(pivots[t]);
      again.add(data[t], 0, rows, steps[t]);
      again.finish(&sums);
    }
    for (int lane = 0; lane < width(t); lane++) {
      Moments& channel = result[t * kWidth + lane];
      const Moments part = lane_moments<dtype>(data[t], rows, steps[t], lane, sums, pivots[t][lane],
                                               absmax[lane], channel);
      channel = combine(channel, part, before);
    }
  }
}

Moments moments(const char* x, DType dtype, int64_t count, int32_t* known) {
  return with_dtype(dtype, [&](auto as) { return run_moments<as.value>(x, count, known); });
}

void channel_moments(const char* x, DType dtype, int64_t before, int64_t rows, int64_t step,
                     int channels, Moments* result) {
  with_dtype(dtype,
             [&](auto as) { tiles_moments<as.value>(x, before, rows, step, channels, result); });
}

}  // namespace dlzo::DLZO_ISA
