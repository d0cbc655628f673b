#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "dispatch.h"
#include "parallel.h"
#include "paths.h"

namespace dlzo {
namespace {

constexpr int64_t kChunk = 4096;  // elements that stay in the L1 cache while they are worked on
constexpr int64_t kShort = 128;   // rows for which a run each takes longer than packing some
// Elements that are worth a thread: waking one costs some microseconds, far more on a busy machine.
constexpr int64_t kMinNoise = 1 << 15, kMinStats = 1 << 18, kMinProducts = 1 << 20;

int64_t product(const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (const int64_t size : sizes) result *= size;
  return result;
}

// Makes one of the last two dimensions where all views go on from row to row as within a row.
bool join_last(std::vector<int64_t>& shape, View (&views)[2]) {
  if (shape.size() < 2) return false;
  const size_t last = shape.size() - 1;
  const int64_t rows = shape[last - 1], columns = shape[last];
  for (const View& view : views)
    if (rows != 1 && columns != 1 && view.strides[last - 1] != columns * view.strides[last])
      return false;
  // A dimension of one element has a stride that says nothing.
  for (View& view : views) view.strides.erase(view.strides.end() - (columns == 1 ? 1 : 2));
  shape.pop_back();
  shape.back() = rows * columns;
  return true;
}

char* address_of(const View& view, const std::vector<int64_t>& shape, int64_t row, int64_t column) {
  int64_t position = column * view.strides.back();
  for (size_t d = shape.size() - 1; d-- > 0; row /= shape[d])
    position += row % shape[d] * view.strides[d];
  return view.data + position * size_of(view.dtype);
}

template <class Element>
void copy_strided(char* out, int64_t out_stride, const char* in, int64_t in_stride, int64_t count) {
  auto* to = reinterpret_cast<Element*>(out);
  auto* from = reinterpret_cast<const Element*>(in);
  for (int64_t i = 0; i < count; i++) to[i * out_stride] = from[i * in_stride];
}

// What a run takes: a part of a row, or some whole rows.
struct Block {
  int64_t row, rows, column, columns;
};

void copy_block(const View& view, const std::vector<int64_t>& shape, const Block& block,
                char* packed, bool pack) {
  const auto copy = size_of(view.dtype) == 4 ? copy_strided<uint32_t> : copy_strided<uint16_t>;
  const int64_t stride = view.strides.back(), count = block.columns;
  for (int64_t i = 0; i < block.rows; i++, packed += count * size_of(view.dtype)) {
    char* data = address_of(view, shape, block.row + i, block.column);
    if (pack) copy(packed, 1, data, stride, count);
    else copy(data, stride, packed, 1, count);
  }
}

enum class Base { kNone, kRead, kWritten };

// Walks all elements in contiguous runs of at most kChunk: body(out, base, count, index). What does
// not lie side by side is packed into a buffer where it is read (out only without a base), and put
// back where it is written. `normals`: how many an element takes.
template <class Body>
void for_each_run(const View& out, const View& base, Base use, Numbering numbering, int threads,
                  Body body, int64_t normals = 1) {
  std::vector<int64_t>& shape = numbering.shape;
  const int64_t total = product(shape);
  if (total == 0) return;
  View views[2] = {out, base};
  const int read = use == Base::kNone ? 0 : 1, written = use == Base::kWritten ? 2 : 1;
  if (numbering.row_stride == shape.back() || total == shape.back()) {
    while (join_last(shape, views)) continue;
    numbering.row_stride = shape.back();
  }
  const int64_t columns = shape.back(), rows = total / columns;
  const bool packs_rows = numbering.row_stride == columns && columns < kShort;
  const int64_t height = packs_rows ? kChunk / columns : 1;
  const int64_t chunks_per_row = (columns + kChunk - 1) / kChunk;
  const int64_t chunks = (rows + height - 1) / height * chunks_per_row;
  const int64_t chunk_size = std::min(columns * std::min(rows, height), kChunk);
  const int64_t work = chunk_size * std::max<int64_t>(normals, 1);
  const int64_t grain = (kMinNoise + work - 1) / work;
  parallel_for(chunks, grain, threads, [&](int64_t begin, int64_t end) {
    alignas(64) char buffers[2][kChunk * 4];
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t row = chunk / chunks_per_row * height;
      const int64_t column = chunk % chunks_per_row * kChunk;
      const Block block = {row, std::min(rows - row, height), column,
                           std::min(columns - column, kChunk)};
      const int64_t count = block.rows * block.columns;
      char* data[2];
      for (int i = 0; i < 2; i++) {
        const bool is_run = count == 1 || (block.rows == 1 && views[i].strides.back() == 1);
        data[i] = is_run ? address_of(views[i], shape, row, column) : buffers[i];
        if (!is_run && i == read) copy_block(views[i], shape, block, data[i], true);
      }
      const uint64_t first =
          static_cast<uint64_t>(row) * static_cast<uint64_t>(numbering.row_stride);
      const uint64_t index = numbering.offset + first + static_cast<uint64_t>(column);
      body(data[0], data[1], count, index);
      for (int i = 0; i < written; i++)
        if (data[i] == buffers[i]) copy_block(views[i], shape, block, data[i], false);
    }
  });
}

// Of segment i of `count` values; `known` as in Kernels.
Moments segment_moments(const char* x, DType dtype, int64_t count, int64_t i, int32_t* known) {
  const int64_t first = i * kSegment;
  return kernels().moments(x + first * size_of(dtype), dtype, std::min(count - first, kSegment),
                           known);
}

// In a thread of many: it allocates nothing, as running out of memory could not be told there.
Moments row_moments(const char* x, DType dtype, int64_t count) {
  Moments result = {};
  int32_t known = -1;
  for (int64_t i = 0; i * kSegment < count; i++)
    result = combine(result, segment_moments(x, dtype, count, i, &known), i * kSegment);
  return result;
}

Moments tensor_moments(const char* x, DType dtype, int64_t count, int threads) {
  const int64_t segments = (count + kSegment - 1) / kSegment;
  std::vector<Moments> parts(static_cast<size_t>(segments));
  parallel_for(segments, kMinStats / kSegment, threads, [&](int64_t begin, int64_t end) {
    int32_t known = -1;
    for (int64_t i = begin; i < end; i++)
      parts[static_cast<size_t>(i)] = segment_moments(x, dtype, count, i, &known);
  });
  Moments result = {};
  for (int64_t i = 0; i < segments; i++)
    result = combine(result, parts[static_cast<size_t>(i)], i * kSegment);
  return result;
}

// The moments of `width` channels from `channel` on, over all rows.
void column_moments(const char* x, DType dtype, int64_t rows, int64_t channels, int64_t channel,
                    int width, Moments* result) {
  const int64_t step = channels * size_of(dtype);
  for (int64_t before = 0; before < rows; before += kSegmentRows)
    kernels().channel_moments(x + before * step + channel * size_of(dtype), dtype, before,
                              std::min(rows - before, kSegmentRows), step, width, result);
}

// A view of shape (batch, heads, tokens, size) at one vector.
char* vector_at(const View& view, int64_t batch, int64_t head, int64_t token) {
  const int64_t at = batch * view.strides[0] + head * view.strides[1] + token * view.strides[2];
  return view.data + at * size_of(view.dtype);
}

Vectors vectors_of(const View& view, int64_t batch, int64_t head, const Run& run) {
  return {vector_at(view, batch, head, run.begin), view.strides[2] * size_of(view.dtype),
          run.end - run.begin, view.dtype};
}

struct Free {
  void operator()(float* floats) const { operator delete[](floats, std::align_val_t{64}); }
};
using Floats = std::unique_ptr<float[], Free>;

// Room for vectors that never straddle two cache lines.
Floats floats(int64_t count) {
  return Floats(new (std::align_val_t{64}) float[static_cast<size_t>(count)]);
}

// The keys and values of all heads, as attend() reads them.
class PackedKeys {
 public:
  PackedKeys(const View& key, const View& value, const AttentionSizes& sizes, const Paths& paths,
             int threads)
      : slots_(paths.slots), sizes_(sizes), value_size_(padded(sizes.value_size)) {
    const int64_t heads = sizes.batch * sizes.key_heads;
    keys_ = floats(heads * slots_ * sizes.head_size);
    values_ = floats(heads * slots_ * value_size_);
    const int64_t runs = static_cast<int64_t>(paths.runs.size());
    const int64_t grain = 1 + kMinNoise * runs / (slots_ * sizes.head_size);
    parallel_for(heads * runs, grain, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        pack(key, value, i / runs, paths.runs[static_cast<size_t>(i % runs)]);
    });
  }

  const float* keys(int64_t head) const { return keys_.get() + head * slots_ * sizes_.head_size; }
  const float* values(int64_t head) const { return values_.get() + head * slots_ * value_size_; }

 private:
  void pack(const View& key, const View& value, int64_t head, const Run& run) {
    const int64_t b = head / sizes_.key_heads, h = head % sizes_.key_heads;
    const int64_t slot = head * slots_ + run.path.back().slot;
    kernels().pack_keys(keys_.get() + slot * sizes_.head_size, vectors_of(key, b, h, run),
                        sizes_.head_size);
    kernels().pack_values(values_.get() + slot * value_size_, vectors_of(value, b, h, run),
                          sizes_.value_size);
  }

  int64_t slots_;
  AttentionSizes sizes_;
  int64_t value_size_;
  Floats keys_, values_;
};

// Up to kRows rows of queries: row r of a run is that of its token r / group, and of one head of
// the group that shares a key head.
struct Tile {
  const Run* run;
  int64_t first;
  int rows;
};

std::vector<Tile> tiles_of(const Paths& paths, int64_t group) {
  std::vector<Tile> tiles;
  for (const Run& run : paths.runs) {
    const int64_t rows = (run.end - run.begin) * group;
    for (int64_t first = 0; first < rows; first += kRows)
      tiles.push_back({&run, first, static_cast<int>(std::min<int64_t>(kRows, rows - first))});
  }
  return tiles;
}

}  // namespace

void gaussian(const View& out, const Numbering& numbering, Direction direction, int threads) {
  const Kernels& isa = kernels();
  for_each_run(out, out, Base::kNone, numbering, threads,
               [&](char* to, char*, int64_t count, uint64_t index) {
                 isa.gaussian(to, out.dtype, count, index, direction);
               });
}

void perturb(const View& out, const View& base, const Numbering& numbering, Direction direction,
             double scale, int threads) {
  const Kernels& isa = kernels();
  for_each_run(out, base, Base::kRead, numbering, threads,
               [&](char* to, char* from, int64_t count, uint64_t index) {
                 isa.perturb(to, out.dtype, from, base.dtype, count, index, direction,
                             static_cast<float>(scale));
               });
}

// master += scale_k * z_k for k = 0, 1, ... in order, each as perturb in place would, and out =
// round(master) at the end. The loop over the directions runs inside a chunk that stays in the L1
// cache, so the weights pass through memory once.
void accumulate(const View& out, const View& base, const Numbering& numbering,
                const std::vector<Direction>& directions, const std::vector<double>& scales,
                int threads) {
  const Kernels& isa = kernels();
  const int64_t normals = static_cast<int64_t>(directions.size());
  const auto add_all = [&](char* master, int64_t count, uint64_t index) {
    for (size_t k = 0; k < directions.size(); k++)
      isa.perturb(master, base.dtype, master, base.dtype, count, index, directions[k],
                  static_cast<float>(scales[k]));
  };
  if (!out.data)
    return for_each_run(
        base, base, Base::kNone, numbering, threads,
        [&](char* master, char*, int64_t count, uint64_t index) { add_all(master, count, index); },
        normals);
  for_each_run(
      out, base, Base::kWritten, numbering, threads,
      [&](char* live, char* master, int64_t count, uint64_t index) {
        add_all(master, count, index);
        isa.round_into(live, out.dtype, master, count);
      },
      normals);
}

bool is_rounded(const char* out, DType out_dtype, const char* master, int64_t count, int threads) {
  const Kernels& isa = kernels();
  const int64_t chunks = (count + kChunk - 1) / kChunk;
  std::atomic<bool> same{true};
  parallel_for(chunks, kMinStats / kChunk, threads, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end && same; chunk++) {
      const int64_t first = chunk * kChunk, length = std::min(count - first, kChunk);
      const char* values = out + first * size_of(out_dtype);
      if (!isa.is_rounded(values, out_dtype, master + first * 4, length)) same = false;
    }
  });
  return same;
}

void add_low_rank(const View& out, const View& master, const std::vector<int64_t>& shape,
                  const float* u, const float* v, int64_t rank, double scale, int threads) {
  const Kernels& isa = kernels();
  const int64_t columns = shape.back();
  // A gap in the numbers behind each row keeps the runs within rows.
  const int64_t row_stride = columns + 1;
  for_each_run(out, master, Base::kRead, {shape, 0, row_stride}, threads,
               [&](char* to, char* from, int64_t count, uint64_t index) {
                 const int64_t place = static_cast<int64_t>(index);
                 const int64_t row = place / row_stride, column = place % row_stride;
                 isa.add_low_rank(to, out.dtype, from, {u + row * rank, v + column, columns, rank},
                                  count, static_cast<float>(scale));
               });
}

void activation_stats(const char* x, DType dtype, int64_t rows, int64_t channels,
                      Reduction reduction, const StatsOut& out, int threads) {
  if (reduction == Reduction::kTensor)
    return write(out, 0, tensor_moments(x, dtype, rows * channels, threads));
  if (reduction == Reduction::kToken)
    return parallel_for(
        rows, (kMinStats + channels - 1) / channels, threads, [&](int64_t begin, int64_t end) {
          for (int64_t r = begin; r < end; r++)
            write(out, r, row_moments(x + r * channels * size_of(dtype), dtype, channels));
        });
  const int64_t tiles = (channels + kWidth - 1) / kWidth;
  const int64_t grain = (kMinStats + rows * kWidth - 1) / (rows * kWidth);
  parallel_for(tiles, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; tile += kTiles) {
      const int64_t channel = tile * kWidth;
      const int64_t last = std::min(channels, std::min(end, tile + kTiles) * kWidth);
      Moments result[kTiles * kWidth] = {};
      const int width = static_cast<int>(last - channel);
      column_moments(x, dtype, rows, channels, channel, width, result);
      for (int i = 0; i < width; i++) write(out, channel + i, result[i]);
    }
  });
}

void tree_attention(const View& query, const View& key, const View& value, const View& out,
                    const int64_t* parents, const AttentionSizes& sizes, float scale,
                    int64_t window, float softcap, int threads) {
  const Paths paths(parents, sizes.tokens);
  const PackedKeys packed(key, value, sizes, paths, threads);
  const Kernels& isa = kernels();
  const int64_t group = sizes.heads / sizes.key_heads;
  const std::vector<Tile> tiles = tiles_of(paths, group);
  const int64_t per_head = static_cast<int64_t>(tiles.size());
  const int64_t count = sizes.batch * sizes.key_heads * per_head;
  const int64_t room = kRows * (padded(sizes.head_size) + padded(sizes.value_size) + paths.longest);
  const int64_t products = count * kRows * paths.longest * sizes.head_size;
  const int64_t useful = std::min<int64_t>(threads, 1 + products / kMinProducts);
  const Floats scratch = floats(useful * room);  // here, where running out of memory can be told
  std::atomic<int64_t> next{0};  // tiles differ in cost: a thread takes the next when it is free
  const auto attend_tiles = [&](int64_t thread, int64_t) {
    for (int64_t i; (i = next++) < count;) {
      const int64_t head = i / per_head, b = head / sizes.key_heads, h = head % sizes.key_heads;
      const Tile& tile = tiles[static_cast<size_t>(i % per_head)];
      Row rows[kRows];
      for (int m = 0; m < tile.rows; m++) {
        const int64_t token = tile.run->begin + (tile.first + m) / group;
        const int64_t query_head = h * group + (tile.first + m) % group;
        rows[m] = {vector_at(query, b, query_head, token), vector_at(out, b, query_head, token),
                   tile.run->position(token)};
      }
      const std::vector<Piece>& path = tile.run->path;
      isa.attend(
          {packed.keys(head), packed.values(head), path.data(), static_cast<int64_t>(path.size()),
           sizes.head_size, sizes.value_size, window, scale, softcap, query.dtype},
          rows, tile.rows, scratch.get() + thread * room);
    }
  };
  parallel_for(useful, 1, threads, attend_tiles);
}

void rms_norm(char* out, const char* x, const char* weight, DType dtype, int64_t rows, int64_t size,
              float eps, int threads) {
  const Kernels& isa = kernels();
  const int64_t step = size * size_of(dtype), grain = (kMinStats + size - 1) / size;
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      isa.rms_norm(out + r * step, x + r * step, weight, dtype, size, eps);
  });
}

}  // namespace dlzo
