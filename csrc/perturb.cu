// perturb: out = round(float32(base) + scale * z), one rounded product and one rounded sum.
// In place where out is base. Formula, counters and error bound of z: noise.h.
// Bytes moved per element: the sizes of both storage types, one read and one written.
#include "parts.cuh"

namespace dlzo::gpu {

// `indirect`: seed or scale lie in device memory, where a captured launch finds new ones.
template <DType out_dtype, DType base_dtype, bool indirect>
DLZO_DEVICE void perturb(const NoiseArguments& arguments) {
  const Directions& direction = arguments.directions;
  const Keys keys = indirect && direction.seeds ? make_keys(*direction.seeds) : direction.keys;
  const float scale = indirect && direction.scales ? *direction.scales : direction.scale;
  for_each_group(arguments, [&](const Part& part, const Group& group) {
    float values[kGroup], z[kGroup];
    load_base<base_dtype>(part, group, values);
    normals(group.block_low, group.block_high, part.stream, direction.query, keys, z);
#pragma unroll
    for (int i = 0; i < kGroup; i++) values[i] = __fadd_rn(values[i], __fmul_rn(scale, z[i]));
    store_out<out_dtype>(part, group, values);
  });
}

constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;

#define DLZO_KERNELS(suffix, indirect)                                                          \
  DLZO_KERNEL(perturb_float32_float32##suffix, NoiseArguments, perturb<f32, f32, indirect>)     \
  DLZO_KERNEL(perturb_bfloat16_bfloat16##suffix, NoiseArguments, perturb<bf16, bf16, indirect>) \
  DLZO_KERNEL(perturb_float16_float16##suffix, NoiseArguments, perturb<f16, f16, indirect>)     \
  DLZO_KERNEL(perturb_bfloat16_float32##suffix, NoiseArguments, perturb<bf16, f32, indirect>)   \
  DLZO_KERNEL(perturb_float16_float32##suffix, NoiseArguments, perturb<f16, f32, indirect>)
DLZO_KERNELS(, false)
DLZO_KERNELS(_indirect, true)

}  // namespace dlzo::gpu
