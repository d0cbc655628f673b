// Noise v1: standard normals as a pure function of (seed, stream, query, element index).
//
//   words    Philox4x32-10 (Salmon et al., SC'11), key = seed (low, high),
//            counter = (block low, block high, stream, query), block = index >> 2
//   normals  Box-Muller on words (0, 1) and (2, 3); the element takes lane index & 3
//   error    radius within 1.12 ulp, sine and cosine within 1.1e-7; |z| <= 6.764
//   bytes    none read; 4 written per element by a float32 fill
//
// Only float32 +, -, x, correctly rounded sqrt and integer operations, each rounded on its own:
// the bits do not depend on the ISA. dlzo_kernels/reference.py is the definition; the forms here
// are equal to it bit for bit and save instructions by exact power-of-two scalings.
#pragma once
#include "storage.h"

namespace dlzo {

// What stays fixed over a run of elements of one parameter in one direction.
struct Direction {
  uint64_t seed;
  uint32_t stream;
  uint32_t query;
};

}  // namespace dlzo

namespace dlzo::DLZO_ISA {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kGroup = 4 * kLanes;  // normals made at a time, from kLanes Philox blocks

// The part of Philox that only the direction and the high half of the block number decide: the
// round keys, the whole first round but for one product, and half of the second.
struct Schedule {
  Direction direction;
  uint32_t block_high;
  uint64_t key0[kRounds], key1[kRounds];
  uint64_t word1, word2_mask, word3;  // after round 2, where they do not depend on block low
  uint64_t query_key;                 // query ^ key1 of round 1
};

DLZO_INLINE Schedule make_schedule(Direction direction, uint32_t block_high) {
  Schedule s;
  s.direction = direction;
  s.block_high = block_high;
  uint32_t k0 = (uint32_t)direction.seed, k1 = (uint32_t)(direction.seed >> 32);
  for (int r = 0; r < kRounds; r++, k0 += kWeyl0, k1 += kWeyl1) s.key0[r] = k0, s.key1[r] = k1;
  const uint64_t product1 = (uint64_t)kMultiplier1 * direction.stream;
  const uint32_t word0 = (uint32_t)(product1 >> 32) ^ block_high ^ (uint32_t)s.key0[0];
  const uint64_t product0 = (uint64_t)kMultiplier0 * word0;
  s.query_key = direction.query ^ s.key1[0];
  s.word1 = (uint32_t)product1 ^ s.key0[1];
  s.word2_mask = (product0 >> 32) ^ s.key1[1];
  s.word3 = (uint32_t)product0;
  return s;
}

struct Words {
  U32 w[4];
};

// Which block, counted from the group's first, a lane computes: chosen so that the transpose
// inside 128-bit parts leaves the normals in element order with no shuffle across parts.
DLZO_INLINE uint64_t block_of_lane(int lane) {
  constexpr int kParts = kLanes / 4;
  return (uint64_t)((lane % 4) * kParts + lane / 4);
}

// The four words of the blocks of `kGroups` consecutive groups, in lockstep. `block_low` is a
// multiple of kLanes, so that no group straddles a carry into the high half of the block number.
template <int kGroups>
DLZO_INLINE void philox(uint32_t block_low, const Schedule& s, Words* result) {
  constexpr int kHalves = 2 * kGroups;  // lanes 0, 2, ... of a group, then lanes 1, 3, ...
  const U64 m0 = splat((uint64_t)kMultiplier0), m1 = splat((uint64_t)kMultiplier1);
  U64 w[kHalves][4];  // a word is the low half of its lane; the high half holds rubbish
  for (int h = 0; h < kHalves; h++) {
    U64 block;
    for (int i = 0; i < kLanes / 2; i++) block[i] = block_of_lane(2 * i + h % 2);
    const U64 product0 = multiply_wide(block + (block_low + (uint32_t)(h / 2 * kLanes)), m0);
    const U64 product1 = multiply_wide((product0 >> 32) ^ s.query_key, m1);
    w[h][0] = (product1 >> 32) ^ s.word1;
    w[h][1] = product1;
    w[h][2] = product0 ^ s.word2_mask;
    w[h][3] = splat(s.word3);
  }
#pragma GCC unroll 10
  for (int r = 2; r < kRounds; r++) {
    U64 product0[kHalves], product1[kHalves];
    for (int h = 0; h < kHalves; h++) {
      product0[h] = multiply_wide(w[h][0], m0);
      product1[h] = multiply_wide(w[h][2], m1);
    }
    for (int h = 0; h < kHalves; h++) {
      w[h][0] = exclusive_or(product1[h] >> 32, w[h][1], splat(s.key0[r]));
      w[h][2] = exclusive_or(product0[h] >> 32, w[h][3], splat(s.key1[r]));
      w[h][1] = product1[h];
      w[h][3] = product0[h];
    }
  }
  for (int g = 0; g < kGroups; g++)
    for (int i = 0; i < 4; i++) result[g].w[i] = interleave_low(w[2 * g][i], w[2 * g + 1][i]);
}

// The pairs below are computed in lockstep: a single Horner chain would leave the units waiting.

DLZO_INLINE Pair horner(Pair p, const Pair& x, float coefficient) {
  return {{p.v[0] * x.v[0] + coefficient, p.v[1] * x.v[1] + coefficient}};
}

// sqrt(-2 ln u) with u = (x + 1/2) / 2^32 rounded once. u = m 2^e with m in [2/3, 4/3), and
// -2 ln m is a polynomial in g = -2 (m - 1); scaling by powers of two rounds nothing.
DLZO_INLINE Pair radius(U32 x0, U32 x1) {
  const U32 x[2] = {x0, x1};
  Pair log_power, g, result;
  for (int i = 0; i < 2; i++) {
    const U32 raw = bits<U32>(to_float(x[i]) + 0.5f) - (0x3f2aaaabu + (32u << 23));
    log_power.v[i] = to_float(bits<I32>(raw) >> 23) * -0x1.62e430p+0f;
    g.v[i] = 2.0f - bits<F32>((raw & 0x7fffffu) + (0x3f2aaaabu + (1u << 23)));
  }
  Pair p{{splat(0x1.0e2994p-12f), splat(0x1.0e2994p-12f)}};
  p = horner(p, g, 0x1.1df3acp-11f);
  p = horner(p, g, 0x1.f03c90p-11f);
  p = horner(p, g, 0x1.1ef186p-9f);
  p = horner(p, g, 0x1.55b7e4p-8f);
  p = horner(p, g, 0x1.99ce44p-7f);
  p = horner(p, g, 0x1.fffe5ep-6f);
  p = horner(p, g, 0x1.55550cp-4f);
  p = horner(p, g, 0x1p-2f);
  for (int i = 0; i < 2; i++)
    result.v[i] = sqrt(log_power.v[i] + (p.v[i] * (g.v[i] * g.v[i]) + g.v[i]));
  return result;
}

struct SinCos {
  Pair sin, cos;
};

// sin and cos of 2 pi x / 2^32: the low 30 bits are the angle inside a quadrant.
DLZO_INLINE SinCos sincos(U32 x0, U32 x1) {
  const U32 x[2] = {x0, x1};
  Pair z, t;
  for (int i = 0; i < 2; i++) z.v[i] = to_float(bits<I32>(x[i] << 2)) * 0x1p-31f;
  for (int i = 0; i < 2; i++) t.v[i] = z.v[i] * z.v[i];
  Pair a{{splat(-0x1.2d9bb8p-15f), splat(-0x1.2d9bb8p-15f)}};
  Pair b{{splat(0x1.d9f7bap-19f), splat(0x1.d9f7bap-19f)}};
  b = horner(b, t, -0x1.55c664p-12f);
  a = horner(a, t, 0x1.465ec6p-9f);
  b = horner(b, t, 0x1.03c1dep-6f);
  a = horner(a, t, -0x1.4abbbap-4f);
  b = horner(b, t, -0x1.3bd3ccp-2f);
  a = horner(a, t, 0x1.921fb6p-1f);
  b = horner(b, t, 1.0f);
  SinCos result;
  for (int i = 0; i < 2; i++) {
    const U32 odd = bits<U32>(a.v[i] * z.v[i]), even = bits<U32>(b.v[i]);
    const U32 quadrant = x[i] + 0x20000000u;  // bit 31: sign of the sine, bit 30: swap
    const I32 swap = (quadrant & 0x40000000u) != 0u;
    result.sin.v[i] = flip_sign(select(swap, even, odd), quadrant);
    result.cos.v[i] = flip_sign(select(swap, odd, even), x[i] + 0x60000000u);
  }
  return result;
}

// kGroup normals of consecutive elements, in order.
DLZO_INLINE Four box_muller(const Words& x) {
  const Pair r = radius(x.w[0], x.w[2]);
  const SinCos angle = sincos(x.w[1], x.w[3]);
  return transpose_parts(r.v[0] * angle.cos.v[0], r.v[0] * angle.sin.v[0], r.v[1] * angle.cos.v[1],
                         r.v[1] * angle.sin.v[1]);
}

// An array that a run walks through, element by element.
struct Operand {
  char* data;
  int64_t size;  // bytes per element
};

// Calls body(pointers, normals) for each group of a run of `count` elements, the first of which has
// the logical number `index`. A group that the run covers in part passes through a stage, so that
// heads and tails go through the same instructions as the rest.
template <int kOperands, class Body>
DLZO_INLINE void for_each_group(const Operand (&operands)[kOperands], int64_t count, uint64_t index,
                                Direction direction, Body body) {
  constexpr int kBatch = 16;  // groups whose words are made first: short loops overlap better
  Words words[kBatch];
  alignas(64) char stage[kOperands][kGroup * 4] = {};
  Schedule schedule = make_schedule(direction, (uint32_t)(index >> 34));
  char* pointers[kOperands];
  for (int64_t done = 0; done < count;) {
    const uint64_t element = index + (uint64_t)done;
    const int64_t skip = (int64_t)(element % kGroup), left = count - done;
    const uint32_t block_low = (uint32_t)((element - (uint64_t)skip) >> 2);
    if ((uint32_t)(element >> 34) != schedule.block_high)
      schedule = make_schedule(direction, (uint32_t)(element >> 34));
    for (int i = 0; i < kOperands; i++) pointers[i] = operands[i].data + done * operands[i].size;
    if (skip == 0 && left >= kGroup) {
      const uint32_t until_carry = (0u - block_low) / kLanes - 1u;
      const int64_t full = left / kGroup - 1 < until_carry ? left / kGroup : until_carry + 1;
      const int groups = full < kBatch ? (int)full : kBatch;
      for (int g = 0; g < groups; g += 2)
        philox<2>(block_low + (uint32_t)(g * kLanes), schedule, words + g);
      for (int g = 0; g < groups; g++) {
        body(pointers, box_muller(words[g]));
        for (int i = 0; i < kOperands; i++) pointers[i] += kGroup * operands[i].size;
      }
      done += groups * kGroup;
      continue;
    }
    const int64_t length = left < kGroup - skip ? left : kGroup - skip;
    char* staged[kOperands];
    for (int i = 0; i < kOperands; i++) {
      staged[i] = stage[i];
      memcpy(stage[i] + skip * operands[i].size, pointers[i], (size_t)(length * operands[i].size));
    }
    philox<1>(block_low, schedule, words);
    body(staged, box_muller(words[0]));
    const int64_t size = operands[0].size;  // operand 0 is the one written
    memcpy(pointers[0], stage[0] + skip * size, (size_t)(length * size));
    done += length;
  }
}

}  // namespace dlzo::DLZO_ISA
