// Rotation of query and key heads by their positions, in place.
#pragma once

namespace FB_NAMESPACE {

// The first `rotary` values of each head are turned: halves (a, b) become (a c - b s, b c + a s);
// `sign` -1 turns the gradient back. cos and sin are [table_rows, rotary]; row m of x takes their
// row m % table_rows, so that one table can serve every sequence of a batch.
template <class T>
static void rotate_rows(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads,
                        int64_t head_dim, int64_t rotary, int64_t stride, int64_t table_rows,
                        bool back, int threads) {
  int64_t half = rotary / 2;
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* c = cos + (row % table_rows) * rotary;
      const T* s = sin + (row % table_rows) * rotary;
      for (int64_t head = 0; head < heads; ++head) {
        T* low = x + row * stride + head * head_dim;
        T* high = low + half;
        if (!back) {
#pragma omp simd
          for (int64_t j = 0; j < half; ++j) {
            float a = to_float(low[j]), b = to_float(high[j]);
            low[j] = from_float<T>(a * to_float(c[j]) - b * to_float(s[j]));
            high[j] = from_float<T>(b * to_float(c[j + half]) + a * to_float(s[j + half]));
          }
        } else {
#pragma omp simd
          for (int64_t j = 0; j < half; ++j) {
            float a = to_float(low[j]), b = to_float(high[j]);
            low[j] = from_float<T>(a * to_float(c[j]) + b * to_float(s[j + half]));
            high[j] = from_float<T>(b * to_float(c[j + half]) - a * to_float(s[j]));
          }
        }
      }
    }
  });
}

static void rotate(void* x, const void* cos, const void* sin, int64_t rows, int64_t heads,
                   int64_t head_dim, int64_t rotary, int64_t stride, int64_t table_rows, int back,
                   int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rotate_rows(static_cast<T*>(x), static_cast<const T*>(cos), static_cast<const T*>(sin), rows,
                heads, head_dim, rotary, stride, table_rows, back != 0, threads);
  });
}

}  // namespace FB_NAMESPACE
