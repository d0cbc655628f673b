// The storage types of a GPU, and groups of kGroup elements in memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernel.cuh"

namespace dlzo::gpu {

template <DType dtype>
struct Storage;
template <>
struct Storage<DType::kFloat32> {
  using Type = float;
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};
template <>
struct Storage<DType::kBFloat16> {
  using Type = __nv_bfloat16;
  static __device__ __forceinline__ float load(Type x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Type store(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Storage<DType::kFloat16> {
  using Type = __half;
  static __device__ __forceinline__ float load(Type x) { return __half2float(x); }
  static __device__ __forceinline__ Type store(float x) { return __float2half_rn(x); }
};

// A group of elements of a part, and which of them exist.
struct Group {
  uint32_t block_low, block_high;  // of the first of its two Philox blocks
  int64_t out, base;               // where element 0 lies, in elements from the part's first
  int begin, end;                  // the elements that exist
  bool whole;                      // whether all do, side by side and aligned
};

DLZO_DEVICE uint32_t low_half(uint32_t pair) { return pair << 16; }
DLZO_DEVICE uint32_t high_half(uint32_t pair) { return pair & 0xffff0000u; }

// Eight values of 16 bits as they lie in a register quadruple.
template <DType dtype>
DLZO_DEVICE void unpack(const uint4& raw, float (&values)[kGroup]) {
  const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (dtype == DType::kBFloat16) {
      values[2 * i] = __uint_as_float(low_half(pairs[i]));
      values[2 * i + 1] = __uint_as_float(high_half(pairs[i]));
    } else {
      const __half2 pair = *reinterpret_cast<const __half2*>(&pairs[i]);
      values[2 * i] = __low2float(pair);
      values[2 * i + 1] = __high2float(pair);
    }
  }
}

template <DType dtype>
DLZO_DEVICE uint4 pack(const float (&values)[kGroup]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (dtype == DType::kBFloat16)
      *reinterpret_cast<__nv_bfloat162*>(&pairs[i]) =
          __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
    else
      *reinterpret_cast<__half2*>(&pairs[i]) = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Rounds to the storage type and back.
template <DType dtype>
DLZO_DEVICE float rounded(float value) {
  return Storage<dtype>::load(Storage<dtype>::store(value));
}

// Sixteen bytes in one access; the compiler splits plain ones between branches, but not `__ldg`,
// which is for what nobody writes.
template <bool read_only>
DLZO_DEVICE uint4 load_wide(const void* from) {
  const uint4* wide = static_cast<const uint4*>(from);
  return read_only ? __ldg(wide) : *wide;
}

// The values of a group that begins at `data`, `step` elements apart.
template <DType dtype, bool read_only = false>
DLZO_DEVICE void load_group(const char* data, int64_t step, const Group& group,
                            float (&values)[kGroup]) {
  using Type = typename Storage<dtype>::Type;
  const Type* from = reinterpret_cast<const Type*>(data);
  if (group.whole) {
    if constexpr (dtype == DType::kFloat32) {
      const uint4 a = load_wide<read_only>(from), b = load_wide<read_only>(from + 4);
      const uint32_t all[kGroup] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kGroup; i++) values[i] = __uint_as_float(all[i]);
    } else {
      unpack<dtype>(load_wide<read_only>(from), values);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; i++)
    values[i] = i >= group.begin && i < group.end ? Storage<dtype>::load(from[i * step]) : 0;
}

template <DType dtype>
DLZO_DEVICE void store_group(char* data, int64_t step, const Group& group,
                             const float (&values)[kGroup]) {
  using Type = typename Storage<dtype>::Type;
  Type* to = reinterpret_cast<Type*>(data);
  if (group.whole) {
    if constexpr (dtype == DType::kFloat32) {
      reinterpret_cast<float4*>(to)[0] = make_float4(values[0], values[1], values[2], values[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      *reinterpret_cast<uint4*>(to) = pack<dtype>(values);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; i++)
    if (i >= group.begin && i < group.end) to[i * step] = Storage<dtype>::store(values[i]);
}

}  // namespace dlzo::gpu
