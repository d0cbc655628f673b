// accumulate's other two parts: rounding the master into the live weights, and checking that they
// are that rounding.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

void round_into(char* out, DType out_dtype, const char* base, int64_t count) {
  with_dtype(out_dtype, [&](auto as) { narrow<as.value>(out, base, count, 1.0f); });
}

bool is_rounded(const char* out, DType out_dtype, const char* base, int64_t count) {
  constexpr int64_t kBlock = 512;
  const int64_t size = size_of(out_dtype);
  alignas(64) char rounded[kBlock * 4];
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t length = count - i < kBlock ? count - i : kBlock;
    round_into(rounded, out_dtype, base + i * 4, length);
    if (memcmp(rounded, out + i * size, (size_t)(length * size))) return false;
  }
  return true;
}

}  // namespace dlzo::DLZO_ISA
