// The likeliest token without reading the whole head: eight bits a weight tell which few tokens can
// be it, with certainty, and only these are scored with the head itself.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

// The head in eight bits, rows padded to 64 columns; null codes where there is none.
struct Sketch {
  const int8_t* codes;
  const float* scales;  // of each row
  const float* errors;  // |row - its eight-bit form|, Euclidean
  const float* sizes;   // |its eight-bit form|
};

// A state as whole numbers: |state - codes * scale| = error.
struct WholeState {
  int16_t* codes;
  float scale, size, error;
};

static inline void to_whole(const float* x, int64_t columns, WholeState& out) {
  float largest = 0, square = 0, error = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < columns; ++j) largest = std::max(largest, std::fabs(x[j]));
  // sums of products with eight-bit codes stay within 32 bits in each of 16 lanes
  float levels = std::min(32767.0f, 2.6e8f / static_cast<float>(round_up(columns, 64)));
  float factor = largest > 0 ? levels / largest : 0.0f, scale = largest / levels;
  for (int64_t j = 0; j < columns; ++j) {
    float code = std::nearbyint(x[j] * factor), rest = x[j] - code * scale;
    out.codes[j] = static_cast<int16_t>(code);
    square += x[j] * x[j];
    error += rest * rest;
  }
  for (int64_t j = columns; j < round_up(columns, 64); ++j) out.codes[j] = 0;
  out.scale = scale;
  out.size = std::sqrt(square);
  out.error = std::sqrt(error);
}

static inline float whole_dot(const int16_t* x, const int8_t* codes, int64_t count) {
#if defined(__AVX512F__)
  __m512i sums = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += 32) {
    __m512i wide = _mm512_cvtepi8_epi16(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + k)));
    __m512i one = _mm512_loadu_si512(x + k);
#if defined(__AVX512VNNI__)
    sums = _mm512_dpwssd_epi32(sums, wide, one);
#else
    sums = _mm512_add_epi32(sums, _mm512_madd_epi16(wide, one));
#endif
  }
  return _mm512_reduce_add_ps(_mm512_cvtepi32_ps(sums));
#else
  // sixteen sums, so that none leaves its 32 bits
  int32_t sums[16] = {};
  for (int64_t k = 0; k < count; k += 16)
#pragma omp simd
    for (int i = 0; i < 16; ++i) sums[i] += static_cast<int32_t>(x[k + i]) * codes[k + i];
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += static_cast<float>(sums[i]);
  return sum;
#endif
}

// uppers[n] is no less than the score of token n, for n in [begin, end); returns a score that some
// token of them reaches.
static inline float bound_scores(const Sketch& sketch, const WholeState& state, int64_t columns,
                                 int64_t begin, int64_t end, float* uppers) {
  int64_t stride = round_up(columns, 64);
  float floor = -INFINITY;
  for (int64_t n = begin; n < end; ++n) {
    const int8_t* codes = sketch.codes + n * stride;
    float score = whole_dot(state.codes, codes, stride) * state.scale * sketch.scales[n];
    // the last term is for the rounding of the sums themselves
    float doubt = sketch.errors[n] * state.size + sketch.sizes[n] * state.error +
                  1e-5f * sketch.sizes[n] * state.size;
    uppers[n] = score + doubt;
    floor = score - doubt > floor ? score - doubt : floor;
  }
  return floor;
}

}  // namespace decode
}  // namespace FB_NAMESPACE
