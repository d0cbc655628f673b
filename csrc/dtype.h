// The storage types, by the codes that Python passes.
#pragma once
#include <cstdint>

#include "both.h"

namespace dlzo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

DLZO_BOTH constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace dlzo
