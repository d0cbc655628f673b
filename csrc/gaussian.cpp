// gaussian: out = round(z). Formula, counters and error bound: noise.h.
// Bytes moved per element: the size of the storage type, written.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

template <DType dtype>
static void fill(char* out, int64_t count, uint64_t index, Direction direction) {
  const int64_t size = size_of(dtype);
  for_each_group({{out, size}}, count, index, direction, [](char** pointers, const Four& z) {
    for (int i = 0; i < 4; i += 2)
      store_pair<dtype>(pointers[0] + i * kLanes * size_of(dtype), {{z.v[i], z.v[i + 1]}});
  });
}

void gaussian(char* out, DType dtype, int64_t count, uint64_t index, Direction direction) {
  with_dtype(dtype, [&](auto as) { fill<as.value>(out, count, index, direction); });
}

}  // namespace dlzo::DLZO_ISA
