// What the extension offers where it was built with CUDA.
#pragma once
#include <string>
#include <vector>

#include "gpu.h"

namespace dlzo::gpu {

// Enqueues kernels on a stream of the current device; throws std::runtime_error where that fails.
void launch(const std::vector<Launch>& launches, void* stream);

// Why no kernel can run: empty where a device is there.
std::string why_no_device();

}  // namespace dlzo::gpu
