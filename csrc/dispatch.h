// Which ISAs were built, which of them this machine runs, and the one in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace dlzo {

struct Isa {
  std::string name;
  bool built, runs;
  std::string reason;  // why it was not built or does not run; empty otherwise
};

bool made_by_intel();     // the processor
std::vector<Isa> isas();  // best first

// Throws std::invalid_argument for an ISA that cannot run here.
void select_isa(const std::string& name);
const std::string& selected_isa();
const Kernels& kernels();

}  // namespace dlzo
