// Normalization of rows: root mean square, and mean and variance, forward and backward.
//
// A row may hold several groups that are normalized each on its own (the heads of a query).
#pragma once

namespace FB_NAMESPACE {

// y = x * rstd * (weight + offset), group by group; rstd [rows, groups] is kept for the way back.
template <class T>
static void rms_norm_rows(const T* x, const T* weight, T* y, float* rstd, int64_t rows,
                          int64_t groups, int64_t width, int64_t x_stride, int64_t y_stride,
                          float eps, float offset, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t group = 0; group < groups; ++group) {
        const T* in = x + row * x_stride + group * width;
        T* out = y + row * y_stride + group * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < width; ++j) sum += to_float(in[j]) * to_float(in[j]);
        float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
        rstd[row * groups + group] = scale;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
          out[j] = from_float<T>(to_float(in[j]) * scale * (to_float(weight[j]) + offset));
      }
  });
}

// dx = rstd * (g * w - xhat * mean(g * w * xhat)) + added, with xhat = x * rstd. `grad` and `dx`
// may be the same memory; `added` (null or laid out as dx) may be too.
template <class T>
static void rms_norm_rows_backward(const T* grad, const T* x, const T* weight, const float* rstd,
                                   const T* added, T* dx, int64_t rows, int64_t groups,
                                   int64_t width, int64_t x_stride, int64_t dx_stride,
                                   float offset, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t group = 0; group < groups; ++group) {
        const T* in = x + row * x_stride + group * width;
        const T* g = grad + row * dx_stride + group * width;
        T* out = dx + row * dx_stride + group * width;
        float scale = rstd[row * groups + group], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < width; ++j)
          dot += to_float(g[j]) * (to_float(weight[j]) + offset) * to_float(in[j]);
        dot *= scale * scale * scale / static_cast<float>(width);
        if (added == nullptr) {
#pragma omp simd
          for (int64_t j = 0; j < width; ++j)
            out[j] = from_float<T>(to_float(g[j]) * (to_float(weight[j]) + offset) * scale -
                                   to_float(in[j]) * dot);
        } else {
          const T* add = added + row * dx_stride + group * width;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j)
            out[j] = from_float<T>(to_float(g[j]) * (to_float(weight[j]) + offset) * scale -
                                   to_float(in[j]) * dot + to_float(add[j]));
        }
      }
  });
}

// y = (x - mean) * rstd * weight + bias; statistics [rows, 2] hold mean and rstd.
template <class T>
static void layer_norm_rows(const T* x, const T* weight, const T* bias, T* y, float* statistics,
                            int64_t rows, int64_t width, float eps, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      T* out = y + row * width;
      float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) sum += to_float(in[j]);
      float mean = sum / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
      for (int64_t j = 0; j < width; ++j)
        squares += (to_float(in[j]) - mean) * (to_float(in[j]) - mean);
      float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
      statistics[2 * row] = mean;
      statistics[2 * row + 1] = scale;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j)
        out[j] = from_float<T>((to_float(in[j]) - mean) * scale * to_float(weight[j]) +
                               to_float(bias[j]));
    }
  });
}

// dx = rstd * (g * w - mean(g * w) - xhat * mean(g * w * xhat)) + added.
template <class T>
static void layer_norm_rows_backward(const T* grad, const T* x, const T* weight,
                                     const float* statistics, const T* added, T* dx, int64_t rows,
                                     int64_t width, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      const T* g = grad + row * width;
      T* out = dx + row * width;
      float mean = statistics[2 * row], scale = statistics[2 * row + 1], sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t j = 0; j < width; ++j) {
        float gw = to_float(g[j]) * to_float(weight[j]);
        sum += gw;
        dot += gw * (to_float(in[j]) - mean);
      }
      sum /= static_cast<float>(width);
      dot *= scale * scale / static_cast<float>(width);
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        float value = scale * (to_float(g[j]) * to_float(weight[j]) - sum -
                               (to_float(in[j]) - mean) * dot);
        out[j] = from_float<T>(value + (added == nullptr ? 0.0f : to_float(added[row * width + j])));
      }
    }
  });
}

static void rms_norm(const void* x, const void* weight, void* y, float* rstd, int64_t rows,
                     int64_t groups, int64_t width, int64_t x_stride, int64_t y_stride, float eps,
                     float offset, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y),
                  rstd, rows, groups, width, x_stride, y_stride, eps, offset, threads);
  });
}

static void rms_norm_backward(const void* grad, const void* x, const void* weight,
                              const float* rstd, const void* added, void* dx, int64_t rows,
                              int64_t groups, int64_t width, int64_t x_stride, int64_t dx_stride,
                              float offset, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_rows_backward(static_cast<const T*>(grad), static_cast<const T*>(x),
                           static_cast<const T*>(weight), rstd, static_cast<const T*>(added),
                           static_cast<T*>(dx), rows, groups, width, x_stride, dx_stride, offset,
                           threads);
  });
}

static void layer_norm(const void* x, const void* weight, const void* bias, void* y,
                       float* statistics, int64_t rows, int64_t width, float eps, int dtype,
                       int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    layer_norm_rows(static_cast<const T*>(x), static_cast<const T*>(weight),
                    static_cast<const T*>(bias), static_cast<T*>(y), statistics, rows, width, eps,
                    threads);
  });
}

static void layer_norm_backward(const void* grad, const void* x, const void* weight,
                                const float* statistics, const void* added, void* dx,
                                int64_t rows, int64_t width, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    layer_norm_rows_backward(static_cast<const T*>(grad), static_cast<const T*>(x),
                             static_cast<const T*>(weight), statistics,
                             static_cast<const T*>(added), static_cast<T*>(dx), rows, width,
                             threads);
  });
}

}  // namespace FB_NAMESPACE
