// accumulate: master += scale_k * z_k for k = 0, 1, ... in order, each as perturb in place would,
// and out = round(master) at the end. The loop over the directions runs inside a chunk that stays
// in the L1 cache (kChunk in cpu.cpp), so the weights pass through memory once.
// Bytes moved per element: the master's size twice, and the size of out.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

void round_into(char* out, DType out_dtype, const char* base, int64_t count) {
  with_dtype(out_dtype, [&](auto as) { narrow<as.value>(out, base, count, 1.0f); });
}

}  // namespace dlzo::DLZO_ISA
