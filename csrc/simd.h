// The vector vocabulary of one ISA, on GCC/Clang vector extensions.
// Every op body includes this header and is compiled once per ISA by the build, which sets
// DLZO_ISA (the namespace) and the -m flags. Nothing here may leave the translation unit:
// no std containers, no inline functions with external linkage, or the linker could pick an
// AVX-512 copy of a shared function for a machine that has none.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef DLZO_ISA
#define DLZO_ISA baseline
#endif
#define DLZO_INLINE static inline __attribute__((always_inline))

namespace dlzo::DLZO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint64_t U64 __attribute__((vector_size(4 * kLanes)));  // half as many lanes
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));  // half as many bytes

// Rearranging bits between vector types costs no instruction.
template <class To, class From>
DLZO_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits() keeps the size");
  return (To)from;
}

template <class Vector>
DLZO_INLINE Vector load(const void* source) {
  Vector vector;
  memcpy(&vector, source, sizeof vector);
  return vector;
}

template <class Vector>
DLZO_INLINE void store(void* target, Vector vector) {
  memcpy(target, &vector, sizeof vector);
}

DLZO_INLINE F32 splat(float value) { return value - F32{}; }
DLZO_INLINE U32 splat(uint32_t value) { return value - U32{}; }
DLZO_INLINE U64 splat(uint64_t value) { return value - U64{}; }

DLZO_INLINE F32 to_float(U32 value) { return __builtin_convertvector(value, F32); }
DLZO_INLINE F32 to_float(I32 value) { return __builtin_convertvector(value, F32); }

DLZO_INLINE U32 select(I32 mask, U32 yes, U32 no) { return mask ? yes : no; }

// Correctly rounded square root.
DLZO_INLINE F32 sqrt(F32 x) {
#if defined(__AVX512F__)
  return (F32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (F32)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (F32)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
  return (F32)vsqrtq_f32((float32x4_t)x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// a * b + c with one rounding, but not in noise v1, which has no fused operation.
DLZO_INLINE F32 fused_multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// Full 64-bit product of the low 32 bits of each 64-bit lane; the high 32 bits are ignored.
DLZO_INLINE U64 multiply_wide(U64 a, U64 b) {
#if defined(__AVX512F__)
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (U64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

DLZO_INLINE U64 exclusive_or(U64 a, U64 b, U64 c) {
#if defined(__AVX512F__)
  return (U64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The low words of `even` and `odd`, side by side: even[0], odd[0], even[1], odd[1], ...
DLZO_INLINE U32 interleave_low(U64 even, U64 odd) {
#if defined(__AVX512F__)
  return (U32)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  return (U32)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
#else
  return bits<U32>((even & 0xffffffffu) | (odd << 32));
#endif
}

// value, its sign bit flipped where bit 31 of `flip` is set.
DLZO_INLINE F32 flip_sign(U32 value, U32 flip) {
#if defined(__AVX512F__)
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  return (F32)_mm512_ternarylogic_epi32((__m512i)value, (__m512i)flip, sign, 0x78);
#else
  return bits<F32>(value ^ (flip & 0x80000000u));
#endif
}

struct Four {
  F32 v[4];  // kGroup consecutive elements
};

// Transposes 4x4 tiles inside each 128-bit part: part p of result j is column 4 p + j of the input.
DLZO_INLINE Four transpose_parts(F32 a, F32 b, F32 c, F32 d) {
#if defined(__AVX512F__)
  const __m512 ab_lo = _mm512_unpacklo_ps((__m512)a, (__m512)b);
  const __m512 ab_hi = _mm512_unpackhi_ps((__m512)a, (__m512)b);
  const __m512 cd_lo = _mm512_unpacklo_ps((__m512)c, (__m512)d);
  const __m512 cd_hi = _mm512_unpackhi_ps((__m512)c, (__m512)d);
  const auto join = [](__m512 x, __m512 y, bool high) {
    return high ? (F32)_mm512_unpackhi_pd((__m512d)x, (__m512d)y)
                : (F32)_mm512_unpacklo_pd((__m512d)x, (__m512d)y);
  };
  return {{join(ab_lo, cd_lo, false), join(ab_lo, cd_lo, true), join(ab_hi, cd_hi, false),
           join(ab_hi, cd_hi, true)}};
#elif defined(__AVX2__)
  const __m256 ab_lo = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 ab_hi = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  const __m256 cd_lo = _mm256_unpacklo_ps((__m256)c, (__m256)d);
  const __m256 cd_hi = _mm256_unpackhi_ps((__m256)c, (__m256)d);
  const auto join = [](__m256 x, __m256 y, bool high) {
    return high ? (F32)_mm256_unpackhi_pd((__m256d)x, (__m256d)y)
                : (F32)_mm256_unpacklo_pd((__m256d)x, (__m256d)y);
  };
  return {{join(ab_lo, cd_lo, false), join(ab_lo, cd_lo, true), join(ab_hi, cd_hi, false),
           join(ab_hi, cd_hi, true)}};
#else
  return {{F32{a[0], b[0], c[0], d[0]}, F32{a[1], b[1], c[1], d[1]}, F32{a[2], b[2], c[2], d[2]},
           F32{a[3], b[3], c[3], d[3]}}};
#endif
}

}  // namespace dlzo::DLZO_ISA
