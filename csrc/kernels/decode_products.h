// Products of decoding: few activation rows with whole weight matrices, adapters included.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

// acc[r][c] += w[r] . x[c]; float rows are `count` long, a multiple of 16.
template <int R, int C>
static inline void add_dots(const float* const* w, const float* const* x, int64_t count,
                            Lanes (*acc)[C]) {
  for (int64_t k = 0; k < count; k += Lanes::kWidth) {
    Lanes wide[R];
    for (int r = 0; r < R; ++r) wide[r] = lanes_load(w[r] + k);
    for (int c = 0; c < C; ++c) {
      Lanes one = lanes_load(x[c] + k);
      for (int r = 0; r < R; ++r) acc[r][c] = lanes_fma(wide[r], one, acc[r][c]);
    }
  }
}

template <int R, int C>
static inline void add_dots(const bf16* const* w, const bf16* const* x, int64_t count,
                            Lanes (*acc)[C]) {
#if defined(__AVX512BF16__)
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    __m512bh wide[R];
    for (int r = 0; r < R; ++r)
      wide[r] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w[r] + k));
    for (int c = 0; c < C; ++c) {
      __m512bh one = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x[c] + k));
      for (int r = 0; r < R; ++r) acc[r][c].v = _mm512_dpbf16_ps(acc[r][c].v, wide[r], one);
    }
  }
  if (k == count) return;
  for (int r = 0; r < R; ++r) {
    __m512bh wide = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(0xffff, w[r] + k));
    for (int c = 0; c < C; ++c)
      acc[r][c].v = _mm512_dpbf16_ps(
          acc[r][c].v, wide,
          reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(0xffff, x[c] + k)));
  }
#else
  (void)w, (void)x, (void)count, (void)acc;
#endif
}

// How many weight rows share a load of activations: by the number of registers.
#if defined(__AVX512F__) || defined(__ARM_NEON)
static constexpr int kTileRows = 4;
#else
static constexpr int kTileRows = 2;
#endif

// What a product reads besides the weights: activations [count, stride] and, with an adapter, its
// inner activations [count, low_stride].
template <class T>
struct Rows {
  const T* x;
  const T* low;
  int64_t count, stride, low_stride;
};

template <class T, int R, int C>
static inline void tile(const T* const* w, const T* const* lora, const T* const* x,
                        const T* const* low, int64_t columns, int64_t rank, float* out,
                        int64_t out_stride) {
  Lanes acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = lanes_all(0.0f);
  add_dots<R, C>(w, x, columns, acc);
  if (rank > 0) add_dots<R, C>(lora, low, rank, acc);
  for (int c = 0; c < C; ++c) {
    if constexpr (R == 4) {
      lanes_sum4(acc[0][c], acc[1][c], acc[2][c], acc[3][c], out + c * out_stride);
    } else {
      for (int r = 0; r < R; ++r) out[c * out_stride + r] = lanes_sum(acc[r][c]);
    }
  }
}

// out[c, n] for a strip of `height` weight rows held as T, `stride` apart.
template <class T>
static inline void strip_product(const T* strip, int64_t stride, int64_t height, int64_t columns,
                                 const T* lora, int64_t rank, const Rows<T>& rows, float* out,
                                 int64_t out_stride) {
  auto across = [&](auto width, int64_t c) {
    constexpr int C = decltype(width)::value;
    const T *x[C], *low[C];
    for (int i = 0; i < C; ++i) x[i] = rows.x + (c + i) * rows.stride;
    for (int i = 0; i < C; ++i) low[i] = rank > 0 ? rows.low + (c + i) * rows.low_stride : nullptr;
    auto down = [&](auto tall, int64_t n) {
      constexpr int R = decltype(tall)::value;
      const T *w[R], *b[R];
      for (int i = 0; i < R; ++i) w[i] = strip + (n + i) * stride;
      for (int i = 0; i < R; ++i) b[i] = rank > 0 ? lora + (n + i) * rank : nullptr;
      tile<T, R, C>(w, b, x, low, columns, rank, out + c * out_stride + n, out_stride);
    };
    int64_t n = 0;
    for (; n + kTileRows <= height; n += kTileRows)
      down(std::integral_constant<int, kTileRows>{}, n);
    for (; n < height; ++n) down(std::integral_constant<int, 1>{}, n);
  };
  int64_t c = 0;
  for (; c + 4 <= rows.count; c += 4) across(std::integral_constant<int, 4>{}, c);
  if (rows.count - c == 3) across(std::integral_constant<int, 3>{}, c);
  if (rows.count - c == 2) across(std::integral_constant<int, 2>{}, c);
  if (rows.count - c == 1) across(std::integral_constant<int, 1>{}, c);
}

// Rows [begin, end) of a matrix by strips that are expanded once for all activation rows.
template <class T>
static inline void expanded_product(const Matrix& m, const Rows<T>& rows, int64_t begin,
                                    int64_t end, float* out, int64_t out_stride, void* scratch) {
  int64_t columns = round_up(m.columns, 32), rank = round_up(m.rank, 16);
  int64_t height = columns <= 2048 ? 32 : 16;
  const T* lora = static_cast<const T*>(m.lora_b);
  bool as_is = m.format == kPlain && m.columns % 32 == 0 &&
               m.dtype == (sizeof(T) == 2 ? kBfloat16 : kFloat32);
  for (int64_t n = begin; n < end; n += height) {
    int64_t count = std::min(height, end - n);
    const T* strip = static_cast<const T*>(m.weight) + n * m.columns;
    if (!as_is) {
      expand_rows(m, n, count, static_cast<T*>(scratch), columns);
      strip = static_cast<const T*>(scratch);
    }
    strip_product(strip, columns, count, columns, lora + n * rank, rank, rows, out + n,
                  out_stride);
  }
}

template <int R, class T>
static inline void add_low(const Matrix& m, int64_t row, const T* low, Lanes* acc) {
  if (m.rank == 0) return;
  int64_t rank = round_up(m.rank, 16);
  const T *w[R], *x[1] = {low};
  for (int r = 0; r < R; ++r) w[r] = static_cast<const T*>(m.lora_b) + (row + r) * rank;
  Lanes single[R][1];
  for (int r = 0; r < R; ++r) single[r][0] = acc[r];
  add_dots<R, 1>(w, x, rank, single);
  for (int r = 0; r < R; ++r) acc[r] = single[r][0];
}

// One activation row with packed rows [begin, end).
template <class T>
static inline void packed_product(const Matrix& m, const T* x, const T* low, int64_t begin,
                                  int64_t end, float* out, void* scratch) {
  PackedRows packed(m, static_cast<float*>(scratch));
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    Lanes acc[4] = {lanes_all(0), lanes_all(0), lanes_all(0), lanes_all(0)};
    packed.dot<4>(n, x, acc);
    add_low<4>(m, n, low, acc);
    lanes_sum4(acc[0], acc[1], acc[2], acc[3], out + n);
  }
  for (; n < end; ++n) {
    Lanes acc[1] = {lanes_all(0)};
    packed.dot<1>(n, x, acc);
    add_low<1>(m, n, low, acc);
    out[n] = lanes_sum(acc[0]);
  }
}

static inline int32_t dot_codes(const int8_t* a, const int8_t* b, int64_t count) {
  int32_t sum = 0;
#if defined(__AVX512VNNI__)
  __m512i sums = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 32 <= count; k += 32)
    sums = _mm512_dpwssd_epi32(
        sums, _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + k))),
        _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + k))));
  for (; k < count; ++k) sum += static_cast<int32_t>(a[k]) * b[k];
  return sum + _mm512_reduce_add_epi32(sums);
#else
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k)
    sum += static_cast<int32_t>(static_cast<int16_t>(a[k]) * static_cast<int16_t>(b[k]));
  return sum;
#endif
}

// Eight bits on both sides, large activations apart; each activation row on its own.
static inline void eight_bit_product(const Matrix& m, const Input& in, const float* low,
                                     int64_t count, int64_t begin, int64_t end, float* out,
                                     int64_t out_stride) {
  constexpr float kPerCode = 1.0f / 127.0f;
  const float* absmax = static_cast<const float*>(m.absmax);
  for (int64_t n = begin; n < end; ++n) {
    const int8_t* codes = static_cast<const int8_t*>(m.weight) + n * m.columns;
    for (int64_t b = 0; b < count; ++b) {
      const int8_t* x = in.codes + b * in.stride;
      float sum = static_cast<float>(dot_codes(x, codes, m.columns));
      sum = sum * (in.scales[b] * absmax[n]) * (kPerCode * kPerCode);
      const int32_t* columns = in.outliers + b * in.stride;
      for (int32_t i = 0; i < in.outlier_counts[b]; ++i)
        sum += in.plain[b * in.stride + columns[i]] *
               (static_cast<float>(codes[columns[i]]) * absmax[n] * kPerCode);
      Lanes acc[1] = {lanes_all(0)};
      if (m.rank > 0) add_low<1>(m, n, low + b * in.low_stride, acc);
      out[b * out_stride + n] = sum + lanes_sum(acc[0]);
    }
  }
}

// out[b, n] = W[n] . x[b] + bias[n] + adapter, for rows n in [begin, end) of one matrix.
static inline void product(const Matrix& m, const Input& in, int64_t low_at, int64_t count,
                           int64_t begin, int64_t end, float* out, int64_t out_stride,
                           void* scratch) {
  if (begin >= end) return;
  const float* low = in.low + low_at;
  const bf16* low_half = in.low_half + low_at;
  bool chunks = in_chunks(m);
  if (m.format == kEightBit) {
    eight_bit_product(m, in, low, count, begin, end, out, out_stride);
  } else if (m.half) {
    const bf16* x = chunks ? in.split_half : in.half;
    if (kHasHalf && chunks && count == 1)
      packed_product(m, x, low_half, begin, end, out, scratch);
    else
      expanded_product<bf16>(m, {x, low_half, count, in.stride, in.low_stride}, begin, end, out,
                             out_stride, scratch);
  } else {
    const float* x = chunks ? in.split : in.plain;
    if (chunks && count == 1)
      packed_product(m, x, low, begin, end, out, scratch);
    else
      expanded_product<float>(m, {x, low, count, in.stride, in.low_stride}, begin, end, out,
                              out_stride, scratch);
  }
  if (m.bias == nullptr) return;
  for (int64_t b = 0; b < count; ++b) {
    float* to = out + b * out_stride;
#pragma omp simd
    for (int64_t n = begin; n < end; ++n) to[n] += m.bias[n];
  }
}

static inline int64_t rows_of(const Group& group) {
  int64_t rows = 0;
  for (int64_t i = 0; i < group.count; ++i) rows += group.parts[i].rows;
  return rows;
}

static inline int64_t ranks_of(const Group& group) {
  int64_t ranks = 0;
  for (int64_t i = 0; i < group.count; ++i) ranks += round_up(group.parts[i].rank, 16);
  return ranks;
}

// Output rows [begin, end) of a whole group.
static inline void group_product(const Group& group, const Input& in, int64_t count,
                                 int64_t begin, int64_t end, float* out, int64_t out_stride,
                                 void* scratch) {
  int64_t first = 0, low_at = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const Matrix& m = group.parts[i];
    product(m, in, low_at, count, std::max<int64_t>(begin - first, 0),
            std::min(end - first, m.rows), out + first, out_stride, scratch);
    first += m.rows;
    low_at += round_up(m.rank, 16);
  }
}

template <class T>
static inline void low_rank_part(const Matrix& m, const T* x, const Input& in, int64_t low_at,
                                 int64_t count, int64_t begin, int64_t end, void* scratch) {
  Matrix inner = {};
  inner.weight = m.lora_a;
  inner.rows = m.rank;
  inner.columns = round_up(m.columns, 32);
  inner.dtype = sizeof(T) == 2 ? kBfloat16 : kFloat32;
  float* low = in.low + low_at;
  expanded_product<T>(inner, {x, nullptr, count, in.stride, 0}, begin, end, low, in.low_stride,
                      scratch);
  for (int64_t b = 0; b < count; ++b)
    for (int64_t n = begin; n < end; ++n) {
      float& value = low[b * in.low_stride + n];
      value *= static_cast<float>(m.scaling);
      in.low_half[b * in.low_stride + low_at + n] = from_float<bf16>(value);
    }
}

// Inner activations of all adapters of a group, this thread's share of them.
static inline void low_rank(const Group& group, const Input& in, int64_t count, int64_t thread,
                            int64_t threads, void* scratch) {
  int64_t low_at = 0;
  for (int64_t i = 0; i < group.count; ++i) {
    const Matrix& m = group.parts[i];
    int64_t padded = round_up(m.rank, 16), quads = (m.rank + 3) / 4;
    int64_t begin = quads * thread / threads * 4;
    int64_t end = std::min(m.rank, quads * (thread + 1) / threads * 4);
    if (begin < end) {
      if (m.half)
        low_rank_part(m, in.half, in, low_at, count, begin, end, scratch);
      else
        low_rank_part(m, in.plain, in, low_at, count, begin, end, scratch);
    }
    if (thread == 0)
      for (int64_t b = 0; b < count; ++b)
        for (int64_t n = m.rank; n < padded; ++n) {
          in.low[b * in.low_stride + low_at + n] = 0;
          in.low_half[b * in.low_stride + low_at + n] = bf16{0};
        }
    low_at += padded;
  }
}

}  // namespace decode
}  // namespace FB_NAMESPACE
