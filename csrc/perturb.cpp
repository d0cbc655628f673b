// perturb: out = round(float32(base) + scale * z), one rounded product and one rounded sum.
// In place where out is base. Formula, counters and error bound of z: noise.h.
// Bytes moved per element: the sizes of both storage types, one read and one written.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

template <DType out_dtype, DType base_dtype>
static void apply(char* out, const char* base, int64_t count, uint64_t index, Direction direction,
                  float scale) {
  const Operand operands[] = {{out, size_of(out_dtype)},
                              {const_cast<char*>(base), size_of(base_dtype)}};
  for_each_group(operands, count, index, direction, [scale](char** pointers, const Four& z) {
    for (int i = 0; i < 4; i += 2) {
      Pair value = load_pair<base_dtype>(pointers[1] + i * kLanes * size_of(base_dtype));
      value.v[0] += scale * z.v[i];
      value.v[1] += scale * z.v[i + 1];
      store_pair<out_dtype>(pointers[0] + i * kLanes * size_of(out_dtype), value);
    }
  });
}

void perturb(char* out, DType out_dtype, const char* base, DType base_dtype, int64_t count,
             uint64_t index, Direction direction, float scale) {
  constexpr DType f32 = DType::kFloat32, bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  const auto run = base_dtype == bf16  ? apply<bf16, bf16>
                   : base_dtype == f16 ? apply<f16, f16>
                   : out_dtype == bf16 ? apply<bf16, f32>
                   : out_dtype == f16  ? apply<f16, f32>
                                       : apply<f32, f32>;
  run(out, base, count, index, direction, scale);
}

}  // namespace dlzo::DLZO_ISA
