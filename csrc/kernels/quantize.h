// Weights to 4-bit codes with one scale a block, and those scales to 8 bits.
//
// The tables come from Python (fourbit.codebook), so their values are written once. Arithmetic is
// that of the plain PyTorch kernels, operation by operation, so the bytes are the same.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace FB_NAMESPACE {

constexpr int64_t kUnit = 32;           // weights coded or decoded at once: 16 bytes of codes
constexpr int64_t kNestedBlock = 256;   // scales that share a second-level scale
constexpr int64_t kSplit = 16384;       // values a thread must have before another one helps
constexpr float kTiny = 1e-38f;         // keeps 1 / absmax finite for a block of zeros

// ---- the largest magnitude of a run; Inf and NaN rank above every number, so they come through

static inline float largest(const float* x, int64_t count) {
  int32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  return float_of(static_cast<uint32_t>(most));
}

// Magnitudes of 16-bit numbers are ordered as their bits are.
template <class T>
static inline float largest(const T* x, int64_t count) {
  uint16_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits = x[i].bits & 0x7fff;
    most = bits > most ? bits : most;
  }
  return to_float(T{most});
}

static inline bool finite(float value) { return std::fabs(value) < INFINITY; }

// ---- 4-bit codes

// Thresholds (15, ascending) as a search tree in breadth-first order, the root at 1.
static inline void plant(const float* thresholds, int64_t stride, float* tree) {
  tree[0] = 0;
  for (int node = 1, step = 8; step > 0; step >>= 1)
    for (int at = step - 1; at < 15; at += 2 * step) tree[node++] = thresholds[at * stride];
}

// What coding needs of a data type: its thresholds as a tree, and the code of each of the 16 ranks.
struct Coder {
  alignas(64) float tree[16];
  alignas(16) uint8_t codes[16];
#if defined(__AVX512F__)
  // A quicker way for most types: values fall into 32 bins by a product that never falls when they
  // rise, and where no bin holds two thresholds, the one inside it decides between two codes.
  bool binned = true;
  alignas(64) float inside[32];
  alignas(64) uint16_t bins[64];  // codes at or below the threshold of the bin, then above it

  static int bin_of(float y) { return static_cast<int>(std::fmaf(y, 15.5f, 16.0f)); }
#endif

  Coder(const float* thresholds, const uint8_t* code_of_rank) {
    plant(thresholds, 1, tree);
    std::memcpy(codes, code_of_rank, 16);
#if defined(__AVX512F__)
    for (int bin = 0, rank = 0; bin < 32; ++bin) {
      bool found = rank < 15 && bin_of(thresholds[rank]) <= bin;
      inside[bin] = found ? thresholds[rank] : INFINITY;
      bins[bin] = codes[rank];
      rank += found;
      bins[bin + 32] = codes[rank];
      binned = binned && !(rank < 15 && bin_of(thresholds[rank]) <= bin);
    }
#endif
  }
};

#if defined(__AVX512F__)

static inline __m512 load16(const float* x) { return _mm512_loadu_ps(x); }

static inline __m512 load16(const bf16* x) {
  __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

static inline __m512 load16(const fp16* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// 16 + the number of thresholds below each value.
static inline __m512i ranks16(__m512 y, __m512 tree) {
  __m512i one = _mm512_set1_epi32(1), node = one;
  for (int level = 0; level < 4; ++level) {
    __mmask16 above = _mm512_cmp_ps_mask(y, _mm512_permutexvar_ps(node, tree), _CMP_GT_OQ);
    node = _mm512_add_epi32(node, node);
    node = _mm512_mask_add_epi32(node, above, node, one);
  }
  return node;
}

// Place in Coder::bins of each value.
static inline __m512i places16(__m512 y, const Coder& coder) {
  __m512 low = _mm512_load_ps(coder.inside), high = _mm512_load_ps(coder.inside + 16);
  __m512i bin =
      _mm512_cvttps_epi32(_mm512_fmadd_ps(y, _mm512_set1_ps(15.5f), _mm512_set1_ps(16.0f)));
  __mmask16 above =
      _mm512_cmp_ps_mask(y, _mm512_permutex2var_ps(low, bin, high), _CMP_GT_OQ);
  return _mm512_mask_add_epi32(bin, above, bin, _mm512_set1_epi32(32));
}

// The codes of kUnit values times `scale`, two to a byte, the first in the high half.
template <class T>
static inline void encode(const T* x, float scale, uint8_t* out, const Coder& coder) {
  __m512 factor = _mm512_set1_ps(scale);
  __m512 y = _mm512_mul_ps(load16(x), factor), z = _mm512_mul_ps(load16(x + 16), factor);
  __m512i codes;
  if (coder.binned) {
    codes = _mm512_packus_epi32(places16(y, coder), places16(z, coder));
    codes = _mm512_permutex2var_epi16(_mm512_load_si512(coder.bins), codes,
                                      _mm512_load_si512(coder.bins + 32));
  } else {
    __m512 tree = _mm512_load_ps(coder.tree);
    codes = _mm512_packus_epi32(ranks16(y, tree), ranks16(z, tree));
    __m128i known = _mm_load_si128(reinterpret_cast<const __m128i*>(coder.codes));
    codes = _mm512_permutexvar_epi16(
        codes, _mm512_broadcast_i64x4(_mm256_cvtepu8_epi16(known)));
  }
  __m512i pairs = _mm512_madd_epi16(codes, _mm512_set1_epi32(0x00010010));
  // packing took turns between the two halves, two bytes at a time
  __m128i order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                   _mm_shuffle_epi8(_mm512_cvtepi32_epi8(pairs), order));
}

#elif defined(__AVX2__)

static inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }

static inline __m256 load8(const bf16* x) {
  __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

static inline __m256 load8(const fp16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}

// The number of thresholds below each value.
static inline __m256i ranks8(__m256 y, const float* tree) {
  __m256i rank = _mm256_setzero_si256();
  for (int level = 0; level < 4; ++level) {
    // from node 2^level on, so that the rank so far is the place within the level
    __m256 bounds = _mm256_permutevar8x32_ps(_mm256_loadu_ps(tree + (1 << level)), rank);
    __m256i above = _mm256_castps_si256(_mm256_cmp_ps(y, bounds, _CMP_GT_OQ));
    rank = _mm256_sub_epi32(_mm256_add_epi32(rank, rank), above);
  }
  return rank;
}

template <class T>
static inline void encode(const T* x, float scale, uint8_t* out, const Coder& coder) {
  __m256 factor = _mm256_set1_ps(scale);
  __m256i rank[4];
  for (int i = 0; i < 4; ++i)
    rank[i] = ranks8(_mm256_mul_ps(load8(x + 8 * i), factor), coder.tree);
  __m256i bytes = _mm256_packus_epi16(_mm256_packus_epi32(rank[0], rank[1]),
                                      _mm256_packus_epi32(rank[2], rank[3]));
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  __m128i codes = _mm_load_si128(reinterpret_cast<const __m128i*>(coder.codes));
  bytes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(codes), bytes);
  __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));
  pairs = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(pairs));
}

#else

template <class T>
static inline void encode(const T* x, float scale, uint8_t* out, const Coder& coder) {
  float y[kUnit];
  int32_t rank[kUnit] = {0};
  widen(x, y, kUnit);
  for (int node = 1; node < 16; ++node) {
    float bound = coder.tree[node];
#pragma omp simd
    for (int64_t i = 0; i < kUnit; ++i) rank[i] += y[i] * scale > bound;
  }
  for (int64_t i = 0; i < kUnit / 2; ++i)
    out[i] = static_cast<uint8_t>(coder.codes[rank[2 * i]] << 4 | coder.codes[rank[2 * i + 1]]);
}

#endif

// The short last block: divided, where whole ones are multiplied by the reciprocal. Past its end
// stands the code of zero.
template <class T>
static inline float encode_tail(const T* x, int64_t count, uint8_t* out, const Coder& coder) {
  float absmax = largest(x, count);
  absmax = absmax < kTiny ? kTiny : absmax;
  for (int64_t start = 0; start < count; start += kUnit) {
    float y[kUnit] = {0};
    uint8_t bytes[kUnit / 2];
    int64_t part = std::min(kUnit, count - start);
    widen(x + start, y, part);
    for (int64_t i = 0; i < part; ++i) y[i] /= absmax;
    encode(y, 1.0f, bytes, coder);
    std::memcpy(out + start / 2, bytes, static_cast<size_t>((part + 1) / 2));
  }
  return absmax;
}

template <class T>
static void quantize_blocks(const T* x, const Coder& coder, uint8_t* packed, float* absmax,
                            int64_t count, int64_t blocksize, int threads) {
  int64_t whole = count / blocksize;
  parallel(whole, std::max<int64_t>(1, kSplit / blocksize), threads,
           [=, &coder](int64_t begin, int64_t end, int) {
             for (int64_t block = begin; block < end; ++block) {
               const T* in = x + block * blocksize;
               uint8_t* out = packed + block * blocksize / 2;
               float most = largest(in, blocksize);
               float scale = 1.0f / (most < kTiny ? kTiny : most);
               absmax[block] = most;
               for (int64_t i = 0; i < blocksize; i += kUnit)
                 encode(in + i, scale, out + i / 2, coder);
             }
           });
  int64_t done = whole * blocksize;
  if (done < count)
    absmax[whole] = encode_tail(x + done, count - done, packed + done / 2, coder);
}

// `thresholds` ascend, 15 of them; `code_of_rank` has 16 codes. No threshold may lie so near to -1
// or 1 that the rounding of x / absmax could carry a value across it.
static void quantize_4bit(const void* x, const float* thresholds, const uint8_t* code_of_rank,
                          uint8_t* packed, float* absmax, int64_t count, int64_t blocksize,
                          int dtype, int threads) {
  Coder coder(thresholds, code_of_rank);
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    quantize_blocks(static_cast<const T*>(x), coder, packed, absmax, count, blocksize, threads);
  });
}

// ---- scales in 8 bits

// One block of centred scales to codes: the number of `thresholds` (255, ascending) below each.
static inline void encode_scales(const float* scaled, int64_t count, const float* thresholds,
                                 uint8_t* codes) {
  int32_t rank[kNestedBlock] = {0};
  int step = 128;
#if defined(__AVX512F__)
  // the upper half of the search looks at 15 thresholds only, which fit a register
  alignas(64) float tree[16];
  plant(thresholds + 15, 16, tree);
  __m512 upper = _mm512_load_ps(tree);
  for (int64_t i = 0; i < count; i += 16) {
    __m512i node = ranks16(_mm512_loadu_ps(scaled + i), upper);
    node = _mm512_slli_epi32(_mm512_sub_epi32(node, _mm512_set1_epi32(16)), 4);
    _mm512_storeu_si512(rank + i, node);
  }
  step = 8;
#endif
  for (; step > 0; step >>= 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      rank[i] += scaled[i] > thresholds[rank[i] + step - 1] ? step : 0;
  }
  for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(rank[i]);
}

static void quantize_absmax(const float* absmax, const float* thresholds, float offset,
                            uint8_t* codes, float* nested_absmax, int64_t count, int threads) {
  int64_t blocks = (count + kNestedBlock - 1) / kNestedBlock;
  parallel(blocks, kSplit / kNestedBlock, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      int64_t start = block * kNestedBlock, part = std::min(kNestedBlock, count - start);
      float centred[kNestedBlock] = {0};
#pragma omp simd
      for (int64_t i = 0; i < part; ++i) centred[i] = absmax[start + i] - offset;
      float most = largest(centred, part), floor = most < kTiny ? kTiny : most;
      bool whole = part == kNestedBlock;
      float factor = 1.0f / floor;
      for (int64_t i = 0; i < part; ++i)
        centred[i] = whole ? centred[i] * factor : centred[i] / floor;
      nested_absmax[block] = whole ? most : floor;
      encode_scales(centred, part, thresholds, codes + start);
    }
  });
}

// ---- damage

template <class T>
static void count_nonfinite_in(const T* x, int64_t count, int64_t* found, int threads) {
  int64_t first = count, bad = 0;
  parallel((count + kSplit - 1) / kSplit, 4, threads, [=, &first, &bad](int64_t begin, int64_t end,
                                                                        int) {
    int64_t mine = count, sum = 0;
    for (int64_t start = begin * kSplit; start < std::min(end * kSplit, count); start += kSplit) {
      int64_t part = std::min(kSplit, count - start);
      if (finite(largest(x + start, part))) continue;
      for (int64_t i = start; i < start + part; ++i) {
        if (finite(to_float(x[i]))) continue;
        mine = std::min(mine, i);
        ++sum;
      }
    }
    if (sum == 0) return;
#ifdef _OPENMP
#pragma omp critical(fourbit_nonfinite)
#endif
    {
      first = std::min(first, mine);
      bad += sum;
    }
  });
  found[0] = first;
  found[1] = bad;
}

// found = {index of the first NaN or Inf, how many there are}.
static void count_nonfinite(const void* x, int64_t count, int64_t* found, int dtype, int threads) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    count_nonfinite_in(static_cast<const T*>(x), count, found, threads);
  });
}

}  // namespace FB_NAMESPACE
