// add_low_rank: out = round(base + scale * z) for one row of z = U V^T,
// z_j = u_0 v_0j + u_1 v_1j + ... (LOZO, arXiv 2410.07698).
//
// Products and sums are rounded one by one, in this order: the bits do not depend on the ISA.
// Bytes moved per element: 4 read, those of out written; V, 4 rank bytes a column, stays in caches.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

// out = round(base + scale * z) of kStep columns; row(k) are the numbers of V's row k.
template <DType dtype, class Row>
DLZO_INLINE void add_step(char* out, const char* base, const Factors& factors, float scale,
                          Row row) {
  Pair z = row(0), value = load_pair<DType::kFloat32>(base);
  for (int i = 0; i < 2; i++) z.v[i] *= factors.u[0];
  for (int64_t k = 1; k < factors.rank; k++) {
    const Pair v = row(k);
    for (int i = 0; i < 2; i++) z.v[i] += factors.u[k] * v.v[i];
  }
  for (int i = 0; i < 2; i++) value.v[i] += scale * z.v[i];
  store_pair<dtype>(out, value);
}

template <DType dtype>
static void add_row(char* out, const char* base, const Factors& factors, int64_t count,
                    float scale) {
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep)
    add_step<dtype>(out + i * size_of(dtype), base + i * 4, factors, scale, [&](int64_t k) {
      return load_pair<DType::kFloat32>((const char*)(factors.v + k * factors.v_step + i));
    });
  if (i == count) return;
  const size_t left = (size_t)(count - i);
  alignas(64) char last[kStep * 4] = {}, stage[kStep * 4];
  memcpy(last, base + i * 4, left * 4);
  add_step<dtype>(stage, last, factors, scale, [&](int64_t k) {
    alignas(64) char numbers[kStep * 4] = {};
    memcpy(numbers, factors.v + k * factors.v_step + i, left * 4);
    return load_pair<DType::kFloat32>(numbers);
  });
  memcpy(out + i * size_of(dtype), stage, left * size_of(dtype));
}

void add_low_rank(char* out, DType out_dtype, const char* base, const Factors& factors,
                  int64_t count, float scale) {
  with_dtype(out_dtype, [&](auto as) { add_row<as.value>(out, base, factors, count, scale); });
}

}  // namespace dlzo::DLZO_ISA
