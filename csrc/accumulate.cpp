// accumulate: master += scale_k * z_k for k = 0, 1, ... in order, each as perturb in place would,
// and out = round(master) at the end. The loop over the directions runs inside a chunk that stays
// in the L1 cache (kChunk in cpu.cpp), so the weights pass through memory once.
// Bytes moved per element: the master's size twice, and the size of out.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

template <DType dtype>
static void copy_rounded(char* out, const char* base, int64_t count) {
  constexpr int64_t kStep = 2 * kLanes, kSize = size_of(dtype);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    store_pair<dtype>(out + i * kSize, load_pair<DType::kFloat32>(base + i * 4));
  alignas(64) char from[kStep * 4] = {}, to[kStep * 4];
  memcpy(from, base + i * 4, (size_t)(count - i) * 4);
  store_pair<dtype>(to, load_pair<DType::kFloat32>(from));
  memcpy(out + i * kSize, to, (size_t)((count - i) * kSize));
}

void round_into(char* out, DType out_dtype, const char* base, int64_t count) {
  with_dtype(out_dtype, [&](auto as) { copy_rounded<as.value>(out, base, count); });
}

}  // namespace dlzo::DLZO_ISA
