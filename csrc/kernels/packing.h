// How rows of a tensor become packed blocks, and scores the left sides of products. T is how the
// tensor is stored, P whether cells are pairs.
#pragma once

#include "tiles.h"

namespace FB_NAMESPACE {
namespace tiles {

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
  if (width == 0) return;  // `in` may be null
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

// Cells of a row, or of the pair of neighbouring rows that begins with it.
template <bool P, class T>
FB_INLINE void join_rows(float* out, const T* row, int64_t step, int64_t width) {
  int64_t j = 0;
  if constexpr (P) {
    const T* next = row + step;
#if defined(__AVX512BW__)
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
        39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (; j + 2 * kLanes <= width; j += 2 * kLanes) {
      __m512i even, odd;
      std::memcpy(&even, row + j, sizeof(even));
      std::memcpy(&odd, next + j, sizeof(odd));
      store(out + j, (vf)_mm512_permutex2var_epi16(even, low, odd));
      store(out + j + kLanes, (vf)_mm512_permutex2var_epi16(even, high, odd));
    }
#endif
    for (; j < width; ++j) out[j] = pair(row[j].bits, next[j].bits);
  } else {
#pragma omp simd
    for (j = 0; j < width; ++j) out[j] = to_float(row[j]);
  }
}

// Pairs of rows (single rows, without pairs): out[cells(count)][wide], columns past `width` zero.
template <bool P, class T>
static void pack_neighbours(float* out, const T* in, int64_t step, int64_t count, int64_t width,
                            int64_t wide) {
  for (int64_t k = 0; k < cells<P>(count); ++k) {
    const T* from = in + k * kStep<P> * step;
    float* to = out + k * wide;
    if (kStep<P> * (k + 1) <= count)
      join_rows<P>(to, from, step, width);
    else
      for (int64_t j = 0; j < width; ++j) to[j] = cell_of<P>(from + j, 0, 1);
    for (int64_t j = width; j < wide; ++j) to[j] = 0.0f;
  }
}

// The same as a whole block: out[kBlock / step][padded(width)], what lies past `count` rows zero.
template <bool P, class T>
static void pack_summed(float* out, const T* in, int64_t step, int64_t count, int64_t width) {
  const int64_t wide = padded(width), filled = cells<P>(count);
  pack_neighbours<P>(out, in, step, count, width, wide);
  std::memset(out + filled * wide, 0, (kBlock / kStep<P> - filled) * wide * sizeof(float));
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

}  // namespace tiles
}  // namespace FB_NAMESPACE
