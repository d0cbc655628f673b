// gaussian: out = round(z). Formula, counters and error bound: noise.h.
// Bytes moved per element: the size of the storage type, written.
#include "parts.cuh"

namespace dlzo::gpu {

template <DType dtype>
DLZO_DEVICE void fill(const NoiseArguments& arguments) {
  const Directions& direction = arguments.directions;
  for_each_group(arguments, [&](const Part& part, const Group& group) {
    float z[kGroup];
    normals(group.block_low, group.block_high, part.stream, direction.query, direction.keys, z);
    store_out<dtype>(part, group, z);
  });
}

DLZO_KERNEL(gaussian_float32, NoiseArguments, fill<DType::kFloat32>)
DLZO_KERNEL(gaussian_bfloat16, NoiseArguments, fill<DType::kBFloat16>)
DLZO_KERNEL(gaussian_float16, NoiseArguments, fill<DType::kFloat16>)

}  // namespace dlzo::gpu
