// 4-bit codes and their scales back to weights. Bytes are those of the plain PyTorch kernels.
#pragma once

#include "quantize.h"

namespace FB_NAMESPACE {

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

// A 4-bit tensor. Scales are float32, or, where there is a second level, 8-bit codes. Python fills
// it in (fourbit.ops.cpu.quantize): each member has 64 bits.
struct Packed {
  const uint8_t* codes;
  const void* absmax;
  const float* nested_absmax;  // this and the next two: null without double quantization
  const float* nested_map;
  const float* nested_offset;
  const float* table;
  int64_t blocksize;  // a power of two
  int64_t count;

  // Of the block that weight `at` lies in.
  template <class T>
  Values<T> values(int64_t at) const {
    return {table, scale(at >> __builtin_ctzll(blocksize))};
  }
  float scale(int64_t block) const {
    if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
    float centred = nested_map[static_cast<const uint8_t*>(absmax)[block]] *
                    nested_absmax[block / kNestedBlock];
    return centred + *nested_offset;
  }
};
static_assert(sizeof(Packed) == 8 * 8, "as Python lays it out");

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

// Weights [from, to) of the tensor.
template <class T>
static inline void unpack(const Packed& packed, int64_t from, int64_t to, T* out) {
  while (from < to) {
    const int64_t stop = std::min(to, (from | (packed.blocksize - 1)) + 1);
    decode_run(packed.codes, packed.values<T>(from), from, stop, out);
    out += stop - from;
    from = stop;
  }
}

// Weights [first, first + count).
static void dequantize_4bit(const Packed* packed, void* out, int64_t first, int64_t count,
                            int dtype, int threads) {
  const int64_t size = packed->blocksize, start = first / size, end = first + count;
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out);
    parallel((end + size - 1) / size - start, std::max<int64_t>(1, kSplit / size), threads,
             [=](int64_t begin, int64_t stop, int) {
               const int64_t from = std::max(first, (start + begin) * size);
               unpack(*packed, from, std::min(end, (start + stop) * size), to + (from - first));
             });
  });
}

}  // namespace FB_NAMESPACE
