// The two sides of a product of activations with weights or with an adapter's factor.
#pragma once

#include "packing.h"

namespace FB_NAMESPACE {
namespace tiles {

// A right side: element (k, column) lies at data[k * k_step + column * column_step], `k` along the
// sum. It may lie or stand, may be float32 where activations are bf16, and is multiplied with
// `scale` before it is rounded as they are.
template <class W>
struct Factor {
  const W* data;
  int64_t k_step, column_step;
  float scale;

  Factor from(int64_t k, int64_t column) const {
    return {data + k * k_step + column * column_step, k_step, column_step, scale};
  }
  template <class T>
  T at(int64_t k, int64_t column) const {
    return from_float<T>(to_float(data[k * k_step + column * column_step]) * scale);
  }
  template <bool P, class T>
  FB_INLINE_MEMBER float cell(int64_t k, int64_t column, int64_t depth) const {
    if constexpr (P)
      return pair(at<T>(2 * k, column).bits,
                  2 * k + 1 < depth ? at<T>(2 * k + 1, column).bits : uint16_t{0});
    else
      return to_float(at<T>(k, column));
  }
};

// Whether elements of a factor are wanted as they lie in memory.
template <class T, class W>
FB_INLINE bool unchanged(const Factor<W>& w) {
  return std::is_same<T, W>::value && w.scale == 1.0f;
}

// `count` neighbours in memory as T.
template <class T, class W>
FB_INLINE void rounded(const W* from, int64_t count, float scale, T* to) {
  if constexpr (std::is_same<W, float>::value) {
    narrow(to, from, count, scale);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = from_float<T>(to_float(from[i]) * scale);
  }
}

// out[cells(depth)][wide], columns past `width` zero.
template <bool P, class T, class W>
static void pack_factor(float* out, Factor<W> w, int64_t depth, int64_t width, int64_t wide) {
  const int64_t count = cells<P>(depth), whole = depth / kStep<P>;  // without a missing half
  int64_t column = 0;
#if defined(__AVX512F__)
  for (; w.k_step == 1 && column + 16 <= width; column += 16) {
    const W* from = w.data + column * w.column_step;
    int64_t k = 0;
    if (unchanged<T>(w)) {
      for (; k + 16 <= whole; k += 16) {
        vf block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          block[i] = cells_at<P>(from + i * w.column_step + k * kStep<P>, 0);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(out + (k + i) * wide + column, block[i]);
      }
    }
    for (; k < count; k += 16) {
      const int64_t elements = std::min<int64_t>(16 * kStep<P>, depth - k * kStep<P>);
      vf block[16];
      for (int i = 0; i < 16; ++i) {
        T room[16 * kStep<P>] = {};
        rounded(from + i * w.column_step + k * kStep<P>, elements, w.scale, room);
        block[i] = cells_at<P>(static_cast<const T*>(room), 0);
      }
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(16, count - k); ++i)
        store(out + (k + i) * wide + column, block[i]);
    }
  }
#endif
  constexpr int64_t kLine = 128;
  for (; w.column_step == 1 && column < width; column += kLine) {
    const int64_t part = std::min(kLine, width - column);
    for (int64_t k = 0; k < whole; ++k) {
      const W* from = w.data + k * kStep<P> * w.k_step + column;
      float* to = out + k * wide + column;
      if constexpr (std::is_same<T, W>::value) {
        if (unchanged<T>(w)) {
          join_rows<P>(to, from, w.k_step, part);
          continue;
        }
      }
      T rooms[kStep<P> * kLine];
      for (int row = 0; row < kStep<P>; ++row)
        rounded(from + row * w.k_step, part, w.scale, rooms + row * kLine);
      join_rows<P>(to, static_cast<const T*>(rooms), kLine, part);
    }
    for (int64_t j = column; whole < count && j < column + part; ++j)
      out[whole * wide + j] = w.template cell<P, T>(whole, j, depth);
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t j = column; j < width; ++j)
      out[k * wide + j] = w.template cell<P, T>(k, j, depth);
  for (int64_t k = 0; k < count && width < wide; ++k)
    std::memset(out + k * wide + width, 0, (wide - width) * sizeof(float));
}

// Activations as the left side: read in place where their layout allows it.
template <bool P, class T>
struct Rows {
  const T* data;
  int64_t step, count, width;
  bool in_place;

  Rows(const T* x, int64_t x_step, int64_t rows, int64_t columns)
      : data(x), step(x_step), count(rows), width(columns) {
    in_place = sizeof(T) * kStep<P> == sizeof(float) && step % kStep<P> == 0 &&
               width % kStep<P> == 0 && reinterpret_cast<uintptr_t>(x) % sizeof(float) == 0;
  }

  // `tall` rows from `row` on; those past the last are zero and lie in `room`.
  Left at(int64_t row, int64_t tall, float* room) const {
    const T* from = data + row * step;
    if (in_place && row + tall <= count)
      return {reinterpret_cast<const float*>(from), step / kStep<P>, 1};
    pack_rows<P>(room, from, step, std::min(tall, count - row), tall, width);
    return {room, cells<P>(width), 1};
  }
};

// Pairs serve bf16 alone.
template <class T>
constexpr bool kPaired = kPairs && std::is_same<T, bf16>::value;

}  // namespace tiles
}  // namespace FB_NAMESPACE
