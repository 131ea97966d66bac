// One vector register of floats on every instruction set, for dot products.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace FB_NAMESPACE {

#if defined(__AVX512F__)

struct Lanes {
  static constexpr int kWidth = 16;
  __m512 v;
};

static inline Lanes lanes_all(float value) { return {_mm512_set1_ps(value)}; }
static inline Lanes lanes_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Lanes lanes_load(const bf16* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
static inline void lanes_store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
static inline Lanes lanes_fma(Lanes a, Lanes b, Lanes c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
static inline float lanes_sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }

// The sums of four registers, next to each other.
static inline void lanes_sum4(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  __m512 all = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__)

struct Lanes {
  static constexpr int kWidth = 8;
  __m256 v;
};

static inline Lanes lanes_all(float value) { return {_mm256_set1_ps(value)}; }
static inline Lanes lanes_load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Lanes lanes_load(const bf16* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
static inline void lanes_store(float* p, Lanes a) { _mm256_storeu_ps(p, a.v); }
static inline Lanes lanes_fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
static inline void lanes_sum4(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
  __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
static inline float lanes_sum(Lanes a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

#elif defined(__ARM_NEON)

struct Lanes {
  static constexpr int kWidth = 4;
  float32x4_t v;
};

static inline Lanes lanes_all(float value) { return {vdupq_n_f32(value)}; }
static inline Lanes lanes_load(const float* p) { return {vld1q_f32(p)}; }
static inline Lanes lanes_load(const bf16* p) {
  uint16x4_t half = vld1_u16(reinterpret_cast<const uint16_t*>(p));
  return {vreinterpretq_f32_u32(vshll_n_u16(half, 16))};
}
static inline void lanes_store(float* p, Lanes a) { vst1q_f32(p, a.v); }
static inline Lanes lanes_fma(Lanes a, Lanes b, Lanes c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
static inline float lanes_sum(Lanes a) { return vaddvq_f32(a.v); }
static inline void lanes_sum4(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
}

#else

struct Lanes {
  static constexpr int kWidth = 4;
  float v[4];
};

static inline Lanes lanes_all(float value) { return {{value, value, value, value}}; }
template <class T>
static inline Lanes lanes_load(const T* p) {
  return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
static inline void lanes_store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof(a.v)); }
static inline Lanes lanes_fma(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < 4; ++i) c.v[i] = fused(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline float lanes_sum(Lanes a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
static inline void lanes_sum4(Lanes a, Lanes b, Lanes c, Lanes d, float* out) {
  out[0] = lanes_sum(a), out[1] = lanes_sum(b), out[2] = lanes_sum(c), out[3] = lanes_sum(d);
}

#endif

}  // namespace FB_NAMESPACE
