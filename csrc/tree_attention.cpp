// tree_attention: softmax(q k scale) v of rows of queries, over the keys on their paths, with sums
// in float32.
//
// Keys lie in panels of kPanel, transposed: one product of a few rows with panels of columns gives
// both the scores and their sum over the values. A tile of rows reads each key and value once.
// Where the ISA multiplies pairs of bfloat16, two channels of a key share a float's place, and so
// do the values of two tokens.
//
//   error    of a weight's logarithm: (head size + 8) 2^-24 of the sum of the score's absolute
//            terms, and 2^-22; of a weight in pairs: 2^-9 of it
//   work     2 (head size + value size) operations and one exp for each pair of query and key
//
// The order of sums depends on the ISA, and on the pieces that a path is cut into where others
// branch off or lie between; never on trees before or behind.
#include "kernels.h"

namespace dlzo::DLZO_ISA {

constexpr int kVectors = kLanes == 16 ? 4 : 2;  // side by side, with kRows sums in registers
constexpr int kPerPanel = kPanel / kLanes;

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

DLZO_INLINE bool in_pairs(DType dtype) { return kPairs && dtype == DType::kBFloat16; }

// How many floats' places `count` numbers take.
template <bool pairs>
DLZO_INLINE int64_t places(int64_t count) {
  return pairs ? (count + 1) / 2 : count;
}

// a * b + c, with one rounding where the ISA has it; of pairs the sum of both products.
template <bool pairs = false>
DLZO_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if defined(__AVX512BF16__)
  if (pairs) return (F32)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
#if defined(__x86_64__) && !defined(__FMA__)
  return a * b + c;
#else
  return fused_multiply_add(a, b, c);
#endif
}

// A matrix in panels of kPanel columns: element (k, n) lies at n / kPanel * panel_step +
// k * row_step + n % kPanel.
struct Panels {
  const float* data;
  int64_t panel_step, row_step;
  const float* vector(int64_t i) const {
    return data + i / kPerPanel * panel_step + i % kPerPanel * kLanes;
  }
};

// c += a b for kRows rows of a and `vectors` vectors of b's columns, from vector `first` on.
template <bool pairs, int vectors>
static void multiply(float* c, int64_t c_step, const float* a, int64_t a_step, const Panels& b,
                     int64_t first, int64_t depth) {
  F32 sums[kRows][vectors];
  const float* columns[vectors];
  for (int n = 0; n < vectors; n++) columns[n] = b.vector(first + n);
  c += first * kLanes;
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < vectors; n++) sums[m][n] = load<F32>(c + m * c_step + n * kLanes);
  for (int64_t k = 0; k < depth; k++) {
    F32 column[vectors];
    for (int n = 0; n < vectors; n++) column[n] = load<F32>(columns[n] + k * b.row_step);
    for (int m = 0; m < kRows; m++) {
      const F32 row = splat(a[m * a_step + k]);
      for (int n = 0; n < vectors; n++)
        sums[m][n] = multiply_add<pairs>(row, column[n], sums[m][n]);
    }
  }
  for (int m = 0; m < kRows; m++)
    for (int n = 0; n < vectors; n++) store(c + m * c_step + n * kLanes, sums[m][n]);
}

// The same for all `columns`, a multiple of kPanel.
template <bool pairs>
static void multiply_all(float* c, int64_t c_step, const float* a, int64_t a_step, const Panels& b,
                         int64_t columns, int64_t depth) {
  const int64_t count = columns / kLanes;
  int64_t i = 0;
  for (; i + kVectors <= count; i += kVectors)
    multiply<pairs, kVectors>(c, c_step, a, a_step, b, i, depth);
  for (; i + 2 <= count; i += 2) multiply<pairs, 2>(c, c_step, a, a_step, b, i, depth);
  for (; i < count; i++) multiply<pairs, 1>(c, c_step, a, a_step, b, i, depth);
}

// exp(x) for x <= 0 within 2 ulp, and 0 below -87.
DLZO_INLINE F32 exponential(F32 x) {
  const F32 shift = splat(0x1.8p23f);  // brings the power of two to the last bits
  const F32 shifted = multiply_add(x, splat(0x1.715476p0f), shift), power = shifted - shift;
  F32 r = multiply_add(power, splat(-0x1.62e4p-1f), x);
  r = multiply_add(power, splat(-0x1.7f7d1cp-20f), r);
  // Cephes' expf.
  const float coefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 0.5f};
  F32 p = {};
  for (const float c : coefficients) p = multiply_add(p, r, splat(c));
  p = multiply_add(p, r * r, r) + 1.0f;
  const U32 scaled = bits<U32>(p) + (bits<U32>(shifted) << 23);
  const U32 result = select(x < -87.0f, U32{}, scaled);
  return bits<F32>(select(x != x, bits<U32>(x), result));
}

// Turns scores into cap * tanh(score / cap).
static void soft_cap(float* scores, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const U32 score = load<U32>(scores + i);
    const F32 e = exponential(bits<F32>(score & 0x7fffffffu) * (-2.0f / cap));
    store(scores + i, bits<U32>(cap * (1.0f - e) / (1.0f + e)) | (score & 0x80000000u));
  }
}

// All lanes joined in pairs, and these in pairs again.
template <class Join>
DLZO_INLINE float reduce(F32 vector, Join join) {
  float lanes[kLanes];
  store(lanes, vector);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) lanes[i] = join(lanes[i], lanes[i + half]);
  return lanes[0];
}

// Weights, or pairs of them in half the places.
template <bool pairs>
DLZO_INLINE void store_weights(float* to, F32 weights) {
#if defined(__AVX512BF16__)
  if (pairs) return store(to, _mm512_cvtneps_pbh((__m512)weights));
#endif
  store(to, weights);
}

// Turns a row of scores into exp(score - largest), or into pairs of such; returns their sum.
template <bool pairs>
static float exponentials(float* scores, int64_t count) {
  F32 largest = load<F32>(scores), sum = {};
  for (int64_t i = kLanes; i < count; i += kLanes) {
    const F32 score = load<F32>(scores + i);
    largest = score > largest ? score : largest;
  }
  const float most = reduce(largest, [](float a, float b) { return a > b ? a : b; });
  for (int64_t i = 0; i < count; i += kLanes) {
    const F32 weight = exponential(load<F32>(scores + i) - most);
    store_weights<pairs>(scores + places<pairs>(i), weight);
    sum += weight;
  }
  return reduce(sum, [](float a, float b) { return a + b; });
}

// `count` values as float32.
static void widen(const char* x, DType dtype, int64_t count, float* out) {
  with_dtype(dtype, [&](auto as) { widen<as.value>(x, count, out); });
}

static void narrow(char* out, DType dtype, const float* x, int64_t count, float factor) {
  with_dtype(dtype, [&](auto as) { narrow<as.value>(out, (const char*)x, count, factor); });
}

// A key's channels, or pairs of them, as a column of its panel.
template <bool pairs>
static void pack_key(float* column, const char* key, DType dtype, int64_t size) {
  if constexpr (pairs) {
    for (int64_t i = 0; i < size; i += 2) {
      uint32_t pair = 0;
      memcpy(&pair, key + 2 * i, i + 1 < size ? 4 : 2);
      memcpy(column + i / 2 * kPanel, &pair, 4);
    }
  } else {
    float values[kStep];
    for (int64_t first = 0; first < size; first += kStep) {
      const int64_t count = size - first < kStep ? size - first : kStep;
      widen(key + first * size_of(dtype), dtype, count, values);
      for (int64_t i = 0; i < count; i++) column[(first + i) * kPanel] = values[i];
    }
  }
}

template <bool pairs>
static void pack_keys_as(float* keys, const Vectors& of, int64_t size) {
  for (int64_t i = 0; i < of.count; i++)
    pack_key<pairs>(keys + i / kPanel * kPanel * places<pairs>(size) + i % kPanel, of.at(i),
                    of.dtype, size);
}

void pack_keys(float* keys, const Vectors& of, int64_t size) {
  if (in_pairs(of.dtype)) return pack_keys_as<kPairs>(keys, of, size);
  pack_keys_as<false>(keys, of, size);
}

// Puts bfloat16 numbers into one half of each pair, the first before the second.
static void put_halves(float* pairs, const char* x, int64_t count, bool second) {
  for (int64_t i = 0; i < count; i++) {
    uint16_t half;
    uint32_t pair = 0;
    memcpy(&half, x + 2 * i, 2);
    if (second) memcpy(&pair, pairs + i, 4);
    pair |= (uint32_t)half << (second ? 16 : 0);
    memcpy(pairs + i, &pair, 4);
  }
}

void pack_values(float* values, const Vectors& of, int64_t size) {
  const bool pairs = in_pairs(of.dtype);
  const int64_t step = padded(size);
  for (int64_t i = 0; i < of.count; i++)
    if (pairs) put_halves(values + i / 2 * step, of.at(i), size, i % 2);
    else widen(of.at(i), of.dtype, size, values + i * step);
}

// The part of a piece that some row of a tile sees: keys [begin, end) of it, `begin` in whole
// panels.
struct Part {
  int64_t begin, end;
  int64_t columns() const { return padded(end - begin); }
};

// Calls body(piece, part, column) on what the rows see, side by side in the columns of the scores;
// returns how many columns there are.
template <class Body>
DLZO_INLINE int64_t for_each_part(const Attention& a, const Row* rows, int count, Body body) {
  const int64_t oldest = rows[0].position - a.window + 1, newest = rows[count - 1].position;
  int64_t column = 0;
  for (int64_t p = 0; p < a.pieces; p++) {
    const Piece& piece = a.path[p];
    const int64_t first = oldest - piece.position, last = newest - piece.position;
    const Part part = {first > 0 ? first / kPanel * kPanel : 0,
                       last < piece.count ? last + 1 : piece.count};
    if (part.begin >= part.end) continue;
    body(piece, part, column);
    column += part.columns();
  }
  return column;
}

// Takes out of a part's scores what one row does not see: keys after it, or too far before.
static void hide(float* scores, const Piece& piece, Part part, int64_t position, int64_t window) {
  const int64_t here = position - piece.position - part.begin;  // the row's own key
  const int64_t columns = part.columns(), keys = part.end - part.begin;
  const int64_t end = here < keys ? here + 1 : keys;
  for (int64_t i = 0; i <= here - window && i < columns; i++) scores[i] = -__builtin_inff();
  for (int64_t i = end; i < columns; i++) scores[i] = -__builtin_inff();
}

template <bool pairs>
static void attend_as(const Attention& a, const Row* rows, int count, float* scratch) {
  const int64_t size = a.head_size, depth = places<pairs>(size);
  const int64_t query_size = padded(size), value_size = padded(a.value_size);
  float* query = scratch;
  float* sums = query + kRows * query_size;
  float* scores = sums + kRows * value_size;
  const int64_t columns = for_each_part(a, rows, count, [](const Piece&, Part, int64_t) {});
  memset(scratch, 0, (size_t)(kRows * (query_size + value_size + columns)) * sizeof(float));
  for (int m = 0; m < count; m++) {
    float* row = query + m * query_size;
    if (pairs) memcpy(row, rows[m].query, (size_t)size * 2);
    else widen(rows[m].query, a.dtype, size, row);
  }
  for_each_part(a, rows, count, [&](const Piece& piece, Part part, int64_t column) {
    const Panels keys = {a.keys + piece.slot * size + part.begin * depth, kPanel * depth, kPanel};
    multiply_all<pairs>(scores + column, columns, query, query_size, keys, part.columns(), depth);
    for (int m = 0; m < count; m++) {
      float* row = scores + m * columns + column;
      for (int64_t i = 0; i < part.columns(); i++) row[i] *= a.scale;
      if (a.softcap > 0) soft_cap(row, part.columns(), a.softcap);
      hide(row, piece, part, rows[m].position, a.window);
    }
  });
  float totals[kRows];
  for (int m = 0; m < count; m++) totals[m] = exponentials<pairs>(scores + m * columns, columns);
  for_each_part(a, rows, count, [&](const Piece& piece, Part part, int64_t column) {
    const float* first = a.values + (piece.slot + places<pairs>(part.begin)) * value_size;
    multiply_all<pairs>(sums, value_size, scores + places<pairs>(column), columns,
                        {first, kPanel, value_size}, value_size,
                        places<pairs>(part.end - part.begin));
  });
  for (int m = 0; m < count; m++)
    narrow(rows[m].out, a.dtype, sums + m * value_size, a.value_size, 1.0f / totals[m]);
}

void attend(const Attention& a, const Row* rows, int count, float* scratch) {
  if (in_pairs(a.dtype)) return attend_as<kPairs>(a, rows, count, scratch);
  attend_as<false>(a, rows, count, scratch);
}

}  // namespace dlzo::DLZO_ISA
