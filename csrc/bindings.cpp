// The Python module: integers and lists in, plain values out; no torch. Python validates.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu.h"
#include "dispatch.h"
#include "gpu.h"
#include "parallel.h"
#include "paths.h"
#if defined(DLZO_CUDA)
#include "cuda.h"
#endif

namespace py = pybind11;
using namespace dlzo;

namespace {

using Sizes = std::vector<int64_t>;
using Tensor = std::tuple<uintptr_t, int, Sizes>;  // data pointer, dtype code, strides

View view(const Tensor& tensor) {
  return {reinterpret_cast<char*>(std::get<0>(tensor)), static_cast<DType>(std::get<1>(tensor)),
          std::get<2>(tensor)};
}

StatsOut stats_out(const std::array<uintptr_t, 5>& out) {
  return {reinterpret_cast<float*>(out[0]), reinterpret_cast<int64_t*>(out[1]),
          reinterpret_cast<double*>(out[2]), reinterpret_cast<double*>(out[3]),
          reinterpret_cast<double*>(out[4])};
}

// The fields of Part in dlzo_kernels/ops/_parts.py.
using Part = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        uint64_t, int64_t, uint32_t>;

std::vector<gpu::Part> gpu_parts(const std::vector<Part>& parts) {
  std::vector<gpu::Part> result;
  for (const auto& [out, base, rows, columns, out_row, out_column, base_row, base_column, offset,
                    row_stride, stream] : parts)
    result.push_back({reinterpret_cast<char*>(out), reinterpret_cast<const char*>(base), rows,
                      columns, out_row, out_column, base_row, base_column, offset, row_stride,
                      stream, 0, 0});
  return result;
}

// The fields of Directions in dlzo_kernels/ops/_parts.py.
using Directions = std::tuple<int32_t, uint64_t, uint32_t, double, uintptr_t, uintptr_t, uintptr_t>;

gpu::Directions gpu_directions(const Directions& directions) {
  const auto& [count, seed, query, wide, seeds, queries, scales] = directions;
  float scale = 0;
  const auto round = [&scale, wide = wide](int64_t, int64_t) { scale = static_cast<float>(wide); };
  parallel_for(1, 1, 1, round);  // where subnormals are kept
  return {reinterpret_cast<const uint64_t*>(seeds),
          reinterpret_cast<const uint32_t*>(queries),
          reinterpret_cast<const float*>(scales),
          gpu::make_keys(seed),
          query,
          scale,
          count};
}

DType dtype_of(int code) { return static_cast<DType>(code); }

void bind_gpu(py::module_ module) {
  py::class_<gpu::Launch>(module, "Launch")
      .def_readonly("kernel", &gpu::Launch::kernel)
      .def_readonly("blocks", &gpu::Launch::blocks)
      .def_property_readonly("argument",
                             [](const gpu::Launch& launch) { return py::bytes(launch.argument); });
  module.attr("THREADS") = gpu::kThreads;
  module.attr("RUN") = gpu::kRun;
  module.attr("COLUMN_SEGMENT") = gpu::kColumnSegment;
  module.attr("PARTIAL_BYTES") = sizeof(Moments);
  module.def("gaussian", [](int out, const std::vector<Part>& parts, const Directions& directions) {
    return gpu::gaussian(dtype_of(out), gpu_parts(parts), gpu_directions(directions));
  });
  module.def("perturb",
             [](int out, int base, const std::vector<Part>& parts, const Directions& directions) {
               return gpu::perturb(dtype_of(out), dtype_of(base), gpu_parts(parts),
                                   gpu_directions(directions));
             });
  module.def("accumulate", [](int out, int base, bool writes_out, const std::vector<Part>& parts,
                              const Directions& directions, uintptr_t gate) {
    return gpu::accumulate(dtype_of(out), dtype_of(base), writes_out, gpu_parts(parts),
                           gpu_directions(directions), reinterpret_cast<const int32_t*>(gate));
  });
  module.def("partials", [](int64_t rows, int64_t channels, int reduction) {
    return gpu::partials(rows, channels, static_cast<Reduction>(reduction));
  });
  module.def("activation_stats",
             [](uintptr_t x, int dtype, int64_t rows, int64_t channels, int reduction,
                const std::array<uintptr_t, 5>& out, uintptr_t workspace) {
               return gpu::activation_stats(reinterpret_cast<const char*>(x), dtype_of(dtype), rows,
                                            channels, static_cast<Reduction>(reduction),
                                            stats_out(out), reinterpret_cast<Moments*>(workspace));
             });
  module.def("walk", [](uintptr_t parents, int64_t tokens, int64_t rows, uintptr_t out) {
    const auto row = [&](int64_t i) { return reinterpret_cast<int32_t*>(out) + i * tokens; };
    return walk(reinterpret_cast<const int64_t*>(parents), tokens, rows,
                {row(0), row(1), row(2), row(3), row(4)});
  });
}

#if defined(DLZO_CUDA)
void bind_cuda(py::module_ module) {
  module.attr("ARCHITECTURES") = DLZO_CUDA;
  module.def("launch", [](const std::vector<gpu::Launch>& launches, uintptr_t stream) {
    gpu::launch(launches, reinterpret_cast<void*>(stream));
  });
  module.def("why_no_device", &gpu::why_no_device);
}
#endif

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
         uint64_t seed, uint32_t stream, uint32_t query, double scale, int threads) {
        perturb(view(out), view(base), {std::move(shape), offset, row_stride},
                {seed, stream, query}, scale, threads);
      },
      unlocked);
  module.def(
      "accumulate",
      [](const Tensor& out, const Tensor& base, Sizes shape, uint64_t offset, int64_t row_stride,
         const std::vector<uint64_t>& seeds, uint32_t stream, const std::vector<uint32_t>& queries,
         const std::vector<double>& scales, int threads) {
        std::vector<Direction> directions;
        for (size_t k = 0; k < seeds.size(); k++)
          directions.push_back({seeds[k], stream, queries[k]});
        accumulate(view(out), view(base), {std::move(shape), offset, row_stride}, directions,
                   scales, threads);
      },
      unlocked);
  module.def(
      "is_rounded",
      [](uintptr_t out, int dtype, uintptr_t master, int64_t count, int threads) {
        return is_rounded(reinterpret_cast<const char*>(out), dtype_of(dtype),
                          reinterpret_cast<const char*>(master), count, threads);
      },
      unlocked);
  module.def(
      "add_low_rank",
      [](const Tensor& out, const Tensor& master, const Sizes& shape, uintptr_t u, uintptr_t v,
         int64_t rank, double scale, int threads) {
        add_low_rank(view(out), view(master), shape, reinterpret_cast<const float*>(u),
                     reinterpret_cast<const float*>(v), rank, scale, threads);
      },
      unlocked);
  module.def(
      "activation_stats",
      [](uintptr_t x, int dtype, int64_t rows, int64_t channels, int reduction,
         std::array<uintptr_t, 5> out, int threads) {
        activation_stats(reinterpret_cast<const char*>(x), dtype_of(dtype), rows, channels,
                         static_cast<Reduction>(reduction), stats_out(out), threads);
      },
      unlocked);
  module.def(
      "tree_attention",
      [](const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out,
         uintptr_t parents, std::array<int64_t, 6> sizes, float scale, int64_t window,
         float softcap, int threads) {
        const auto& [batch, heads, key_heads, tokens, head_size, value_size] = sizes;
        tree_attention(view(query), view(key), view(value), view(out),
                       reinterpret_cast<const int64_t*>(parents),
                       {batch, heads, key_heads, tokens, head_size, value_size}, scale, window,
                       softcap, threads);
      },
      unlocked);
  module.def(
      "rms_norm",
      [](uintptr_t out, uintptr_t x, uintptr_t weight, int dtype, int64_t rows, int64_t size,
         float eps, int threads) {
        rms_norm(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(x),
                 reinterpret_cast<const char*>(weight), dtype_of(dtype), rows, size, eps, threads);
      },
      unlocked);
  module.def("made_by_intel", &made_by_intel);
  module.def("isas", [] {
    std::vector<std::tuple<std::string, bool, bool, std::string>> rows;
    for (const Isa& isa : isas()) rows.emplace_back(isa.name, isa.built, isa.runs, isa.reason);
    return rows;
  });
  module.def("select_isa", &select_isa);
  module.def("selected_isa", &selected_isa);
  module.def("thread_pool", &thread_pool);
  bind_gpu(module.def_submodule("gpu", "Plans of kernel launches."));
#if defined(DLZO_CUDA)
  bind_cuda(module.def_submodule("cuda", "The CUDA column."));
#endif
}
