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

// Round to nearest, ties to even; what a NaN becomes is left open.
template <class T>
static inline T round_finite(float value);

template <>
inline float round_finite<float>(float value) {
  return value;
}

template <>
inline bf16 round_finite<bf16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  return bf16{static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16)};
}

template <class T>
static inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// As round_finite, but NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, 4);
  uint32_t rounded = round_finite<bf16>(value).bits, quiet = (wide >> 16) | 0x40;
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

// exp(x) = 2^n p: gives p, within 1/sqrt(2) .. sqrt(2), and n in the lowest bits of `shifted`.
static inline float exp_parts(float x, float& shifted) {
  shifted = fused(x, 1.44269504f, 12582912.0f);
  float n = shifted - 12582912.0f;
  float r = fused(n, -0.693145752f, x);
  r = fused(n, -1.42860677e-6f, r);
  float p = 1.98756900e-4f;
  p = fused(p, r, 1.39819994e-3f);
  p = fused(p, r, 8.33345205e-3f);
  p = fused(p, r, 4.16657962e-2f);
  p = fused(p, r, 1.66666657e-1f);
  p = fused(p, r, 5.00000000e-1f);
  return fused(p, r * r, r) + 1.0f;
}

// exp(x) within 2 ulp; 0 below -87.3, inf above 88.7, NaN stays NaN.
static inline float exp_fast(float x) {
  float clamped = x < -87.33654f ? -87.33654f : x;
  clamped = clamped > 88.72283f ? 88.72283f : clamped;
  float shifted;
  float p = exp_parts(clamped, shifted);
  // two factors, because 2^128 is no float
  int32_t whole = static_cast<int32_t>(shifted - 12582912.0f);
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

// exp(x) for x <= 0 within 2 ulp: half the work of exp_fast. 0 below -87.3, NaN stays NaN.
static inline float exp_below_one(float x) {
  float shifted;
  float p = exp_parts(x < -87.33654f ? -87.33654f : x, shifted);
  uint32_t bits, exponent;
  std::memcpy(&bits, &p, 4);
  std::memcpy(&exponent, &shifted, 4);
  bits += exponent << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return x < -87.33654f ? 0.0f : result;
}

// tanh(x) within 4 ulp; NaN stays NaN.
static inline float tanh_fast(float x) {
  float size = std::fabs(x), square = x * x;
  float p = -5.70498733e-3f;
  p = fused(p, square, 2.06390880e-2f);
  p = fused(p, square, -5.37397154e-2f);
  p = fused(p, square, 1.33314416e-1f);
  p = fused(p, square, -3.33332807e-1f);
  float small = fused(x * square, p, x);
  float power = exp_below_one(-2.0f * size);
  float large = std::copysign((1.0f - power) / (1.0f + power), x);
  return size < 0.625f ? small : large;
}

}  // namespace FB_NAMESPACE
