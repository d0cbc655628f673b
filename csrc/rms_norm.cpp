// rms_norm: out = round(weight * round(x / sqrt(mean(x^2) + eps))), of one row.
//
// Squares are summed in float32, in kWidth lanes whose order is fixed: the bits do not depend on
// the ISA. The sum's error is within (size / kWidth + 6) 2^-24 of it. A row is read from memory
// once.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

// Calls body on each kWidth values; of the last ones, those beyond size are zero.
template <DType dtype, class Body>
DLZO_INLINE void for_each_block(const char* x, int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= size; i += kWidth) body(x + i * size_of(dtype));
  if (i == size) return;
  alignas(64) char last[kWidth * size_of(dtype)] = {};
  memcpy(last, x + i * size_of(dtype), (size_t)((size - i) * size_of(dtype)));
  body(last);
}

template <DType dtype>
DLZO_INLINE float sum_of_squares(const char* x, int64_t size) {
  constexpr int kPairs = kWidth / kStep;
  Pair sums[kPairs] = {};
  for_each_block<dtype>(x, size, [&](const char* block) {
    for (int p = 0; p < kPairs; p++) {
      const Pair value = load_pair<dtype>(block + p * kStep * size_of(dtype));
      for (int i = 0; i < 2; i++) sums[p].v[i] += value.v[i] * value.v[i];
    }
  });
  float lanes[kWidth];
  memcpy(lanes, sums, sizeof lanes);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

template <DType dtype>
DLZO_INLINE Pair rounded(const Pair& value) {
  alignas(64) char stored[kStep * size_of(dtype)];
  store_pair<dtype>(stored, value);
  return load_pair<dtype>(stored);
}

template <DType dtype>
DLZO_INLINE void scale_step(char* out, const char* x, const char* weight, float factor) {
  const Pair value = load_pair<dtype>(x), by = load_pair<dtype>(weight);
  const Pair y = rounded<dtype>({{value.v[0] * factor, value.v[1] * factor}});
  store_pair<dtype>(out, {{by.v[0] * y.v[0], by.v[1] * y.v[1]}});
}

template <DType dtype>
static void normalise(char* out, const char* x, const char* weight, int64_t size, float eps) {
  const float mean = sum_of_squares<dtype>(x, size) / (float)size;
  const float factor = 1 / __builtin_sqrtf(mean + eps);
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    const int64_t at = i * size_of(dtype);
    scale_step<dtype>(out + at, x + at, weight + at, factor);
  }
  if (i == size) return;
  const int64_t at = i * size_of(dtype);
  const size_t bytes = (size_t)((size - i) * size_of(dtype));
  alignas(64) char last[2][kStep * size_of(dtype)] = {};
  memcpy(last[0], x + at, bytes);
  memcpy(last[1], weight + at, bytes);
  scale_step<dtype>(last[0], last[0], last[1], factor);
  memcpy(out + at, last[0], bytes);
}

void rms_norm(char* out, const char* x, const char* weight, DType dtype, int64_t size, float eps) {
  with_dtype(dtype, [&](auto as) { normalise<as.value>(out, x, weight, size, eps); });
}

}  // namespace dlzo::DLZO_ISA
