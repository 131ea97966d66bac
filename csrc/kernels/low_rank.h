// Products with the thin factors of adapters, and their gradients:
//
//   reduce    u = scale x Wᵀ    x [M, K], W [R, K]
//   gradient  g = scale uᵀ x    u [M, R], x [M, K], g float32
//
// Sums are float32 and rounded once. The way back out of the rank is part of `linear_product`.
#pragma once

#include "factor.h"

namespace FB_NAMESPACE {
namespace low_rank {

using namespace tiles;

constexpr int64_t kChunk = 128;  // columns whose sums are held at once

template <bool P, class T, class W>
static void reduce(const T* x, int64_t x_step, Factor<W> w, T* out, int64_t out_step, int64_t rows,
                    int64_t depth, int64_t width, float scale, float* room, int threads) {
  const int64_t wide = padded(width), vectors = wide / kLanes;
  float* right = room;
  room += cells<P>(depth) * wide;
  pack_factor<P, T>(right, w, depth, width, wide);
  Rows<P, T> left(x, x_step, rows, depth);
  parallel((rows + kRows - 1) / kRows, 4, threads, [=](int64_t begin, int64_t end, int thread) {
    float* sums = room + thread * kRows * (wide + depth);
    for (int64_t row = begin * kRows; row < std::min(end * kRows, rows); row += kRows) {
      Left block = left.at(row, kRows, sums + kRows * wide);
      product<P, Into::kStore>(block, {right, wide}, cells<P>(depth), vectors, sums, wide);
      for (int64_t i = 0; i < std::min<int64_t>(kRows, rows - row); ++i)
        narrow(out + (row + i) * out_step, sums + i * wide, width, scale);
    }
  });
}

template <bool P, class T>
static void gradient(const T* u, int64_t u_step, const T* x, int64_t x_step, float* out,
                     int64_t row_step, int64_t column_step, int64_t rows, int64_t rank,
                     int64_t width, float scale, float* room, int threads) {
  const int64_t tall = (rank + kRows - 1) / kRows * kRows, wide = padded(width);
  float* left = room;                              // [cells(rows)][tall]
  float* sums = room + cells<P>(rows) * tall;      // [tall][wide]
  pack_neighbours<P>(left, u, u_step, rows, rank, tall);
  parallel(wide / kLanes, 1, threads, [=](int64_t first, int64_t last, int) {
    float panel[kBlock / kStep<P> * kChunk];
    const int64_t begin = first * kLanes, end = std::min(last * kLanes, width);
    for (int64_t row = 0; row < rows; row += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, rows - row);
      for (int64_t column = begin; column < end; column += kChunk) {
        const int64_t part = std::min(kChunk, end - column), vectors = padded(part) / kLanes;
        const T* from = x + row * x_step + column;
        fetch(from + kBlock * x_step, x_step, std::min<int64_t>(kBlock, rows - row - count), part);
        pack_neighbours<P>(panel, from, x_step, count, part, padded(part));
        for (int64_t r = 0; r < tall; r += kRows) {
          Left block{left + row / kStep<P> * tall + r, 1, tall};
          Right right{panel, padded(part)};
          float* to = sums + r * wide + column;
          if (row == 0)
            product<P, Into::kStore>(block, right, cells<P>(count), vectors, to, wide);
          else
            product<P, Into::kAdd>(block, right, cells<P>(count), vectors, to, wide);
        }
      }
    }
    for (int64_t column = begin; column < end; column += kLanes) {
      const int64_t part = std::min<int64_t>(kLanes, end - column);
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = column; j < column + part; ++j)
          out[r * row_step + j * column_step] = sums[r * wide + j] * scale;
    }
  });
}

}  // namespace low_rank

// How many floats of `room` each of the two needs; as in `linear_room`, M rows, K, N, R.
static void low_rank_reduce_room(int64_t, int64_t depth, int64_t, int64_t rank, int threads,
                                 int64_t* result) {
  *result = tiles::padded(rank) * depth +
            threads * tiles::kRows * (tiles::padded(rank) + depth);
}

static void low_rank_gradient_room(int64_t rows, int64_t depth, int64_t, int64_t rank, int,
                                   int64_t* result) {
  *result = (rank + tiles::kRows) * (rows + tiles::padded(depth));
}

static void low_rank_reduce(const void* x, int64_t x_step, const void* w, int64_t k_step,
                             int64_t column_step, int w_dtype, void* out, int64_t out_step,
                             int64_t rows, int64_t depth, int64_t width, float scale, float* room,
                             int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_type(w_dtype, [&](auto weight) {
      using W = decltype(weight);
      tiles::Factor<W> factor{static_cast<const W*>(w), k_step, column_step, 1.0f};
      low_rank::reduce<tiles::kPaired<T>>(static_cast<const T*>(x), x_step, factor,
                                              static_cast<T*>(out), out_step, rows, depth, width,
                                              scale, room, threads);
    });
  });
}

static void low_rank_gradient(const void* u, int64_t u_step, const void* x, int64_t x_step,
                              float* out, int64_t row_step, int64_t column_step, int64_t rows,
                              int64_t rank, int64_t width, float scale, float* room, int dtype,
                              int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    low_rank::gradient<tiles::kPaired<T>>(static_cast<const T*>(u), u_step,
                                             static_cast<const T*>(x), x_step, out, row_step,
                                             column_step, rows, rank, width, scale, room, threads);
  });
}

}  // namespace FB_NAMESPACE
