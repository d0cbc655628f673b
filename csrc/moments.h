// Central moments of a set of values, and how two sets combine.
#pragma once
#include <cstdint>
#include <cstring>

#include "both.h"

namespace dlzo {

// Beyond these, sums of fourth powers overflow, or those of a unit in the last place vanish.
constexpr float kLargest = 0x1p29f, kSmallest = 0x1p-12f;

struct Moments {
  int64_t count, argmax;  // argmax: the first position of the largest |x|
  float absmax;
  double mean, m2, m3, m4;  // m_k: sum of (x - mean)^k
};

// From power sums s[k - 1] of d^k with d = x - pivot.
DLZO_BOTH Moments central(int64_t count, const double (&s)[4], double pivot) {
  const double n = (double)count, m = s[0] / n;
  const double m2 = s[1] - m * s[0];
  const double m4 = s[3] - 4 * m * s[2] + 6 * m * m * s[1] - 3 * m * m * m * s[0];
  Moments result = {};
  result.count = count;
  result.mean = pivot + m;
  result.m2 = m2 < 0 ? 0 : m2;
  result.m3 = s[2] - 3 * m * s[1] + 2 * m * m * s[0];
  result.m4 = m4 < 0 ? 0 : m4;
  return result;
}

// The moments of scale * x.
DLZO_BOTH Moments rescale(Moments x, double scale) {
  x.mean *= scale;
  x.m2 *= scale * scale;
  x.m3 *= scale * scale * scale;
  x.m4 *= scale * scale * scale * scale;
  return x;
}

// Whether d about the pivot loses digits: its mean is more than half a standard deviation off.
DLZO_BOTH bool is_poor(double count, const double (&s)[4]) {
  return 5 * s[0] * s[0] > count * s[1];
}

// The power of two that brings |x| up to `largest` near 1, or 1 where the powers fit as they are.
DLZO_BOTH double scale_for(float largest) {
  const bool fits = largest >= kSmallest && largest <= kLargest;
  if (fits || largest == 0 || !(largest <= 0x1.fffffep127f)) return 1;
  // Of its bits as a float64, never subnormal, the exponent changes its sign.
  const double wide = largest;
  uint64_t bits;
  memcpy(&bits, &wide, sizeof bits);
  bits = (2045 - (bits >> 52)) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}

// The union of a and b, b's positions counted from `offset` (Pebay, SAND2008-6212, eq. 3.1).
DLZO_BOTH Moments combine(const Moments& a, const Moments& b, int64_t offset) {
  if (a.count == 0) {
    Moments first = b;
    first.argmax += offset;
    return first;
  }
  const double na = (double)a.count, nb = (double)b.count, n = na + nb;
  const double delta = b.mean - a.mean, step = delta / n, weight = delta * step * na * nb;
  Moments both = a;
  both.count = a.count + b.count;
  both.mean = a.mean + step * nb;
  both.m2 = a.m2 + b.m2 + weight;
  both.m3 = a.m3 + b.m3 + weight * step * (na - nb) + 3 * step * (na * b.m2 - nb * a.m2);
  both.m4 = a.m4 + b.m4 + weight * step * step * (na * na - na * nb + nb * nb) +
            6 * step * step * (na * na * b.m2 + nb * nb * a.m2) +
            4 * step * (na * b.m3 - nb * a.m3);
  const bool a_is_nan = a.absmax != a.absmax, b_is_nan = b.absmax != b.absmax;
  const bool larger = !a_is_nan && (b_is_nan || b.absmax > a.absmax);
  const bool same = (a_is_nan && b_is_nan) || a.absmax == b.absmax;
  if (larger || (same && b.argmax + offset < a.argmax)) {
    both.absmax = b.absmax;
    both.argmax = b.argmax + offset;
  }
  return both;
}

enum class Reduction : int { kTensor = 0, kChannel = 1, kToken = 2 };

// One array per statistic.
struct StatsOut {
  float* absmax;
  int64_t* argmax;
  double *mean, *variance, *kurtosis;
};

// The kurtosis of a constant is not a number.
DLZO_BOTH void write(const StatsOut& out, int64_t i, const Moments& m) {
  const double n = (double)m.count;
  out.absmax[i] = m.absmax;
  out.argmax[i] = m.argmax;
  out.mean[i] = m.mean;
  out.variance[i] = m.m2 / n;
  out.kurtosis[i] = n * m.m4 / (m.m2 * m.m2);
}

}  // namespace dlzo
