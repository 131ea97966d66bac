// The storage formats: 4-bit codes with one scale a block, those scales in 8 bits, row-wise int8.
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
constexpr float kPerCode = 7.874015718698502e-3f;  // 1 / 127
constexpr float kHalfMax = 65504.0f;

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

// ---- 4-bit values

// Decoding looks values up in the data type's table times the block's scale, already rounded: one
// product and one rounding for each of 16 codes instead of for each weight, and the same bits.
template <class T>
struct Values {
  alignas(64) T value[16];

  Values(const float* table, float scale) {
    float product[16];
    for (int i = 0; i < 16; ++i) product[i] = table[i] * scale;
    narrow(product, value, 16);
  }

  T at(const uint8_t* packed, int64_t index) const {
    uint8_t byte = packed[index >> 1];
    return value[index & 1 ? byte & 15 : byte >> 4];
  }
};

template <class T>
struct Decoder;

#if defined(__AVX512F__)

template <>
struct Decoder<float> {
  __m512 table;
  explicit Decoder(const Values<float>& values) : table(_mm512_load_ps(values.value)) {}

  void unit(const uint8_t* packed, float* out) const {
    for (int i = 0; i < 2; ++i) {
      __m512i byte = _mm512_cvtepu8_epi64(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * i)));
      __m512i index = _mm512_or_si512(_mm512_srli_epi64(byte, 4), _mm512_slli_epi64(byte, 32));
      _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(index, table));
    }
  }
};

template <class T>
struct Decoder {
  __m512i table;
  explicit Decoder(const Values<T>& values)
      : table(_mm512_broadcast_i64x4(
            _mm256_load_si256(reinterpret_cast<const __m256i*>(values.value)))) {}

  void unit(const uint8_t* packed, T* out) const {
    __m512i byte =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    __m512i index = _mm512_or_si512(_mm512_srli_epi32(byte, 4), _mm512_slli_epi32(byte, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  }
};

#elif defined(__AVX2__)

template <>
struct Decoder<float> {
  __m256 low, high;
  explicit Decoder(const Values<float>& values)
      : low(_mm256_load_ps(values.value)), high(_mm256_load_ps(values.value + 8)) {}

  void unit(const uint8_t* packed, float* out) const {
    for (int i = 0; i < 4; ++i) {
      int32_t four;
      std::memcpy(&four, packed + 4 * i, 4);
      __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
      __m256i index = _mm256_or_si256(_mm256_srli_epi64(byte, 4), _mm256_slli_epi64(byte, 32));
      __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
      _mm256_storeu_ps(out + 8 * i,
                       _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                                        _mm256_permutevar8x32_ps(high, index), upper));
    }
  }
};

// The low and the high bytes of the 16 values, each a table of its own.
template <class T>
struct Decoder {
  __m256i low, high;
  explicit Decoder(const Values<T>& values) {
    __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(values.value));
    __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                                        _mm256_srli_epi16(words, 8));
    low = _mm256_permute4x64_epi64(bytes, 0x88);
    high = _mm256_permute4x64_epi64(bytes, 0xdd);
  }

  void unit(const uint8_t* packed, T* out) const {
    __m128i byte = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    __m128i nibble = _mm_set1_epi8(15);
    __m128i even = _mm_and_si128(_mm_srli_epi16(byte, 4), nibble), odd = _mm_and_si128(byte, nibble);
    __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    __m256i lows = _mm256_shuffle_epi8(low, index), highs = _mm256_shuffle_epi8(high, index);
    __m256i first = _mm256_unpacklo_epi8(lows, highs), second = _mm256_unpackhi_epi8(lows, highs);
    __m256i* to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
  }
};

#elif defined(__ARM_NEON) && defined(__aarch64__)

// Each byte of the values is a table of its own; storing puts the bytes together again.
template <>
struct Decoder<float> {
  uint8x16x4_t bytes;
  explicit Decoder(const Values<float>& values)
      : bytes(vld4q_u8(reinterpret_cast<const uint8_t*>(values.value))) {}

  void unit(const uint8_t* packed, float* out) const {
    uint8x16_t byte = vld1q_u8(packed), even = vshrq_n_u8(byte, 4);
    uint8x16_t odd = vandq_u8(byte, vdupq_n_u8(15));
    uint8x16_t index[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int i = 0; i < 2; ++i) {
      uint8x16x4_t found;
      for (int b = 0; b < 4; ++b) found.val[b] = vqtbl1q_u8(bytes.val[b], index[i]);
      vst4q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), found);
    }
  }
};

template <class T>
struct Decoder {
  uint8x16x2_t bytes;
  explicit Decoder(const Values<T>& values)
      : bytes(vld2q_u8(reinterpret_cast<const uint8_t*>(values.value))) {}

  void unit(const uint8_t* packed, T* out) const {
    uint8x16_t byte = vld1q_u8(packed), even = vshrq_n_u8(byte, 4);
    uint8x16_t odd = vandq_u8(byte, vdupq_n_u8(15));
    uint8x16_t index[2] = {vzip1q_u8(even, odd), vzip2q_u8(even, odd)};
    for (int i = 0; i < 2; ++i) {
      uint8x16x2_t found;
      for (int b = 0; b < 2; ++b) found.val[b] = vqtbl1q_u8(bytes.val[b], index[i]);
      vst2q_u8(reinterpret_cast<uint8_t*>(out + 16 * i), found);
    }
  }
};

#else

template <class T>
struct Decoder {
  const Values<T>& values;
  explicit Decoder(const Values<T>& table) : values(table) {}

  void unit(const uint8_t* packed, T* out) const {
    for (int64_t i = 0; i < kUnit / 2; ++i) {
      out[2 * i] = values.value[packed[i] >> 4];
      out[2 * i + 1] = values.value[packed[i] & 15];
    }
  }
};

#endif

// How a scale is stored: as float32, or as an 8-bit code with a second-level scale and an offset.
struct Scales {
  const void* absmax;
  const float* nested;
  const float* map;
  float offset;

  float operator[](int64_t block) const {
    if (nested == nullptr) return static_cast<const float*>(absmax)[block];
    float centred = map[static_cast<const uint8_t*>(absmax)[block]] * nested[block / kNestedBlock];
    return centred + offset;
  }
};

// Weights [from, to) of one block, `from` counted from the start of the tensor.
template <class T>
static inline void decode_run(const uint8_t* packed, const Values<T>& values, int64_t from,
                              int64_t to, T* out) {
  int64_t at = from;
  if ((at & 1) && at < to) *out++ = values.at(packed, at++);
  Decoder<T> decoder(values);
  for (; at + kUnit <= to; at += kUnit, out += kUnit) decoder.unit(packed + at / 2, out);
  for (; at < to; ++at) *out++ = values.at(packed, at);
}

template <class T>
static void dequantize_blocks(const uint8_t* packed, const Scales& scales, const float* table,
                              T* out, int64_t first, int64_t count, int64_t blocksize,
                              int threads) {
  int64_t start = first / blocksize, stop = (first + count + blocksize - 1) / blocksize;
  parallel(stop - start, std::max<int64_t>(1, kSplit / blocksize), threads,
           [=, &scales](int64_t begin, int64_t end, int) {
             for (int64_t block = start + begin; block < start + end; ++block) {
               Values<T> values(table, scales[block]);
               int64_t from = std::max(first, block * blocksize);
               int64_t to = std::min(first + count, (block + 1) * blocksize);
               decode_run(packed, values, from, to, out + (from - first));
             }
           });
}

// Weights [first, first + count) of a packed tensor. Without double quantization `absmax` is
// float32 and the three `nested` arguments are absent.
static void dequantize_4bit(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                            const float* nested_map, const float* nested_offset,
                            const float* table, void* out, int64_t first, int64_t count,
                            int64_t blocksize, int dtype, int threads) {
  if (count <= 0) return;
  Scales scales{absmax, nested_absmax, nested_map, nested_absmax ? *nested_offset : 0.0f};
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    dequantize_blocks(packed, scales, table, static_cast<T*>(out), first, count, blocksize,
                      threads);
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

// ---- row-wise int8

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
