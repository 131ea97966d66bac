// Weights of decoding: rows of any format as numbers, and dot products with packed rows.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

static inline int log2_of(int64_t power) {
  int result = 0;
  while ((int64_t{1} << result) < power) ++result;
  return result;
}

static inline float scale_of(const Matrix& m, int64_t block) {
  if (m.nested == nullptr) return static_cast<const float*>(m.absmax)[block];
  float code = m.code_map[static_cast<const uint8_t*>(m.absmax)[block]];
  return code * m.nested[block >> 8] + static_cast<float>(m.offset);
}

// A row of four-bit weights in natural order.
template <class T>
static inline void unpack_row(const Matrix& m, int64_t row, T* out) {
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight);
  int64_t at = row * m.columns, end = at + m.columns;
  while (at < end) {
    int64_t block = at / m.blocksize, stop = std::min(end, (block + 1) * m.blocksize);
    float scale = scale_of(m, block);
    for (; at < stop; ++at) {
      int code = at % 2 ? codes[at / 2] & 15 : codes[at / 2] >> 4;
      *out++ = from_float<T>(m.values[code] * scale);
    }
  }
}

// A row in chunks of 64, each split as the activations are.
static inline void unpack_split(const Matrix& m, int64_t row, bf16* out) {
#if defined(__AVX512BF16__)
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight) + row * (m.columns / 2);
  int shift = log2_of(m.blocksize / 64);
  __m512 values = _mm512_loadu_ps(m.values);
  int64_t chunks = m.columns / 64, first = row * chunks;
  for (int64_t c = 0; c < chunks; ++c) {
    float scale = scale_of(m, (first + c) >> shift);
    __m256i scaled = reinterpret_cast<__m256i>(
        _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scale))));
    __m512i table = _mm512_broadcast_i64x4(scaled);
    __m512i bytes = _mm512_cvtepu8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + c * 32)));
    _mm512_storeu_si512(out + c * 64,
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
    _mm512_storeu_si512(out + c * 64 + 32, _mm512_permutexvar_epi16(bytes, table));
  }
#else
  (void)m, (void)row, (void)out;
#endif
}

#if defined(__AVX512F__)
static inline __m512i low_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
#elif defined(__AVX2__)
// The 16 values of a code by the bytes of their floats, and 32 of them at once: in each register
// four even elements, then four odd ones.
struct BytePlanes {
  __m256i plane[4];
  explicit BytePlanes(const float* values) {
    alignas(16) uint8_t bytes[4][16];
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      std::memcpy(&bits, values + i, 4);
      for (int b = 0; b < 4; ++b) bytes[b][i] = static_cast<uint8_t>(bits >> (8 * b));
    }
    for (int b = 0; b < 4; ++b)
      plane[b] = _mm256_broadcastsi128_si256(
          _mm_load_si128(reinterpret_cast<const __m128i*>(bytes[b])));
  }
  void look_up(const uint8_t* codes, __m256* out) const {
    __m256i both = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    __m256i index = _mm256_and_si256(
        _mm256_srlv_epi32(both, _mm256_setr_epi32(4, 4, 4, 4, 0, 0, 0, 0)), _mm256_set1_epi8(15));
    __m256i b0 = _mm256_shuffle_epi8(plane[0], index), b1 = _mm256_shuffle_epi8(plane[1], index);
    __m256i b2 = _mm256_shuffle_epi8(plane[2], index), b3 = _mm256_shuffle_epi8(plane[3], index);
    __m256i low = _mm256_unpacklo_epi8(b0, b1), high = _mm256_unpacklo_epi8(b2, b3);
    out[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
    low = _mm256_unpackhi_epi8(b0, b1), high = _mm256_unpackhi_epi8(b2, b3);
    out[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, high));
    out[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, high));
  }
};
#endif

static inline void unpack_split(const Matrix& m, int64_t row, float* out) {
#if defined(__AVX512F__) || defined(__AVX2__)
  const uint8_t* codes = static_cast<const uint8_t*>(m.weight) + row * (m.columns / 2);
  int shift = log2_of(m.blocksize / 64);
  int64_t chunks = m.columns / 64, first = row * chunks;
#if defined(__AVX512F__)
  __m512 values = _mm512_loadu_ps(m.values);
#else
  BytePlanes planes(m.values);
#endif
  for (int64_t c = 0; c < chunks; ++c) {
    float scale = scale_of(m, (first + c) >> shift);
    for (int h = 0; h < 2; ++h) {
      const uint8_t* p = codes + c * 32 + h * 16;
      float* to = out + c * 64 + h * 32;
#if defined(__AVX512F__)
      __m512 scaled = _mm512_mul_ps(values, _mm512_set1_ps(scale));
      __m512i bytes = low_bytes(p);
      _mm512_storeu_ps(to, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), scaled));
      _mm512_storeu_ps(to + 16, _mm512_permutexvar_ps(bytes, scaled));
#else
      __m256 found[4];
      planes.look_up(p, found);
      for (int i = 0; i < 4; ++i)
        _mm256_storeu_ps(to + 8 * i, _mm256_mul_ps(found[i], _mm256_set1_ps(scale)));
#endif
    }
  }
#else
  (void)m, (void)row, (void)out;
#endif
}

template <class T, class W>
static inline void copy_rows(const W* weight, const Matrix& m, int64_t first, int64_t count,
                             T* out, int64_t stride) {
  if (m.format == kTransposed) {
    for (int64_t k = 0; k < m.columns; ++k)
      for (int64_t i = 0; i < count; ++i)
        out[i * stride + k] = from_float<T>(to_float(weight[k * m.rows + first + i]));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const W* row = weight + (first + i) * m.columns;
    T* to = out + i * stride;
#pragma omp simd
    for (int64_t k = 0; k < m.columns; ++k) to[k] = from_float<T>(to_float(row[k]));
  }
}

// Rows [first, first + count) of any floating or four-bit format, zeros behind the columns.
template <class T>
static inline void expand_rows(const Matrix& m, int64_t first, int64_t count, T* out,
                               int64_t stride) {
  if (in_chunks(m)) {
    for (int64_t i = 0; i < count; ++i) unpack_split(m, first + i, out + i * stride);
    return;
  }
  if (m.format == kFourBit)
    for (int64_t i = 0; i < count; ++i) unpack_row(m, first + i, out + i * stride);
  else if (m.dtype == kBfloat16)
    copy_rows(static_cast<const bf16*>(m.weight), m, first, count, out, stride);
  else
    copy_rows(static_cast<const float*>(m.weight), m, first, count, out, stride);
  int64_t end = round_up(m.columns, 32);
  for (int64_t i = 0; i < count; ++i)
    std::memset(out + i * stride + m.columns, 0, (end - m.columns) * sizeof(T));
}

// Dot products of neighbouring packed rows with one activation row. The scales of their chunks are
// laid out first: a second-level scale holds for 256 blocks, so the scale of a block is a lookup
// by its code in a table that is made once for these.
class PackedRows {
 public:
  // `scratch` takes a float for each chunk of four rows.
  PackedRows(const Matrix& m, float* scratch)
      : m_(m), chunks_(m.columns / 64), shift_(log2_of(m.blocksize / 64)), scratch_(scratch) {}

  // acc[r] += row + r
  template <int R, class X>
  void dot(int64_t row, const X* x, Lanes* acc) {
    const uint8_t* codes = static_cast<const uint8_t*>(m_.weight) + row * chunks_ * 32;
    run<R>(codes, x, scales(row * chunks_, R * chunks_), acc);
  }

 private:
  const float* scales(int64_t first, int64_t count) {
    if (m_.nested == nullptr) {
      const float* absmax = static_cast<const float*>(m_.absmax);
      if (shift_ == 0) return absmax + first;
      for (int64_t i = 0; i < count; ++i) scratch_[i] = absmax[(first + i) >> shift_];
      return scratch_;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(m_.absmax);
    int64_t end = first + count;
    float* out = scratch_;
    for (int64_t at = first; at < end;) {
      int64_t group = at >> (shift_ + 8), stop = std::min(end, (group + 1) << (shift_ + 8));
      const float* table = table_of(group);
      if (shift_ == 0) {
        // eight codes a load; a gather instruction is slower than eight lookups
        for (; at + 8 <= stop; at += 8, out += 8) {
          uint64_t eight;
          std::memcpy(&eight, codes + at, 8);
          for (int i = 0; i < 8; ++i) out[i] = table[(eight >> (8 * i)) & 255];
        }
        for (; at < stop; ++at) *out++ = table[codes[at]];
      } else {
        for (; at < stop; ++at) *out++ = table[codes[at >> shift_]];
      }
    }
    return scratch_;
  }

  const float* table_of(int64_t group) {
    if (group_ != group) {
      float nested = m_.nested[group], offset = static_cast<float>(m_.offset);
#pragma omp simd
      for (int i = 0; i < 256; ++i) table_[i] = m_.code_map[i] * nested + offset;
      group_ = group;
    }
    return table_;
  }

  // Row after row, in the order of memory: four streams at once are too many for the hardware to
  // fetch ahead, and what that costs is more than loading the activations again.
#if defined(__AVX512BF16__)
  template <int R>
  void run(const uint8_t* codes, const bf16* x, const float* scale, Lanes* acc) const {
    __m512i table = _mm512_broadcast_i64x4(
        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(m_.values))));
    rows<R>(codes, scale, acc, [&](const uint8_t* p, int64_t c) {
      __m512i bytes =
          _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
      __m512i odd = _mm512_permutexvar_epi16(bytes, table);
      __m512 sum = _mm512_dpbf16_ps(
          _mm512_setzero_ps(), reinterpret_cast<__m512bh>(even),
          reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + c * 64)));
      return _mm512_dpbf16_ps(
          sum, reinterpret_cast<__m512bh>(odd),
          reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + c * 64 + 32)));
    });
  }
#elif defined(__AVX2__)
  template <int R>
  void run(const uint8_t*, const bf16*, const float*, Lanes*) const {}
#endif

#if defined(__AVX512F__)
  template <int R>
  void run(const uint8_t* codes, const float* x, const float* scale, Lanes* acc) const {
    __m512 table = _mm512_loadu_ps(m_.values);
    rows<R>(codes, scale, acc, [&](const uint8_t* p, int64_t c) {
      const float* at = x + c * 64;
      __m512i a = low_bytes(p), b = low_bytes(p + 16);
      __m512 w0 = _mm512_permutexvar_ps(_mm512_srli_epi32(a, 4), table);
      __m512 w1 = _mm512_permutexvar_ps(a, table);
      __m512 w2 = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), table);
      __m512 w3 = _mm512_permutexvar_ps(b, table);
      __m512 sum = _mm512_mul_ps(w0, _mm512_loadu_ps(at));
      __m512 more = _mm512_mul_ps(w1, _mm512_loadu_ps(at + 16));
      sum = _mm512_fmadd_ps(w2, _mm512_loadu_ps(at + 32), sum);
      more = _mm512_fmadd_ps(w3, _mm512_loadu_ps(at + 48), more);
      return _mm512_add_ps(sum, more);
    });
  }

  // acc[r] += scale of chunk c * dot(its bytes, c), the chunks of a row in two sums.
  template <int R, class Dot>
  void rows(const uint8_t* codes, const float* scale, Lanes* acc, const Dot& dot) const {
    constexpr int64_t kAhead = 4096;
    for (int r = 0; r < R; ++r) {
      const uint8_t* p = codes + r * chunks_ * 32;
      const float* own = scale + r * chunks_;
      __m512 first = acc[r].v, second = _mm512_setzero_ps();
      int64_t c = 0;
      for (; c + 2 <= chunks_; c += 2, p += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(p + kAhead), _MM_HINT_T0);
        first = _mm512_fmadd_ps(dot(p, c), _mm512_set1_ps(own[c]), first);
        second = _mm512_fmadd_ps(dot(p + 32, c + 1), _mm512_set1_ps(own[c + 1]), second);
      }
      if (c < chunks_) first = _mm512_fmadd_ps(dot(p, c), _mm512_set1_ps(own[c]), first);
      acc[r].v = _mm512_add_ps(first, second);
    }
  }
#elif defined(__AVX2__)
  template <int R>
  void run(const uint8_t* codes, const float* x, const float* scale, Lanes* acc) const {
    BytePlanes planes(m_.values);
    for (int r = 0; r < R; ++r) {
      __m256 total = acc[r].v;
      for (int64_t c = 0; c < chunks_; ++c) {
        const uint8_t* p = codes + (r * chunks_ + c) * 32;
        _mm_prefetch(reinterpret_cast<const char*>(p + 4096), _MM_HINT_T0);
        __m256 w[4], sum = _mm256_setzero_ps(), more = sum;
        for (int h = 0; h < 2; ++h) {
          const float* at = x + c * 64 + h * 32;
          planes.look_up(p + h * 16, w);
          sum = _mm256_fmadd_ps(w[0], _mm256_loadu_ps(at), sum);
          more = _mm256_fmadd_ps(w[1], _mm256_loadu_ps(at + 8), more);
          sum = _mm256_fmadd_ps(w[2], _mm256_loadu_ps(at + 16), sum);
          more = _mm256_fmadd_ps(w[3], _mm256_loadu_ps(at + 24), more);
        }
        __m256 own = _mm256_set1_ps(scale[r * chunks_ + c]);
        total = _mm256_fmadd_ps(_mm256_add_ps(sum, more), own, total);
      }
      acc[r].v = total;
    }
  }
#else
  template <int R, class X>
  void run(const uint8_t*, const X*, const float*, Lanes*) const {}
#endif

  const Matrix& m_;
  int64_t chunks_;
  int shift_;
  float* scratch_;
  int64_t group_ = -1;
  float table_[256];
};

}  // namespace decode
}  // namespace FB_NAMESPACE
