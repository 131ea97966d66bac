// Activations in the forms that the products of decoding take them in.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

#if defined(__AVX512BF16__)
static constexpr bool kHasHalf = true;
#else
static constexpr bool kHasHalf = false;
#endif
#if defined(__AVX2__)
static constexpr bool kHasSplit = true;
#else
static constexpr bool kHasSplit = false;
#endif

static inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

enum Form : int {
  kFormPlain = 1,      // floats
  kFormHalf = 2,       // bf16
  kFormSplit = 4,      // floats, elements of high nibbles before those of low ones
  kFormSplitHalf = 8,  // bf16, likewise
  kFormCodes = 16,     // eight bits and a scale, large elements apart
};

// `stride` elements a row in each form, zeros behind the columns.
struct Input {
  float* plain;
  bf16* half;
  float* split;
  bf16* split_half;
  int8_t* codes;
  int32_t* outliers;        // columns that are not in the codes
  int32_t* outlier_counts;  // a row
  float* scales;            // a row: of the codes
  float* low;               // the adapters' inner activations, [rows, low_stride]
  bf16* low_half;
  int64_t stride, low_stride;
};

// Weights of four bits whose rows are whole chunks of 64 with one scale each: the fast path.
static inline bool in_chunks(const Matrix& m) {
  return kHasSplit && m.format == kFourBit && m.columns % 64 == 0 && m.blocksize % 64 == 0;
}

static inline int forms_of(const Matrix& m) {
  int forms = m.rank > 0 ? (m.half ? kFormHalf : kFormPlain) : 0;
  if (m.format == kEightBit) return forms | kFormPlain | kFormCodes;
  if (in_chunks(m)) return forms | (m.half ? kFormSplitHalf : kFormSplit);
  return forms | (m.half ? kFormHalf : kFormPlain);
}

static inline int forms_of(const Group& group) {
  int forms = 0;
  for (int64_t i = 0; i < group.count; ++i) forms |= forms_of(group.parts[i]);
  return forms;
}

// Round to float16's grid, within its range.
static inline float on_half_grid(float x) {
  float clamped = std::min(std::max(x, -65504.0f), 65504.0f);
  uint32_t bits;
  std::memcpy(&bits, &clamped, 4);
  bits = (bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fffu;
  float normal;
  std::memcpy(&normal, &bits, 4);
  // below 2^-14 the grid is uniform, as floats are between a half and one
  float tiny = (clamped + 0.75f) - 0.75f;
  return std::fabs(clamped) < 6.103515625e-5f ? tiny : normal;
}

static inline void to_codes(const Input& in, int64_t row, const float* x, int64_t columns,
                            float threshold) {
  int8_t* codes = in.codes + row * in.stride;
  int32_t* outliers = in.outliers + row * in.stride;
  float largest = 0;
  int32_t count = 0;
  bool finite = true;
  for (int64_t j = 0; j < columns; ++j) {
    finite = finite && std::fabs(x[j]) <= 3.402823466e38f;
    float size = std::fabs(on_half_grid(x[j]));
    if (threshold > 0 && size >= threshold)
      outliers[count++] = static_cast<int32_t>(j);
    else
      largest = size > largest ? size : largest;
  }
  float factor = largest > 0 ? 127.0f / largest : 0.0f;
  for (int64_t j = 0; j < columns; ++j)
    codes[j] = static_cast<int8_t>(static_cast<int>(std::nearbyint(
        std::min(std::max(on_half_grid(x[j]) * factor, -127.0f), 127.0f))));
  for (int32_t i = 0; i < count; ++i) codes[outliers[i]] = 0;
  std::memset(codes + columns, 0, round_up(columns, 64) - columns);
  in.outlier_counts[row] = count;
  in.scales[row] = finite ? largest : NAN;
}

static inline void to_half(const float* x, bf16* out, int64_t columns) {
#pragma omp simd
  for (int64_t j = 0; j < columns; ++j) out[j] = from_float<bf16>(x[j]);
}

// Chunks of 64 become 32 even elements and 32 odd ones.
static inline void to_split_half(const float* x, bf16* out, int64_t columns) {
#if defined(__AVX512BF16__)
  alignas(64) int16_t even[32], odd[32];
  for (int i = 0; i < 32; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  __m512i evens = _mm512_load_si512(even), odds = _mm512_load_si512(odd);
  for (int64_t j = 0; j < columns; j += 64) {
    __m512i a = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(x + j)));
    __m512i b = reinterpret_cast<__m512i>(
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + j + 48), _mm512_loadu_ps(x + j + 32)));
    _mm512_storeu_si512(out + j, _mm512_permutex2var_epi16(a, evens, b));
    _mm512_storeu_si512(out + j + 32, _mm512_permutex2var_epi16(a, odds, b));
  }
#else
  (void)x, (void)out, (void)columns;
#endif
}

// Chunks of 32 (AVX-512) or 8 (AVX2) become their even elements and their odd ones.
static inline void to_split(const float* x, float* out, int64_t columns) {
#if defined(__AVX512F__)
  constexpr int64_t kChunk = 32;
#else
  constexpr int64_t kChunk = 8;
#endif
  for (int64_t j = 0; j < columns; j += kChunk) {
#pragma omp simd
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      out[j + i] = x[j + 2 * i];
      out[j + kChunk / 2 + i] = x[j + 2 * i + 1];
    }
  }
}

// One row of activations in all forms asked for.
static inline void prepare(const Input& in, int64_t row, const float* x, int64_t columns,
                           int forms, float threshold) {
  int64_t end = round_up(columns, 32);
  if (forms & kFormPlain) {
    float* out = in.plain + row * in.stride;
    std::memcpy(out, x, columns * 4);
    std::memset(out + columns, 0, (end - columns) * 4);
  }
  if (forms & kFormHalf) {
    bf16* out = in.half + row * in.stride;
    to_half(x, out, columns);
    std::memset(out + columns, 0, (end - columns) * 2);
  }
  if (forms & kFormSplit) to_split(x, in.split + row * in.stride, columns);
  if (forms & kFormSplitHalf) to_split_half(x, in.split_half + row * in.stride, columns);
  if (forms & kFormCodes) to_codes(in, row, x, columns, threshold);
}

}  // namespace decode
}  // namespace FB_NAMESPACE
