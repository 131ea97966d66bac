// float16: its conversions, exact on every instruction set, and rows of values in any format.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace FB_NAMESPACE {

struct fp16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline float to_float(fp16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  uint32_t magnitude = value.bits & 0x7fffu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  // subtracting the 113 restores what subnormal numbers lack of a leading one
  uint32_t small = bits_of(float_of((magnitude << 13) + (113u << 23)) - float_of(113u << 23));
  uint32_t normal = (magnitude << 13) + (112u << 23);
  uint32_t special = (magnitude << 13) | 0x7f800000u;
  uint32_t wide = magnitude < 0x400u ? small : magnitude < 0x7c00u ? normal : special;
  return float_of(wide | sign);
#endif
}

// Round to nearest, ties to even; from 65,520 on to infinity.
template <>
inline fp16 from_float<fp16>(float value) {
#if defined(__F16C__)
  return fp16{static_cast<uint16_t>(_cvtss_sh(value, 0))};
#else
  uint32_t wide = bits_of(value), sign = (wide >> 16) & 0x8000u, magnitude = wide & 0x7fffffffu;
  // adding a half lets the addition itself round where the result is subnormal
  uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t narrow = magnitude < 0x38800000u ? small : magnitude < 0x47800000u ? normal : special;
  return fp16{static_cast<uint16_t>(narrow | sign)};
#endif
}

// Longer runs of float16 go through these: compilers do not make vectors of the scalar conversion.
static inline void widen(const fp16* in, float* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(
                                  reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < count; ++i) out[i] = to_float(in[i]);
}

static inline void narrow(const float* in, fp16* out, int64_t count) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < count; ++i) out[i] = from_float<fp16>(in[i]);
}

template <class T>
static inline void widen(const T* in, float* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(in[i]);
}

template <class T>
static inline void narrow(const float* in, T* out, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(in[i]);
}

// As `by_type`, float16 included.
template <class Body>
static inline void by_float(int dtype, const Body& body) {
  if (dtype == kFloat16)
    body(fp16{0});
  else
    by_type(dtype, body);
}

}  // namespace FB_NAMESPACE
