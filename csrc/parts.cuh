// The parts of a launch: a thread takes groups of kGroup elements that are consecutive in logical
// indices, so that one pair of Philox blocks serves a group.
#pragma once
#include "noise.cuh"
#include "storage.cuh"

namespace dlzo::gpu {

template <DType dtype>
DLZO_DEVICE void load_base(const Part& part, const Group& group, float (&values)[kGroup]) {
  load_group<dtype>(part.base + group.base * size_of(dtype), part.base_column, group, values);
}

template <DType dtype>
DLZO_DEVICE void store_base(const Part& part, const Group& group, const float (&values)[kGroup]) {
  char* base = const_cast<char*>(part.base);
  store_group<dtype>(base + group.base * size_of(dtype), part.base_column, group, values);
}

template <DType dtype>
DLZO_DEVICE void store_out(const Part& part, const Group& group, const float (&values)[kGroup]) {
  store_group<dtype>(part.out + group.out * size_of(dtype), part.out_column, group, values);
}

// Group number `number` of a part, counted along its rows.
DLZO_DEVICE Group group_of(const Part& part, int64_t number) {
  int64_t row = 0;
  if (part.rows > 1) {
    const int64_t per_row = groups_per_row(part.columns);
    row = (int64_t)((uint64_t)number / (uint64_t)per_row);
    number -= row * per_row;
  }
  const uint64_t start = part.offset + (uint64_t)(row * part.row_stride);
  const int64_t column = number * kGroup - (int64_t)(start % kGroup);
  const int64_t left = row < part.rows ? part.columns - column : 0;
  const uint64_t block = (start + (uint64_t)column) >> 2;
  Group group;
  group.block_low = (uint32_t)block;
  group.block_high = (uint32_t)(block >> 32);
  group.out = row * part.out_row + column * part.out_column;
  group.base = row * part.base_row + column * part.base_column;
  group.begin = column < 0 ? (int)-column : 0;
  group.end = left < kGroup ? (int)left : kGroup;  // not above begin: there is nothing
  group.whole = part.is_flat && group.begin == 0 && group.end == kGroup;
  return group;
}

// The part of a launch that a block works on: the last one that starts at or before it.
DLZO_DEVICE const Part& part_of(const NoiseArguments& arguments, int64_t block) {
  unsigned low = 0, high = (unsigned)arguments.count - 1;
  while (low < high) {
    const unsigned middle = (low + high + 1) / 2;
    if (arguments.parts[middle].first_block <= block) low = middle;
    else high = middle - 1;
  }
  return arguments.parts[low];
}

// Calls body(part, group) for each group that is this thread's.
template <class Body>
DLZO_DEVICE void for_each_group(const NoiseArguments& arguments, Body body) {
  constexpr int kGroups = kThreads * kTurns;
  const Part& part = part_of(arguments, blockIdx.x);
  const int64_t first = ((int64_t)blockIdx.x - part.first_block) * kGroups;
  // Where all groups of the block are whole and none carries into the high half of the counter,
  // nearly everything about them is the same for all threads.
  const int phase = (int)(part.offset % kGroup);
  const int64_t column = first * kGroup - phase;
  const uint64_t block = (part.offset + (uint64_t)column) >> 2;
  if (part.is_flat && column >= 0 && column + kGroups * kGroup <= part.columns &&
      (uint32_t)block <= ~0u - 2 * kGroups) {
#pragma unroll 1
    for (int turn = 0; turn < kTurns; turn++) {
      const int i = turn * kThreads + (int)threadIdx.x;
      const int64_t at = column + i * kGroup;
      body(part, Group{(uint32_t)block + 2 * (uint32_t)i, (uint32_t)(block >> 32), at, at, 0,
                       kGroup, true});
    }
    return;
  }
#pragma unroll 1
  for (int turn = 0; turn < kTurns; turn++) {
    const Group group = group_of(part, first + turn * kThreads + (int)threadIdx.x);
    if (group.begin < group.end) body(part, group);
  }
}

}  // namespace dlzo::gpu
