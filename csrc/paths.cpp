#include "paths.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dlzo {
namespace {

// The run that holds a token: runs are in the order of their tokens.
const Run& run_of(const std::vector<Run>& runs, int64_t token) {
  const auto behind = std::upper_bound(runs.begin(), runs.end(), token,
                                       [](int64_t t, const Run& run) { return t < run.begin; });
  return *(behind - 1);
}

// The path that ends with a token; empty for none.
std::vector<Piece> path_to(const std::vector<Run>& runs, int64_t token) {
  if (token < 0) return {};
  const Run& run = run_of(runs, token);
  std::vector<Piece> path = run.path;
  path.back().count = token + 1 - run.begin;
  return path;
}

}  // namespace

Paths::Paths(const int64_t* parents, int64_t tokens) : slots(0), longest(0) {
  for (int64_t begin = 0, end; begin < tokens; begin = end) {
    const int64_t parent = parents[begin];
    if (parent < -1 || parent >= begin)
      throw std::invalid_argument("the parent of token " + std::to_string(begin) + " is " +
                                  std::to_string(parent) +
                                  "; give an earlier token, or -1 for none");
    for (end = begin + 1; end < tokens && parents[end] == end - 1;) end++;
    std::vector<Piece> path = path_to(runs, parent);
    const int64_t position = path.empty() ? 0 : path.back().position + path.back().count;
    path.push_back({slots, end - begin, position});
    slots += padded(end - begin);
    int64_t columns = 0;
    for (const Piece& piece : path) columns += padded(piece.count);
    longest = std::max(longest, columns);
    runs.push_back({begin, end, std::move(path)});
  }
}

}  // namespace dlzo
