// The Python module: integers and lists in, plain values out; no torch. Python validates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu.h"
#include "dispatch.h"
#include "parallel.h"

namespace py = pybind11;
using namespace dlzo;

namespace {

using Sizes = std::vector<int64_t>;
using Tensor = std::tuple<uintptr_t, int, Sizes>;  // data pointer, dtype code, strides

View view(const Tensor& tensor) {
  return {reinterpret_cast<char*>(std::get<0>(tensor)), static_cast<DType>(std::get<1>(tensor)),
          std::get<2>(tensor)};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  module.def(
      "gaussian",
      [](const Tensor& out, Sizes shape, uint64_t offset, int64_t row_stride, uint64_t seed,
         uint32_t stream, uint32_t query, int threads) {
        gaussian(view(out), {std::move(shape), offset, row_stride}, {seed, stream, query}, threads);
      },
      unlocked);
  module.def(
      "perturb",
      [](const Tensor& out, const Tensor& base, Sizes shape, uint64_t offset, int64_t row_stride,
         uint64_t seed, uint32_t stream, uint32_t query, float scale, int threads) {
        perturb(view(out), view(base), {std::move(shape), offset, row_stride},
                {seed, stream, query}, scale, threads);
      },
      unlocked);
  module.def(
      "accumulate",
      [](const Tensor& out, const Tensor& base, Sizes shape, uint64_t offset, int64_t row_stride,
         const std::vector<uint64_t>& seeds, uint32_t stream, const std::vector<uint32_t>& queries,
         const std::vector<float>& scales, int threads) {
        std::vector<Direction> directions;
        for (size_t k = 0; k < seeds.size(); k++)
          directions.push_back({seeds[k], stream, queries[k]});
        accumulate(view(out), view(base), {std::move(shape), offset, row_stride}, directions,
                   scales, threads);
      },
      unlocked);
  module.def(
      "activation_stats",
      [](uintptr_t x, int dtype, int64_t rows, int64_t channels, int reduction,
         std::array<uintptr_t, 5> out, int threads) {
        activation_stats(reinterpret_cast<const char*>(x), static_cast<DType>(dtype), rows,
                         channels, static_cast<Reduction>(reduction),
                         {reinterpret_cast<float*>(out[0]), reinterpret_cast<int64_t*>(out[1]),
                          reinterpret_cast<double*>(out[2]), reinterpret_cast<double*>(out[3]),
                          reinterpret_cast<double*>(out[4])},
                         threads);
      },
      unlocked);
  module.def("isas", [] {
    std::vector<std::tuple<std::string, bool, bool, std::string>> rows;
    for (const Isa& isa : isas()) rows.emplace_back(isa.name, isa.built, isa.runs, isa.reason);
    return rows;
  });
  module.def("select_isa", &select_isa);
  module.def("selected_isa", &selected_isa);
  module.def("thread_pool", &thread_pool);
}
