#include "paths.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dlzo {
namespace {

int64_t parent_of(const int64_t* parents, int64_t token) {
  const int64_t parent = parents[token];
  if (parent < -1 || parent >= token)
    throw std::invalid_argument("the parent of token " + std::to_string(token) + " is " +
                                std::to_string(parent) + "; give an earlier token, or -1 for none");
  return parent;
}

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
    const int64_t parent = parent_of(parents, begin);
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

int64_t walk(const int64_t* parents, int64_t tokens, int64_t rows, const Walk& out) {
  std::vector<int32_t> size(tokens, 1), place(tokens), next(tokens);
  for (int64_t i = tokens - 1; i >= 0; i--)
    if (parent_of(parents, i) >= 0) size[parents[i]] += size[i];
  int32_t next_root = 0;
  int64_t tiles = 0;
  for (int64_t i = 0; i < tokens; i++) {
    const int64_t parent = parents[i];
    int32_t& free = parent < 0 ? next_root : next[parent];
    const int32_t at = place[i] = free, end = free += size[i];
    next[i] = at + 1;
    out.token[at] = i;
    out.behind[at] = end;
    out.depth[at] = parent < 0 ? 0 : out.depth[place[parent]] + 1;
    for (int64_t first = at; parent < 0 && first < end; first += rows) {
      out.first[tiles] = first;
      out.root[tiles++] = at;
    }
  }
  return tiles;
}

}  // namespace dlzo
