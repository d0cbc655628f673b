// Storage types: how float32 values lie in memory, and the one rounding rule of each.
#pragma once
#include "dtype.h"
#include "simd.h"

namespace dlzo::DLZO_ISA {

// Two vectors of consecutive elements: the unit of loads and stores.
struct Pair {
  F32 v[2];
};
constexpr int kStep = 2 * kLanes;  // values of a pair

// The bits of value rounded to nearest even at bit 16, in the high half of each lane; the low half
// holds rubbish. A NaN stays a NaN, made quiet.
DLZO_INLINE U32 round_to_high_half(F32 value) {
  const U32 u = bits<U32>(value);
#if defined(__AVX512F__)  // masks spare the two ports that shift
  const __mmask16 odd = _mm512_test_epi32_mask((__m512i)u, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
  __m512i rounded = _mm512_add_epi32((__m512i)u, _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
  return (U32)_mm512_mask_or_epi32(rounded, nan, (__m512i)u, _mm512_set1_epi32(0x400000));
#else
  const U32 rounded = u + 0x7fffu + ((u >> 16) & 1u);
  return select(value != value, u | 0x400000u, rounded);
#endif
}

DLZO_INLINE Pair load_bfloat16(const char* source) {
#if defined(__AVX512BW__)
  typedef uint16_t U16x32 __attribute__((vector_size(64)));
  U16x32 low, high;  // where each odd 16-bit lane comes from; the even ones become zero
  for (int i = 0; i < 32; i++) low[i] = (uint16_t)(i / 2), high[i] = (uint16_t)(16 + i / 2);
  const __m512i x = _mm512_loadu_si512(source);
  return {{(F32)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)low, x),
           (F32)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)high, x)}};
#elif defined(__AVX2__)
  const auto widen = [](const char* p) {
    return (F32)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  };
  return {{widen(source), widen(source + 2 * kLanes)}};
#else
  Pair pair;
  for (int i = 0; i < 2; i++)
    pair.v[i] = bits<F32>(__builtin_convertvector(load<U16>(source + i * 2 * kLanes), U32) << 16);
  return pair;
#endif
}

DLZO_INLINE void store_bfloat16(char* target, const Pair& value) {
  const U32 a = round_to_high_half(value.v[0]), b = round_to_high_half(value.v[1]);
#if defined(__AVX512BW__)
  typedef uint16_t U16x32 __attribute__((vector_size(64)));
  U16x32 high_halves;
  for (int i = 0; i < 32; i++) high_halves[i] = (uint16_t)(2 * i + 1);
  _mm512_storeu_si512(target,
                      _mm512_permutex2var_epi16((__m512i)a, (__m512i)high_halves, (__m512i)b));
#elif defined(__AVX2__)
  const __m256i packed =
      _mm256_packus_epi32(_mm256_srli_epi32((__m256i)a, 16), _mm256_srli_epi32((__m256i)b, 16));
  _mm256_storeu_si256((__m256i*)target, _mm256_permute4x64_epi64(packed, 0xD8));
#else
  store(target, __builtin_convertvector(a >> 16, U16));
  store(target + 2 * kLanes, __builtin_convertvector(b >> 16, U16));
#endif
}

#if defined(__AVX512F__)
DLZO_INLINE F32 from_float16(U16 half) { return (F32)_mm512_cvtph_ps((__m256i)half); }
DLZO_INLINE U16 to_float16(F32 value) {
  return (U16)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
DLZO_INLINE F32 from_float16(U16 half) { return (F32)_mm256_cvtph_ps((__m128i)half); }
DLZO_INLINE U16 to_float16(F32 value) {
  return (U16)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
}
#else
// The bits of F16C, NaN payloads included, from integer operations and one exact scaling.
DLZO_INLINE F32 from_float16(U16 half) {
  const U32 u = __builtin_convertvector(half, U32), magnitude = u & 0x7fffu;
  const U32 scaled = bits<U32>(bits<F32>(magnitude << 13) * 0x1p112f);
  const U32 special = (magnitude << 13) | 0x7f800000u;
  const U32 quiet = select(magnitude > 0x7c00u, special | 0x400000u, special);
  return bits<F32>(select(magnitude >= 0x7c00u, quiet, scaled) | ((u & 0x8000u) << 16));
}
DLZO_INLINE U16 to_float16(F32 value) {
  const U32 u = bits<U32>(value), magnitude = u & 0x7fffffffu;
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns the subnormal's last bit with that of the sum, which the addition rounds.
  const U32 subnormal = bits<U32>(bits<F32>(magnitude) + 0.5f) - 0x3f000000u;
  const U32 nan = ((magnitude >> 13) & 0x3ffu) | 0x7e00u;
  U32 half = select(magnitude < 0x38800000u, subnormal, normal);
  half = select(magnitude >= 0x477ff000u, splat(0x7c00u), half);
  half = select(magnitude > 0x7f800000u, nan, half);
  return __builtin_convertvector(half | ((u >> 16) & 0x8000u), U16);
}
#endif

template <DType dtype>
DLZO_INLINE Pair load_pair(const char* source) {
  if constexpr (dtype == DType::kBFloat16) return load_bfloat16(source);
  if constexpr (dtype == DType::kFloat16)
    return {{from_float16(load<U16>(source)), from_float16(load<U16>(source + 2 * kLanes))}};
  if constexpr (dtype == DType::kFloat32)
    return {{load<F32>(source), load<F32>(source + 4 * kLanes)}};
}

// Rounds to nearest even into the storage type.
template <DType dtype>
DLZO_INLINE void store_pair(char* target, const Pair& value) {
  if constexpr (dtype == DType::kBFloat16) store_bfloat16(target, value);
  for (int i = 0; i < 2; i++) {
    if constexpr (dtype == DType::kFloat16) store(target + i * 2 * kLanes, to_float16(value.v[i]));
    if constexpr (dtype == DType::kFloat32) store(target + i * 4 * kLanes, value.v[i]);
  }
}

template <DType dtype>
struct Constant {
  static constexpr DType value = dtype;
};

// What body returns for a Constant of dtype, whose value can be a template's argument.
template <class Body>
DLZO_INLINE auto with_dtype(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Constant<DType::kFloat32>());
    case DType::kBFloat16:
      return body(Constant<DType::kBFloat16>());
    default:
      return body(Constant<DType::kFloat16>());
  }
}

// `count` values at x as float32; nothing beyond them is read or written.
template <DType dtype>
DLZO_INLINE void widen(const char* x, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const Pair pair = load_pair<dtype>(x + i * size_of(dtype));
    store(out + i, pair.v[0]);
    store(out + i + kLanes, pair.v[1]);
  }
  if (i == count) return;
  alignas(64) char stage[kStep * 4] = {};
  alignas(64) float last[kStep];
  memcpy(stage, x + i * size_of(dtype), (size_t)((count - i) * size_of(dtype)));
  const Pair pair = load_pair<dtype>(stage);
  store(last, pair.v[0]);
  store(last + kLanes, pair.v[1]);
  memcpy(out + i, last, (size_t)((count - i) * 4));
}

// `count` floats, times a factor, rounded into the storage type; nothing beyond them is touched.
template <DType dtype>
DLZO_INLINE void narrow(char* out, const char* floats, int64_t count, float factor) {
  const auto scaled = [factor](const char* from) {
    const Pair pair = load_pair<DType::kFloat32>(from);
    return Pair{{pair.v[0] * factor, pair.v[1] * factor}};
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    store_pair<dtype>(out + i * size_of(dtype), scaled(floats + i * 4));
  if (i == count) return;
  alignas(64) char from[kStep * 4] = {}, to[kStep * 4];
  memcpy(from, floats + i * 4, (size_t)((count - i) * 4));
  store_pair<dtype>(to, scaled(from));
  memcpy(out + i * size_of(dtype), to, (size_t)((count - i) * size_of(dtype)));
}

}  // namespace dlzo::DLZO_ISA
