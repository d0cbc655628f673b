// accumulate: master += scale_k * z_k for k = 0, 1, ... in order, each as perturb in place would,
// and out = round(master) at the end. A thread keeps its elements in registers over all directions,
// so the weights pass through memory once.
// Bytes moved per element: the master's size twice, and the size of out.
#include "parts.cuh"

namespace dlzo::gpu {

template <DType out_dtype, DType base_dtype, bool writes_out>
DLZO_DEVICE void accumulate(const NoiseArguments& arguments) {
  const Directions& directions = arguments.directions;
  const int count = arguments.gate && *arguments.gate == 0 ? 0 : directions.count;
  for_each_group(arguments, [&](const Part& part, const Group& group) {
    float values[kGroup], z[kGroup];
    load_base<base_dtype>(part, group, values);
#pragma unroll 1
    for (int k = 0; k < count; k++) {
      const Keys keys = directions.seeds ? make_keys(directions.seeds[k]) : directions.keys;
      const uint32_t query = directions.queries ? directions.queries[k] : directions.query;
      const float scale = directions.scales ? directions.scales[k] : directions.scale;
      normals(group.block_low, group.block_high, part.stream, query, keys, z);
#pragma unroll
      for (int i = 0; i < kGroup; i++)
        values[i] = rounded<base_dtype>(__fadd_rn(values[i], __fmul_rn(scale, z[i])));
    }
    if (count > 0) store_base<base_dtype>(part, group, values);
    if (writes_out) store_out<out_dtype>(part, group, values);
  });
}

constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;

DLZO_KERNEL(accumulate_float32, NoiseArguments, accumulate<f32, f32, false>)
DLZO_KERNEL(accumulate_bfloat16, NoiseArguments, accumulate<bf16, bf16, false>)
DLZO_KERNEL(accumulate_float16, NoiseArguments, accumulate<f16, f16, false>)
DLZO_KERNEL(accumulate_float32_into_float32, NoiseArguments, accumulate<f32, f32, true>)
DLZO_KERNEL(accumulate_float32_into_bfloat16, NoiseArguments, accumulate<bf16, f32, true>)
DLZO_KERNEL(accumulate_float32_into_float16, NoiseArguments, accumulate<f16, f32, true>)

}  // namespace dlzo::gpu
