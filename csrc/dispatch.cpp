#include "dispatch.h"

#include <stdexcept>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dlzo {

// Each made by table.cpp, compiled for its ISA.
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}

namespace {

struct Entry {
  Isa isa;
  const Kernels* kernels;
};

#if defined(__x86_64__)
// Not all compilers have a name for it in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<Entry> probe() {
  const Entry baseline{{"baseline", true, true, ""}, &baseline::table};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        has_f16c() && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
  const char* lacks = "this processor lacks it";
  std::vector<Entry> best_first = {
      {{"avx512bf16", true, has_bf16, has_bf16 ? "" : lacks}, &avx512bf16::table},
      {{"avx512", true, has_avx512, has_avx512 ? "" : lacks}, &avx512::table},
      {{"avx2", true, has_avx2, has_avx2 ? "" : lacks}, &avx2::table},
      baseline};
  // Intel's products of bfloat16 pairs are slower than its float32 ones.
  if (made_by_intel()) std::swap(best_first[0], best_first[1]);
  return best_first;
#else
  const char* foreign = "an x86-64 instruction set; this build is for another architecture";
  return {{{"avx512bf16", false, false, foreign}, nullptr},
          {{"avx512", false, false, foreign}, nullptr},
          {{"avx2", false, false, foreign}, nullptr},
          baseline};
#endif
}

const std::vector<Entry>& entries() {
  static const std::vector<Entry> probed = probe();
  return probed;
}

const Entry* best() {
  for (const Entry& entry : entries())
    if (entry.isa.runs) return &entry;
  return nullptr;
}

const Entry*& selected() {
  static const Entry* entry = best();
  return entry;
}

}  // namespace

bool made_by_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

std::vector<Isa> isas() {
  std::vector<Isa> result;
  for (const Entry& entry : entries()) result.push_back(entry.isa);
  return result;
}

void select_isa(const std::string& name) {
  std::string runnable;
  for (const Entry& entry : entries()) {
    if (!entry.isa.runs) {
      if (entry.isa.name == name)
        throw std::invalid_argument("the ISA '" + name + "' cannot run here: " + entry.isa.reason);
      continue;
    }
    if (entry.isa.name == name) {
      selected() = &entry;
      return;
    }
    runnable += (runnable.empty() ? "" : ", ") + entry.isa.name;
  }
  throw std::invalid_argument("unknown ISA '" + name + "'; this machine runs: " + runnable);
}

const std::string& selected_isa() { return selected()->isa.name; }
const Kernels& kernels() { return *selected()->kernels; }

}  // namespace dlzo
