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
};

struct Paths {
  std::vector<Run> runs;
  int64_t slots;    // of packed keys: each run begins a new panel
  int64_t longest;  // columns of scores that a path may need

  // parents[i] is the token before token i in its sequences, -1 for the first.
  // Throws std::invalid_argument unless each parent comes before its token.
  Paths(const int64_t* parents, int64_t tokens);
};

// Trees in an order in which a token's descendants follow it: arrays of `tokens` numbers.
struct Walk {
  int32_t* token;   // at each place
  int32_t* behind;  // the first place behind its descendants
  int32_t* depth;   // how many tokens come before it in its sequence
  int32_t* first;   // of each tile, its first place
  int32_t* root;    // of each tile, the first place of its tree
};

// Fills in a walk; a tile is a run of at most `rows` places in one tree. Returns their number.
// Throws as Paths does.
int64_t walk(const int64_t* parents, int64_t tokens, int64_t rows, const Walk& out);

}  // namespace dlzo
