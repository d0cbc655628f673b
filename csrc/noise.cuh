// Noise v1 on a GPU: the bits of noise.h, whose header has the formulas, counters and error bounds.
// Every product and sum is rounded on its own (--fmad=false and explicit intrinsics).
#pragma once
#include <cstdint>

#include "kernel.cuh"

namespace dlzo::gpu {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;

struct Words {
  uint32_t w[4];
};

// Two neighbouring blocks; `block_low` is even, so that they share the high half of the counter and
// with it most of the first round and half of the second.
DLZO_DEVICE void philox(uint32_t block_low, uint32_t block_high, uint32_t stream, uint32_t query,
                        const Keys& keys, Words (&words)[2]) {
  const uint64_t product1 = (uint64_t)kMultiplier1 * stream;
  const uint32_t word0 = (uint32_t)(product1 >> 32) ^ block_high ^ keys.low[0];
  const uint32_t word1 = (uint32_t)product1;
  const uint64_t next0 = (uint64_t)kMultiplier0 * word0;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    const uint64_t product0 = (uint64_t)kMultiplier0 * (block_low + (uint32_t)b);
    const uint32_t word2 = (uint32_t)(product0 >> 32) ^ query ^ keys.high[0];
    const uint64_t next1 = (uint64_t)kMultiplier1 * word2;
    uint32_t* w = words[b].w;
    w[0] = (uint32_t)(next1 >> 32) ^ word1 ^ keys.low[1];
    w[1] = (uint32_t)next1;
    w[2] = (uint32_t)(next0 >> 32) ^ (uint32_t)product0 ^ keys.high[1];
    w[3] = (uint32_t)next0;
  }
#pragma unroll
  for (int r = 2; r < kRounds; r++) {
#pragma unroll
    for (int b = 0; b < 2; b++) {
      uint32_t* w = words[b].w;
      const uint64_t p0 = (uint64_t)kMultiplier0 * w[0], p1 = (uint64_t)kMultiplier1 * w[2];
      w[0] = (uint32_t)(p1 >> 32) ^ w[1] ^ keys.low[r];
      w[1] = (uint32_t)p1;
      w[2] = (uint32_t)(p0 >> 32) ^ w[3] ^ keys.high[r];
      w[3] = (uint32_t)p0;
    }
  }
}

// Two values that go through the same operations.
struct Two {
  float x, y;
};

// Not the packed instructions of sm_100: ptxas 13.0 fuses a packed product and sum (docs/gpu.md).
DLZO_DEVICE Two operator*(Two a, Two b) { return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)}; }
DLZO_DEVICE Two operator+(Two a, Two b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }
DLZO_DEVICE Two operator*(Two a, float b) { return a * Two{b, b}; }
DLZO_DEVICE Two operator+(Two a, float b) { return a + Two{b, b}; }

DLZO_DEVICE Two to_float(uint32_t x, uint32_t y) {
  return {__uint2float_rn(x), __uint2float_rn(y)};
}
DLZO_DEVICE Two to_float(int32_t x, int32_t y) { return {__int2float_rn(x), __int2float_rn(y)}; }
DLZO_DEVICE Two from_bits(uint32_t x, uint32_t y) {
  return {__uint_as_float(x), __uint_as_float(y)};
}

// sqrt(-2 ln u) with u = (x + 1/2) / 2^32: radius() of noise.h.
DLZO_DEVICE Two radius(uint32_t x, uint32_t y) {
  constexpr uint32_t kTwoThirds = 0x3f2aaaabu, kExponent = 0xff800000u;
  const Two u = to_float(x, y) + 0.5f;
  const uint32_t a = __float_as_uint(u.x) - (kTwoThirds + (32u << 23));
  const uint32_t b = __float_as_uint(u.y) - (kTwoThirds + (32u << 23));
  const uint32_t a_power = a & kExponent, b_power = b & kExponent;
  const Two log_power = to_float((int32_t)a_power, (int32_t)b_power) * (-0x1.62e430p+0f * 0x1p-23f);
  const Two doubled =
      from_bits(a - a_power + (kTwoThirds + (1u << 23)), b - b_power + (kTwoThirds + (1u << 23)));
  const Two g = {__fsub_rn(2.0f, doubled.x), __fsub_rn(2.0f, doubled.y)};
  Two p = g * 0x1.0e2994p-12f + 0x1.1df3acp-11f;
  p = p * g + 0x1.f03c90p-11f;
  p = p * g + 0x1.1ef186p-9f;
  p = p * g + 0x1.55b7e4p-8f;
  p = p * g + 0x1.99ce44p-7f;
  p = p * g + 0x1.fffe5ep-6f;
  p = p * g + 0x1.55550cp-4f;
  p = p * g + 0x1p-2f;
  const Two square = log_power + (p * (g * g) + g);
  return {__fsqrt_rn(square.x), __fsqrt_rn(square.y)};
}

DLZO_DEVICE float flip_sign(float value, uint32_t sign) {
  return __uint_as_float(__float_as_uint(value) ^ (sign & 0x80000000u));
}

struct SinCos {
  Two sin, cos;
};

// sin and cos of 2 pi x / 2^32: sincos() of noise.h.
DLZO_DEVICE SinCos sincos(uint32_t x, uint32_t y) {
  const Two z = to_float((int32_t)(x << 2), (int32_t)(y << 2)) * 0x1p-31f;
  const Two t = z * z;
  Two a = t * -0x1.2d9bb8p-15f + 0x1.465ec6p-9f;
  Two b = t * 0x1.d9f7bap-19f + -0x1.55c664p-12f;
  a = a * t + -0x1.4abbbap-4f;
  b = b * t + 0x1.03c1dep-6f;
  a = a * t + 0x1.921fb6p-1f;
  b = b * t + -0x1.3bd3ccp-2f;
  a = a * z;
  b = b * t + 1.0f;
  // Bit 31 of the quadrant: sign of the sine; bit 30: whether sine and cosine change places.
  const uint32_t i = x + 0x20000000u, j = y + 0x20000000u;
  const bool swap_x = (i & 0x40000000u) != 0, swap_y = (j & 0x40000000u) != 0;
  return {{flip_sign(swap_x ? b.x : a.x, i), flip_sign(swap_y ? b.y : a.y, j)},
          {flip_sign(swap_x ? a.x : b.x, x + 0x60000000u),
           flip_sign(swap_y ? a.y : b.y, y + 0x60000000u)}};
}

// The normals of a group, whose elements belong to two Philox blocks.
DLZO_DEVICE void normals(uint32_t block_low, uint32_t block_high, uint32_t stream, uint32_t query,
                         const Keys& keys, float (&z)[kGroup]) {
  Words words[2];
  philox(block_low, block_high, stream, query, keys, words);
#pragma unroll
  for (int b = 0; b < 2; b++) {
    const Two r = radius(words[b].w[0], words[b].w[2]);
    const SinCos angle = sincos(words[b].w[1], words[b].w[3]);
    const Two even = r * angle.cos, odd = r * angle.sin;
    z[4 * b] = even.x;
    z[4 * b + 1] = odd.x;
    z[4 * b + 2] = even.y;
    z[4 * b + 3] = odd.y;
  }
}

}  // namespace dlzo::gpu
