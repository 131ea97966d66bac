// What attention is made of: vectors of scores, matrix products of small packed blocks, packing.
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
namespace attend {

// Lanes of a vector, and how many rows of a product stay in registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 4;
#elif defined(__ARM_NEON)
constexpr int kLanes = 4, kRows = 8;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int kBlock = 64;  // queries, and keys, of a block
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
#elif defined(__ARM_NEON)
  return vdupq_n_f32(value);
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
  return vfmaq_f32(c, a, b);
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

template <bool P, Into into, int N>
FB_INLINE void tile(Left a, Right b, int64_t depth, float* c, int64_t c_step) {
  vf acc[kRows][N];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      acc[m][n] = into == Into::kStore ? vf{} : load(c + m * c_step + n * kLanes);
  for (int64_t k = 0; k < depth; ++k) {
    vf right[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) right[n] = load(b.data + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      vf left = splat(a.data[m * a.row_step]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = mac<P>(acc[m][n], left, right[n]);
    }
    a.data += a.k_step;
    b.data += b.k_step;
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + m * c_step + n * kLanes, acc[m][n]);
}

// c[kRows, vectors * kLanes] (+)= a[kRows, depth] * b[depth, ...].
template <bool P, Into into>
FB_INLINE void product(Left a, Right b, int64_t depth, int64_t vectors, float* c, int64_t c_step) {
  int64_t n = 0;
  for (; n + 2 <= vectors; n += 2)
    tile<P, into, 2>(a, {b.data + n * kLanes, b.k_step}, depth, c + n * kLanes, c_step);
  if (n < vectors)
    tile<P, into, 1>(a, {b.data + n * kLanes, b.k_step}, depth, c + n * kLanes, c_step);
}

// --- packing: T is how the tensor is stored, P whether cells are pairs ---

template <bool P>
constexpr int kStep = P ? 2 : 1;

template <bool P>
FB_INLINE int64_t cells(int64_t width) {
  return (width + kStep<P> - 1) / kStep<P>;
}

FB_INLINE int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

FB_INLINE float pair(uint16_t low, uint16_t high) {
  uint32_t both = static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
  float cell;
  std::memcpy(&cell, &both, 4);
  return cell;
}

// The k-th cell of a row.
template <bool P, class T>
FB_INLINE float cell_of(const T* row, int64_t k, int64_t width) {
  if constexpr (P)
    return pair(row[2 * k].bits, 2 * k + 1 < width ? row[2 * k + 1].bits : uint16_t{0});
  else
    return to_float(row[k]);
}

// Rows as they are: out[total][cells(width)], rows past `count` zero.
template <bool P, class T>
static void pack_rows(float* out, const T* in, int64_t step, int64_t count, int64_t total,
                      int64_t width) {
  const int64_t depth = cells<P>(width);
  for (int64_t row = 0; row < count; ++row) {
    float* to = out + row * depth;
    const T* from = in + row * step;
    if (P && width % 2 == 0) {
      std::memcpy(to, from, width * sizeof(T));
    } else {
      for (int64_t k = 0; k < depth; ++k) to[k] = cell_of<P>(from, k, width);
    }
  }
  std::memset(out + count * depth, 0, (total - count) * depth * sizeof(float));
}

#if defined(__AVX512F__)
// Sixteen rows of sixteen cells to as many columns.
FB_INLINE void transpose(vf (&rows)[16]) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  // four times, the halves of the sequence of all cells are shuffled like two packs of cards
#pragma GCC unroll 4
  for (int pass = 0; pass < 4; ++pass) {
    vf next[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      next[2 * i] = _mm512_permutex2var_ps(rows[i], low, rows[i + 8]);
      next[2 * i + 1] = _mm512_permutex2var_ps(rows[i], high, rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = next[i];
  }
}

// kLanes cells of a row from the k-th on.
template <bool P, class T>
FB_INLINE vf cells_at(const T* row, int64_t k) {
  if constexpr (P)
    return load(reinterpret_cast<const float*>(row) + k);
  else
    return widen(row + k);
}
#endif

// Columns: out[cells(width)][kBlock], columns past `count` zero.
template <bool P, class T>
static void pack_columns(float* out, const T* in, int64_t step, int64_t count, int64_t width) {
  const int64_t depth = cells<P>(width);
  for (int64_t row = 0; row < kBlock; row += 16) {
    int64_t k = 0;
#if defined(__AVX512F__)
    if (row + 16 <= count) {
      for (; (k + 16) * kStep<P> <= width; k += 16) {
        vf block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) block[i] = cells_at<P>(in + (row + i) * step, k);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) store(out + (k + i) * kBlock + row, block[i]);
      }
    }
#endif
    for (; k < depth; ++k)
      for (int64_t i = row; i < row + 16; ++i)
        out[k * kBlock + i] = i < count ? cell_of<P>(in + i * step, k, width) : 0.0f;
  }
}

// Pairs of rows: out[kBlock / step][padded(width)], what lies past `count` rows or `width` zero.
template <bool P, class T>
static void pack_summed(float* out, const T* in, int64_t step, int64_t count, int64_t width) {
  const int64_t wide = padded(width);
  for (int64_t k = 0; k < kBlock / kStep<P>; ++k) {
    float* to = out + k * wide;
    int64_t row = k * kStep<P>, filled = 0;
    if (row < count) {
      const T* from = in + row * step;
      filled = width;
      if constexpr (P) {
        if (row + 1 < count) {
          const T* next = from + step;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) to[j] = pair(from[j].bits, next[j].bits);
        } else {
          for (int64_t j = 0; j < width; ++j) to[j] = pair(from[j].bits, uint16_t{0});
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) to[j] = to_float(from[j]);
      }
    }
    for (int64_t j = filled; j < wide; ++j) to[j] = 0.0f;
  }
}

// Vector number `vector` of a row that later is the left side of a sum along the row.
template <bool P>
FB_INLINE void store_row(float* row, int vector, vf value) {
#if defined(__AVX512BF16__)
  if constexpr (P) {
    __m256bh half = _mm512_cvtneps_pbh(value);
    std::memcpy(row + vector * (kLanes / 2), &half, sizeof(half));
    return;
  }
#endif
  store(row + vector * kLanes, value);
}

// The same vector of two neighbouring rows, later the left side of a sum over rows.
template <bool P>
FB_INLINE void store_two(float* rows, int vector, vf even, vf odd) {
#if defined(__AVX512BF16__)
  if constexpr (P) {
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    __m512i both = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    std::memcpy(rows + vector * kLanes, &both, sizeof(both));
    return;
  }
#endif
  store(rows + vector * kLanes, even);
  store(rows + kBlock + vector * kLanes, odd);
}

}  // namespace attend
}  // namespace FB_NAMESPACE
