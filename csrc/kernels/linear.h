// Activations times a weight, with an adapter in the same sums:
//
//   y = x W + u F + bias + added     x [M, K], W [K, N], u [M, R], F [R, N], y, added [M, N]
//
// u F is summed as if the depth were K + R: it costs no pass over y of its own, and y is rounded
// once. Columns of the right side are packed some panels at a time, so that they come from a cache;
// a 4-bit weight is decoded on the way, and stands nowhere whole.
#pragma once

#include "dequantize.h"
#include "factor.h"

namespace FB_NAMESPACE {
namespace linear {

using namespace tiles;

// Rows and vectors of a block of y: 24 sums, 4 vectors of the right side and one cell of the left
// fill the registers of AVX-512.
#if defined(__AVX512F__)
constexpr int kTall = 6, kWide = 4;
#else
constexpr int kTall = kRows, kWide = kColumns;
#endif
constexpr int64_t kPanel = kWide * kLanes;
constexpr int64_t kPiece = 2048;  // of the depth, packed at once
constexpr int64_t kNear = 48 << 10;  // floats of x that a thread takes at once, to stay in its cache
constexpr int64_t kRoom = 1 << 20;  // floats of panels packed at once, one panel at least
constexpr int64_t kDecoded = 8 << 10;  // bytes of weights decoded at once, to stay in the near cache

template <bool P, class T, class W>
static void pack_right(float* out, const Factor<W>& w, int64_t k, int64_t column, int64_t depth,
                       int64_t width) {
  pack_factor<P, T>(out, w.from(k, column), depth, width, kPanel);
}

// 4-bit weights with rows of one width, one under another, lying (k counts rows) or standing.
struct Stored {
  const Packed* parts;
  int64_t width;
  bool standing;

  // Weights [from, from + count) of row `index`.
  template <class T>
  void decode(int64_t index, int64_t from, int64_t count, T* out) const {
    const Packed* part = parts;
    int64_t start = index * width;
    for (; start >= part->count; ++part) start -= part->count;
    unpack(*part, start + from, start + from + count, out);
  }
};

template <bool P, class T>
static void pack_right(float* out, const Stored& w, int64_t k, int64_t column, int64_t depth,
                       int64_t width) {
  constexpr int64_t kDeep = kDecoded / static_cast<int64_t>(sizeof(T)) / kPanel;
  alignas(64) T weights[kDeep * kPanel];
  for (int64_t at = 0; at < depth; at += kDeep) {
    const int64_t count = std::min(kDeep, depth - at);
    if (w.standing) {
      for (int64_t j = 0; j < width; ++j) w.decode(column + j, k + at, count, weights + j * kDeep);
    } else {
      for (int64_t i = 0; i < count; ++i) w.decode(k + at + i, column, width, weights + i * kPanel);
    }
    Factor<T> decoded{weights, w.standing ? 1 : kPanel, w.standing ? kDeep : 1, 1.0f};
    pack_factor<P, T>(out + cells<P>(at) * kPanel, decoded, count, width, kPanel);
  }
}

// Where a block of y goes and what is added to it; `added` may be null.
template <class T>
struct Target {
  const float* bias;  // kPanel values
  const T* added;
  int64_t added_step;
  T* y;
  int64_t y_step;
};

// One block of y: R rows, `width` of the panel's columns.
template <bool P, class T, int R>
__attribute__((noinline)) static void block(Left x, int64_t depth, Left u, int64_t rank,
                                            const float* right, const Target<T>& target,
                                            int64_t width) {
  vf sums[R][kWide];
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kWide; ++n) sums[m][n] = vf{};
  add_products<P>(sums, x, {right, kPanel}, depth);
  add_products<P>(sums, u, {right + depth * kPanel, kPanel}, rank);
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
    if (width == kPanel && target.added == nullptr) {
#pragma GCC unroll 4
      for (int n = 0; n < kWide; ++n)
        narrow(target.y + m * target.y_step + n * kLanes,
               sums[m][n] + load(target.bias + n * kLanes));
      continue;
    }
    float line[kPanel];
#pragma GCC unroll 4
    for (int n = 0; n < kWide; ++n)
      store(line + n * kLanes, sums[m][n] + load(target.bias + n * kLanes));
    if (target.added != nullptr) {
      const T* added = target.added + m * target.added_step;
      int64_t j = 0;
      for (; j + kLanes <= width; j += kLanes) store(line + j, load(line + j) + widen(added + j));
      for (; j < width; ++j) line[j] += to_float(added[j]);
    }
    narrow(target.y + m * target.y_step, line, width, 1.0f);
  }
}

template <bool P, class T, int R>
static void any_block(int64_t rows, Left x, int64_t depth, Left u, int64_t rank,
                      const float* right, const Target<T>& target, int64_t width) {
  if constexpr (R > 0) {
    if (rows == R)
      block<P, T, R>(x, depth, u, rank, right, target, width);
    else
      any_block<P, T, R - 1>(rows, x, depth, u, rank, right, target, width);
  }
}

template <bool P, class T, class W, class F>
static void run(Rows<P, T> x, W w, Rows<P, T> u, Factor<F> factor, Target<T> whole,
                int64_t width, float* room, int threads) {
  const int64_t depth = cells<P>(x.width), rank = cells<P>(u.width), all = depth + rank;
  const int64_t panels = (width + kPanel - 1) / kPanel, blocks = (x.count + kTall - 1) / kTall;
  const int64_t group = std::min(panels, std::max<int64_t>(1, kRoom / (all * kPanel)));
  float* lefts = room + group * all * kPanel;
  for (int64_t start = 0; start < panels; start += group) {
    const int64_t stop = std::min(start + group, panels);
    // the last piece of a panel is the adapter's part
    const int64_t pieces = (x.width + kPiece - 1) / kPiece + 1;
    share((stop - start) * pieces, threads, [=](int64_t unit, int) {
      const int64_t panel = unit / pieces, from = unit % pieces * kPiece;
      const int64_t column = (start + panel) * kPanel, part = std::min(kPanel, width - column);
      float* to = room + panel * all * kPanel;
      if (unit % pieces + 1 == pieces)
        pack_factor<P, T>(to + depth * kPanel, factor.from(0, column), u.width, part, kPanel);
      else
        pack_right<P, T>(to + cells<P>(from) * kPanel, w, from, column,
                         std::min(kPiece, x.width - from), part);
    });
    const int64_t chunk = std::max<int64_t>(8, kNear / (kTall * all));
    const int64_t chunks = (blocks + chunk - 1) / chunk;
    share((stop - start) * chunks, threads, [=](int64_t unit, int thread) {
      const int64_t panel = unit % (stop - start), first = unit / (stop - start) * chunk;
      const int64_t column = (start + panel) * kPanel, part = std::min(kPanel, width - column);
      float bias[kPanel] = {};
      if (whole.bias != nullptr) std::memcpy(bias, whole.bias + column, part * sizeof(float));
      Target<T> target{bias, nullptr, whole.added_step, nullptr, whole.y_step};
      const float* right = room + panel * all * kPanel;
      float* left = lefts + thread * kTall * (x.width + u.width);
      for (int64_t at = first; at < std::min(first + chunk, blocks); ++at) {
        const int64_t row = at * kTall, rows = std::min<int64_t>(kTall, x.count - row);
        target.y = whole.y + row * whole.y_step + column;
        if (whole.added != nullptr) target.added = whole.added + row * whole.added_step + column;
        any_block<P, T, kTall>(rows, x.at(row, rows, left), depth,
                               u.at(row, rows, left + kTall * x.width), rank, right, target, part);
      }
    });
  }
}

}  // namespace linear

// How many floats of `room` the product needs.
static void linear_room(int64_t, int64_t depth, int64_t width, int64_t rank, int threads,
                        int64_t* result) {
  const int64_t panels = (width + linear::kPanel - 1) / linear::kPanel;
  const int64_t panel = (depth + rank + 2) * linear::kPanel;
  *result = std::min(panels * panel, std::max(linear::kRoom, panel)) +
            threads * linear::kTall * (depth + rank + 2);
}

// `layout`: M, K, N, R; steps between rows of x, u, y and added; k and column steps of W, then of F.
// W is `w`, or, where that is null, what `stored` decodes to.
static void linear_product(const void* x, const void* w, const Packed* stored, const void* u,
                           const void* factor,
                           int factor_dtype, float scale, const float* bias, const void* added,
                           void* y, const int64_t* layout, float* room, int dtype, int threads) {
  using namespace tiles;
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_type(factor_dtype, [&](auto kind) {
      using F = decltype(kind);
      constexpr bool P = kPaired<T>;
      Rows<P, T> left(static_cast<const T*>(x), layout[4], layout[0], layout[1]);
      Rows<P, T> thin(static_cast<const T*>(u), layout[5], layout[0], layout[3]);
      Factor<T> weight{static_cast<const T*>(w), layout[8], layout[9], 1.0f};
      Factor<F> adapter{static_cast<const F*>(factor), layout[10], layout[11], scale};
      linear::Target<T> target{bias, static_cast<const T*>(added), layout[7], static_cast<T*>(y),
                               layout[6]};
      linear::Stored packed{stored, std::max(layout[8], layout[9]), layout[8] == 1};
      if (w != nullptr)
        linear::run<P, T>(left, weight, thin, adapter, target, layout[2], room, threads);
      else
        linear::run<P, T>(left, packed, thin, adapter, target, layout[2], room, threads);
    });
  });
}

}  // namespace FB_NAMESPACE
