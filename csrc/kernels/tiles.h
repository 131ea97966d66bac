// What attention and thin products are made of: vectors of floats, and products of packed blocks.
//
// A packed block holds cells of 32 bits: one float, or, where the CPU multiplies bf16 pairs, two
// neighbours along the summed dimension. Every product below then is the same loop: broadcast a
// cell of the left block, multiply it with a vector of cells of the right one.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define FB_INLINE __attribute__((always_inline)) static inline
#define FB_INLINE_MEMBER __attribute__((always_inline)) inline

namespace FB_NAMESPACE {
namespace tiles {

// Lanes of a vector; rows and vectors of a product that stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kColumns = 2;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4, kColumns = 2;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kRows = 4, kColumns = 4;
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 2;
#endif
static_assert(kRows <= kLanes, "one value for each row fits into a vector");
constexpr int kBlock = 64;  // rows of a packed block: queries, keys
constexpr int kVectors = kBlock / kLanes;

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));

FB_INLINE vf load(const float* from) {
  vf value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

FB_INLINE void store(float* to, vf value) { std::memcpy(to, &value, sizeof(value)); }

// No arithmetic: the bits may be a pair of bf16.
FB_INLINE vf splat(float value) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#elif defined(__AVX2__)
  return _mm256_set1_ps(value);
#else
  return vf{value, value, value, value};
#endif
}

FB_INLINE vi splat(int32_t value) { return vi{} + value; }

FB_INLINE vf mul_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

FB_INLINE vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

// The second where the first is NaN, either way round: a NaN among `b` is never lost.
FB_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return choose(a > b, a, b);
#endif
}

FB_INLINE float sum_of(vf value) {
  float lanes[kLanes], sum = 0;
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  sum = lanes[0];
  return sum;
}

FB_INLINE float largest_of(vf value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(value);
#else
  float lanes[kLanes];
  store(lanes, value);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i)
      lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

FB_INLINE vf widen(const float* from) { return load(from); }

FB_INLINE vf widen(const bf16* from) {
#if defined(__AVX512F__)
  __m256i half;
  std::memcpy(&half, from, sizeof(half));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
  __m128i half;
  std::memcpy(&half, from, sizeof(half));
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  vf value;
  for (int i = 0; i < kLanes; ++i) value[i] = to_float(from[i]);
  return value;
#endif
}

template <class T>
static float dot(const T* a, const T* b, int64_t width) {
  vf sums = {};
  int64_t j = 0;
  for (; j + kLanes <= width; j += kLanes) sums = mul_add(widen(a + j), widen(b + j), sums);
  float sum = sum_of(sums);
  for (; j < width; ++j) sum += to_float(a[j]) * to_float(b[j]);
  return sum;
}

// to[j] = from[j] * factor, rounded to nearest.
FB_INLINE void narrow(float* to, const float* from, int64_t width, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) to[j] = from[j] * factor;
}

FB_INLINE void narrow(bf16* to, const float* from, int64_t width, float factor) {
  int64_t j = 0;
#if defined(__AVX512BF16__)
  for (; j + kLanes <= width; j += kLanes) {
    __m256bh half = _mm512_cvtneps_pbh(load(from + j) * splat(factor));
    std::memcpy(to + j, &half, sizeof(half));
  }
#endif
#pragma omp simd
  for (int64_t i = j; i < width; ++i) to[i] = from_float<bf16>(from[i] * factor);
}

// A vector, rounded to nearest.
FB_INLINE void narrow(float* to, vf value) { store(to, value); }

FB_INLINE void narrow(bf16* to, vf value) {
#if defined(__AVX512BF16__)
  __m256bh half = _mm512_cvtneps_pbh((__m512)value);
  std::memcpy(to, &half, sizeof(half));
#else
  float lanes[kLanes];
  store(lanes, value);
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<bf16>(lanes[i]);
#endif
}

// Asks for rows that are a step apart, which the CPU does not foresee.
template <class T>
static void fetch(const T* rows, int64_t step, int64_t count, int64_t width) {
  for (int64_t row = 0; row < count; ++row)
    for (int64_t j = 0; j < width; j += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(rows + row * step + j, 0, 2);
}

// 2^x for x up to 127, within 2e-7 of it; 0 below -126 (-149 with AVX-512), NaN stays NaN.
FB_INLINE vf exp2_of(vf x) {
  vf clamped = larger(splat(-160.0f), x);
#if defined(__AVX512F__)
  vf n = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vf n = (clamped + splat(12582912.0f)) - splat(12582912.0f);
#endif
  vf r = clamped - n;
  vf p = splat(1.327647129e-3f);
  p = mul_add(p, r, splat(9.675540961e-3f));
  p = mul_add(p, r, splat(5.550713092e-2f));
  p = mul_add(p, r, splat(2.402212024e-1f));
  p = mul_add(p, r, splat(6.931469440e-1f));
  p = mul_add(p, r, splat(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  vi whole = __builtin_convertvector(n, vi);
  vf scaled = p * (vf)((whole + splat(127)) << 23);
  return choose(clamped < splat(-126.0f), splat(0.0f), scaled);
#endif
}

// tanh within 2e-7.
FB_INLINE vf tanh_of(vf x) {
  vi sign = (vi)x & splat(static_cast<int32_t>(0x80000000u));
  vf size = (vf)((vi)x ^ sign);
  vf e = exp2_of(size * splat(-2.885390082f));
  vf value = (splat(1.0f) - e) / (splat(1.0f) + e);
  return (vf)((vi)value | sign);
}

// acc + a * b, or with pairs acc + a.low * b.low + a.high * b.high.
template <bool P>
FB_INLINE vf mac(vf acc, vf a, vf b) {
#if defined(__AVX512BF16__)
  if constexpr (P)
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_castps_si512(a),
                            (__m512bh)_mm512_castps_si512(b));
#endif
  return mul_add(a, b, acc);
}

// A block to be read cell by cell: element (row, k) is data[row * row_step + k * k_step].
struct Left {
  const float* data;
  int64_t row_step, k_step;
};

// A block to be read by vectors: element (k, column) is data[k * k_step + column].
struct Right {
  const float* data;
  int64_t k_step;
};

enum class Into { kStore, kAdd };

// sums[R, N vectors] += a[R, depth] * b[depth, ...].
template <bool P, int R, int N>
FB_INLINE void add_products(vf (&sums)[R][N], Left a, Right b, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    vf right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b.data + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) {
      vf left = splat(a.data[m * a.row_step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[m][n] = mac<P>(sums[m][n], left, right[n]);
    }
    a.data += a.k_step;
    b.data += b.k_step;
  }
}

template <bool P, Into into, int N>
FB_INLINE void tile(Left a, Right b, int64_t depth, float* c, int64_t c_step) {
  vf acc[kRows][N];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[m][n] = into == Into::kStore ? vf{} : load(c + m * c_step + n * kLanes);
  add_products<P>(acc, a, b, depth);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_step + n * kLanes, acc[m][n]);
}

// c[kRows, vectors * kLanes] (+)= a[kRows, depth] * b[depth, ...].
template <bool P, Into into>
FB_INLINE void product(Left a, Right b, int64_t depth, int64_t vectors, float* c, int64_t c_step) {
  int64_t n = 0;
  for (; n + kColumns <= vectors; n += kColumns)
    tile<P, into, kColumns>(a, {b.data + n * kLanes, b.k_step}, depth, c + n * kLanes, c_step);
  for (; n < vectors; ++n)
    tile<P, into, 1>(a, {b.data + n * kLanes, b.k_step}, depth, c + n * kLanes, c_step);
}

}  // namespace tiles
}  // namespace FB_NAMESPACE
