// The storage types, by the codes that Python passes.
#pragma once
#include <cstdint>

namespace dlzo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace dlzo
