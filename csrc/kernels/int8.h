// Row-wise int8: weights both ways, and what stands around the product of LLM.int8.
#pragma once

#include "quantize.h"

namespace FB_NAMESPACE {

constexpr float kPerCode = 7.874015718698502e-3f;  // 1 / 127
constexpr float kHalfMax = 65504.0f;

// Float16 stands between any weight and its int8 code.
template <class T>
static inline void as_halves(const T* x, fp16* halves, int64_t count) {
  float wide[kNestedBlock];
  widen(x, wide, count);
  narrow(wide, halves, count);
}

static inline void as_halves(const fp16* x, fp16* halves, int64_t count) {
  std::memcpy(halves, x, static_cast<size_t>(count) * sizeof(fp16));
}

static inline void round_codes(const fp16* halves, float factor, int8_t* codes, int64_t count) {
  float wide[kNestedBlock];
  widen(halves, wide, count);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float scaled = wide[i] * factor;
    // adding 1.5 * 2^23 rounds half to even; a NaN has no code
    float rounded = (scaled + 12582912.0f) - 12582912.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(scaled == scaled ? rounded : 0.0f));
  }
}

// In two roundings, as PyTorch divides a number by a tensor.
static inline float code_factor(float absmax) {
  return absmax == 0.0f ? 0.0f : 1.0f / absmax * 127.0f;
}

template <class T>
static void quantize_rows(const T* x, int8_t* codes, float* absmax, int64_t rows, int64_t width,
                          int threads) {
  int64_t grain = kSplit / std::max<int64_t>(width, 1) + 1;
  parallel(rows, grain, threads, [=](int64_t begin, int64_t end, int) {
    fp16 halves[kNestedBlock];
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      fp16 most{0};
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start);
        as_halves(in + start, halves, part);
        uint16_t bits = from_float<fp16>(largest(halves, part)).bits;
        most.bits = std::max(most.bits, bits);
      }
      absmax[row] = to_float(most);
      float factor = code_factor(absmax[row]);
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start);
        as_halves(in + start, halves, part);
        round_codes(halves, factor, codes + row * width + start, part);
      }
    }
  });
}

static void quantize_int8(const void* x, int8_t* codes, float* absmax, int64_t rows, int64_t width,
                          int dtype, int threads) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    quantize_rows(static_cast<const T*>(x), codes, absmax, rows, width, threads);
  });
}

template <class T>
static void dequantize_rows(const int8_t* codes, const float* absmax, T* out, int64_t rows,
                            int64_t width, int threads) {
  int64_t grain = kSplit / std::max<int64_t>(width, 1) + 1;
  parallel(rows, grain, threads, [=](int64_t begin, int64_t end, int) {
    float wide[kNestedBlock];
    for (int64_t row = begin; row < end; ++row) {
      float scale = absmax[row];
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start), at = row * width + start;
#pragma omp simd
        for (int64_t i = 0; i < part; ++i)
          wide[i] = static_cast<float>(codes[at + i]) * scale * kPerCode;
        narrow(wide, out + at, part);
      }
    }
  });
}

static void dequantize_int8(const int8_t* codes, const float* absmax, void* out, int64_t rows,
                            int64_t width, int dtype, int threads) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    dequantize_rows(codes, absmax, static_cast<T*>(out), rows, width, threads);
  });
}

// ---- the int8 product, around the multiplication itself

// Halves of one run of activations, clamped to float16's range; a magnitude of `threshold` or more
// (0: none) is zeroed and its column marked. Returns whether an infinity was met.
template <class T>
static inline bool split_outliers(const T* x, fp16* halves, uint8_t* marks, int64_t count,
                                  float threshold) {
  float wide[kNestedBlock];
  int infinite = 0, large = 0;
  widen(x, wide, count);
#pragma omp simd reduction(| : infinite)
  for (int64_t i = 0; i < count; ++i) {
    infinite |= std::fabs(wide[i]) == INFINITY;
    wide[i] = wide[i] > kHalfMax ? kHalfMax : wide[i];
    wide[i] = wide[i] < -kHalfMax ? -kHalfMax : wide[i];
  }
  narrow(wide, halves, count);
  if (threshold <= 0.0f) return infinite != 0;
  widen(halves, wide, count);
#pragma omp simd reduction(| : large)
  for (int64_t i = 0; i < count; ++i) large |= std::fabs(wide[i]) >= threshold;
  if (large == 0) return infinite != 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!(std::fabs(wide[i]) >= threshold)) continue;
    halves[i].bits = 0;
    __atomic_store_n(marks + i, static_cast<uint8_t>(1), __ATOMIC_RELAXED);
  }
  return infinite != 0;
}

template <class T>
static void activation_rows(const T* x, int8_t* codes, float* absmax, uint8_t* marks, int64_t rows,
                            int64_t width, float threshold, int threads) {
  int64_t grain = kSplit / std::max<int64_t>(width, 1) + 1;
  parallel(rows, grain, threads, [=](int64_t begin, int64_t end, int) {
    fp16 halves[kNestedBlock];
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + row * width;
      fp16 most{0};
      bool infinite = false;
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start);
        infinite |= split_outliers(in + start, halves, marks + start, part, threshold);
        uint16_t bits = from_float<fp16>(largest(halves, part)).bits;
        most.bits = std::max(most.bits, bits);
      }
      float factor = code_factor(to_float(most));
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start);
        split_outliers(in + start, halves, marks + start, part, threshold);
        round_codes(halves, factor, codes + row * width + start, part);
      }
      absmax[row] = infinite ? NAN : to_float(most);
    }
  });
}

// Rows of activations to int8 and one scale each. `marks` [width] starts as zeros; columns of it
// are set in which some magnitude reaches the threshold.
static void quantize_activations(const void* x, int8_t* codes, float* absmax, uint8_t* marks,
                                 int64_t rows, int64_t width, float threshold, int dtype,
                                 int threads) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    activation_rows(static_cast<const T*>(x), codes, absmax, marks, rows, width, threshold,
                    threads);
  });
}

template <class T>
static void finish_rows(const int32_t* sums, const float* x_scales, const float* scales,
                        const T* extra, const float* bias, T* out, int64_t rows, int64_t width,
                        int threads) {
  int64_t grain = kSplit / std::max<int64_t>(width, 1) + 1;
  parallel(rows, grain, threads, [=](int64_t begin, int64_t end, int) {
    float wide[kNestedBlock], more[kNestedBlock];
    for (int64_t row = begin; row < end; ++row) {
      float scale = x_scales[row];
      for (int64_t start = 0; start < width; start += kNestedBlock) {
        int64_t part = std::min(kNestedBlock, width - start), at = row * width + start;
        // rounded from double, as PyTorch rounds the product of two Python floats
        constexpr float kPerCodes = static_cast<float>(7.874015718698502e-3 * 7.874015718698502e-3);
#pragma omp simd
        for (int64_t i = 0; i < part; ++i)
          wide[i] = static_cast<float>(sums[at + i]) * (scale * scales[start + i]) * kPerCodes;
        if (extra != nullptr) {
          widen(extra + at, more, part);
#pragma omp simd
          for (int64_t i = 0; i < part; ++i) wide[i] += more[i];
        }
        if (bias != nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < part; ++i) wide[i] += bias[start + i];
        }
        narrow(wide, out + at, part);
      }
    }
  });
}

// Integer sums of products to y = sums * x_scale * scale / 127^2 + extra + bias.
static void finish_int8(const int32_t* sums, const float* x_scales, const float* scales,
                        const void* extra, const float* bias, void* out, int64_t rows,
                        int64_t width, int dtype, int threads) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    finish_rows(sums, x_scales, scales, static_cast<const T*>(extra), bias, static_cast<T*>(out),
                rows, width, threads);
  });
}

}  // namespace FB_NAMESPACE
