// Trees of tokens that share prefixes, as runs: a token attends to the pieces on its run's path.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace dlzo {

// Tokens [begin, end), each the parent of the next.
struct Run {
  int64_t begin, end;
  std::vector<Piece> path;  // the run itself comes last

  int64_t position(int64_t token) const { return path.back().position + token - begin; }
  int64_t slot(int64_t token) const { return path.back().slot + token - begin; }
};

struct Paths {
  std::vector<Run> runs;
  int64_t slots;    // of packed keys: each run begins a new panel
  int64_t longest;  // columns of scores that a path may need

  // parents[i] is the token before token i in its sequences, -1 for the first.
  // Throws std::invalid_argument unless each parent comes before its token.
  Paths(const int64_t* parents, int64_t tokens);
};

}  // namespace dlzo
