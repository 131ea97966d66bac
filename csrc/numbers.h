// Number formats and elementary functions, written so that compilers turn loops of them into
// vector code on every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace FB_NAMESPACE {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) {
  uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, 4);
  return result;
}

template <class T>
static inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  uint32_t quiet = (wide >> 16) | 0x40;
  return bf16{static_cast<uint16_t>((wide & 0x7fffffff) > 0x7f800000 ? quiet : rounded)};
}

// a * b + c in one rounding where the instruction exists; elsewhere a library call would be far
// slower than two roundings.
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) within 2 ulp; 0 below -87.3, inf above 88.7, NaN stays NaN.
static inline float exp_fast(float x) {
  float clamped = x < -87.33654f ? -87.33654f : x;
  clamped = clamped > 88.72283f ? 88.72283f : clamped;
  float shifted = fused(clamped, 1.44269504f, 12582912.0f);
  float n = shifted - 12582912.0f;
  float r = fused(n, -0.693145752f, clamped);
  r = fused(n, -1.42860677e-6f, r);
  float p = 1.98756900e-4f;
  p = fused(p, r, 1.39819994e-3f);
  p = fused(p, r, 8.33345205e-3f);
  p = fused(p, r, 4.16657962e-2f);
  p = fused(p, r, 1.66666657e-1f);
  p = fused(p, r, 5.00000000e-1f);
  p = fused(p, r * r, r) + 1.0f;
  // two factors, because 2^128 is no float
  int32_t whole = static_cast<int32_t>(n);
  int32_t half = whole >> 1;
  uint32_t first = static_cast<uint32_t>(half + 127) << 23;
  uint32_t second = static_cast<uint32_t>(whole - half + 127) << 23;
  float a, b;
  std::memcpy(&a, &first, 4);
  std::memcpy(&b, &second, 4);
  float result = p * a * b;
  result = x < -87.33654f ? 0.0f : result;
  result = x > 88.72283f ? INFINITY : result;
  return x != x ? x : result;
}

}  // namespace FB_NAMESPACE
