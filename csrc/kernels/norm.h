// Root-mean-square normalization of rows, forward and backward.
#pragma once

namespace FB_NAMESPACE {

// y[m, d] = x[m, d] * rstd[m] * (weight[d] + offset); rstd is kept for the way back.
template <class T>
static void rms_norm_rows(const T* x, const T* weight, T* y, float* rstd, int64_t rows,
                          int64_t width, float eps, float offset, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      T* out = y + row * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < width; ++j) sum += to_float(in[j]) * to_float(in[j]);
      float scale = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
      rstd[row] = scale;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j)
        out[j] = from_float<T>(to_float(in[j]) * scale * (to_float(weight[j]) + offset));
    }
  });
}

// dx = rstd * (g * w - xhat * mean(g * w * xhat)) + residual, with xhat = x * rstd.
template <class T>
static void rms_norm_rows_backward(const T* grad, const T* x, const T* weight, const float* rstd,
                                   const T* residual, T* dx, int64_t rows, int64_t width,
                                   float offset, int threads) {
  parallel(rows, 16, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      const T* g = grad + row * width;
      T* out = dx + row * width;
      float scale = rstd[row], dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < width; ++j)
        dot += to_float(g[j]) * (to_float(weight[j]) + offset) * to_float(in[j]);
      dot *= scale * scale * scale / static_cast<float>(width);
      if (residual == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
          out[j] = from_float<T>(to_float(g[j]) * (to_float(weight[j]) + offset) * scale -
                                 to_float(in[j]) * dot);
      } else {
        const T* add = residual + row * width;
#pragma omp simd
        for (int64_t j = 0; j < width; ++j)
          out[j] = from_float<T>(to_float(g[j]) * (to_float(weight[j]) + offset) * scale -
                                 to_float(in[j]) * dot + to_float(add[j]));
      }
    }
  });
}

static void rms_norm(const void* x, const void* weight, void* y, float* rstd, int64_t rows,
                     int64_t width, float eps, float offset, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(y),
                  rstd, rows, width, eps, offset, threads);
  });
}

static void rms_norm_backward(const void* grad, const void* x, const void* weight,
                              const float* rstd, const void* residual, void* dx, int64_t rows,
                              int64_t width, float offset, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    rms_norm_rows_backward(static_cast<const T*>(grad), static_cast<const T*>(x),
                           static_cast<const T*>(weight), rstd, static_cast<const T*>(residual),
                           static_cast<T*>(dx), rows, width, offset, threads);
  });
}

}  // namespace FB_NAMESPACE
