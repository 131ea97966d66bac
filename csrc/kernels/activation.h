// Activations of the feed-forward, alone or multiplying a second half (SwiGLU, GeGLU).
//
// Both are x * sigmoid(t(x)): SiLU has t = x, GELU in its tanh form t = 2 sqrt(2/pi) (x + 0.044715 x^3).
#pragma once

namespace FB_NAMESPACE {

enum Activation : int { kSilu = 0, kGeluTanh = 1 };

template <int kind>
static inline float gate_of(float x) {
  float t = kind == kSilu ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  float power = exp_below_one(-std::fabs(t));
  return (t < 0.0f ? power : 1.0f) / (1.0f + power);
}

template <int kind>
static inline float gate_slope(float x) {
  return kind == kSilu ? 1.0f : 1.5957691216f * (1.0f + 0.134145f * x * x);
}

// h[m, j] = act(a[m, j]) (* b[m, j]); a row of `in` holds a, then b when gated.
template <class T, int kind, bool gated>
static void activate_rows(const T* in, T* out, int64_t rows, int64_t width, int threads) {
  int64_t stride = gated ? 2 * width : width;
  parallel(rows, 8, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* a = in + row * stride;
      const T* b = a + (gated ? width : 0);
      T* h = out + row * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        float x = to_float(a[j]);
        float value = x * gate_of<kind>(x);
        h[j] = from_float<T>(gated ? value * to_float(b[j]) : value);
      }
    }
  });
}

// Gradients of the same, and its result once more into `out`; `din` is laid out as `in`.
template <class T, int kind, bool gated>
static void activate_rows_backward(const T* in, const T* grad, T* din, T* out, int64_t rows,
                                   int64_t width, int threads) {
  int64_t stride = gated ? 2 * width : width;
  parallel(rows, 8, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* a = in + row * stride;
      const T* b = a + (gated ? width : 0);
      const T* g = grad + row * width;
      T* da = din + row * stride;
      T* db = da + (gated ? width : 0);
      T* h = out + row * width;
#pragma omp simd
      for (int64_t j = 0; j < width; ++j) {
        float x = to_float(a[j]), q = to_float(g[j]);
        float s = gate_of<kind>(x), value = x * s;
        float slope = s + value * (1.0f - s) * gate_slope<kind>(x);
        if (gated) {
          float u = to_float(b[j]);
          h[j] = from_float<T>(value * u);
          db[j] = from_float<T>(q * value);
          da[j] = from_float<T>(q * u * slope);
        } else {
          h[j] = from_float<T>(value);
          da[j] = from_float<T>(q * slope);
        }
      }
    }
  });
}

template <class Body>
static inline void by_activation(int kind, int gated, const Body& body) {
  using std::integral_constant;
  if (kind == kSilu) {
    if (gated)
      body(integral_constant<int, kSilu>{}, std::true_type{});
    else
      body(integral_constant<int, kSilu>{}, std::false_type{});
  } else {
    if (gated)
      body(integral_constant<int, kGeluTanh>{}, std::true_type{});
    else
      body(integral_constant<int, kGeluTanh>{}, std::false_type{});
  }
}

static void activate(const void* in, void* out, int64_t rows, int64_t width, int kind, int gated,
                     int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_activation(kind, gated, [&](auto k, auto g) {
      activate_rows<T, decltype(k)::value, decltype(g)::value>(
          static_cast<const T*>(in), static_cast<T*>(out), rows, width, threads);
    });
  });
}

static void activate_backward(const void* in, const void* grad, void* din, void* out, int64_t rows,
                              int64_t width, int kind, int gated, int dtype, int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    by_activation(kind, gated, [&](auto k, auto g) {
      activate_rows_backward<T, decltype(k)::value, decltype(g)::value>(
          static_cast<const T*>(in), static_cast<const T*>(grad), static_cast<T*>(din),
          static_cast<T*>(out), rows, width, threads);
    });
  });
}

}  // namespace FB_NAMESPACE
