// Cross-entropy of rows of logits: the loss of each row, and its gradient written over the logits.
#pragma once

namespace FB_NAMESPACE {

// What the model does to the product with its head: scale, then softcap if there is one.
template <bool kCapped>
static inline float logit_of(float raw, float scale, float softcap) {
  return kCapped ? softcap * tanh_fast(raw * (scale / softcap)) : raw * scale;
}

// The largest logit of a row; NaN is passed over.
template <bool kCapped, class T>
static inline float row_top(const T* raw, int64_t vocab, float scale, float softcap) {
  float sign = scale < 0.0f ? -1.0f : 1.0f, top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < vocab; ++j) {
    float value = to_float(raw[j]) * sign;
    top = value > top ? value : top;
  }
  return logit_of<kCapped>(top * sign, scale, softcap);
}

// The sum of exp(logit - top); with kKeep each of them is written to `powers` too. A NaN or +inf
// among the logits makes it NaN.
template <bool kCapped, bool kKeep, class T>
static inline double row_sum(const T* raw, int64_t vocab, float scale, float softcap, float top,
                             float* powers) {
  constexpr int64_t kBlock = 1024;  // float32 sums no longer than this, then float64
  // where every word is ruled out (-inf): 0 = no sum, instead of inf - inf
  float base = top == -INFINITY ? 0.0f : top;
  double sum = 0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    int64_t count = std::min(kBlock, vocab - start);
    const T* in = raw + start;
    float* out = powers + (kKeep ? start : 0);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = 0; j < count; ++j) {
      float power = exp_below_one(logit_of<kCapped>(to_float(in[j]), scale, softcap) - base);
      if (kKeep) out[j] = power;
      part += power;
    }
    sum += part;
  }
  return sum;
}

// d loss / d raw = (softmax - onehot) * d logit / d raw, over the raw logits.
template <bool kCapped, class T>
static inline void row_gradient(T* raw, const float* powers, int64_t label, int64_t vocab,
                                double sum, float scale, float softcap) {
  if (!(sum > 0.0 && sum < INFINITY)) {
    std::fill(raw, raw + vocab, from_float<T>(NAN));
    return;
  }
  float share = static_cast<float>(1.0 / sum);
  auto slope = [=](float value) {
    float bent = kCapped ? tanh_fast(value * (scale / softcap)) : 0.0f;
    return scale * (1.0f - bent * bent);
  };
  T target = round_finite<T>((powers[label] * share - 1.0f) * slope(to_float(raw[label])));
#pragma omp simd
  for (int64_t j = 0; j < vocab; ++j)
    raw[j] = round_finite<T>(powers[j] * share * slope(to_float(raw[j])));
  raw[label] = target;
}

template <bool kCapped, class T>
static void cross_entropy(T* logits, const int64_t* labels, float* losses, float* powers,
                          int64_t rows, int64_t vocab, float scale, float softcap, int threads) {
  parallel(rows, 1, threads, [=](int64_t begin, int64_t end, int thread) {
    for (int64_t m = begin; m < end; ++m) {
      T* raw = logits + m * vocab;
      float top = row_top<kCapped>(raw, vocab, scale, softcap);
      float* kept = powers == nullptr ? nullptr : powers + thread * vocab;
      double sum = kept == nullptr
                       ? row_sum<kCapped, false>(raw, vocab, scale, softcap, top, kept)
                       : row_sum<kCapped, true>(raw, vocab, scale, softcap, top, kept);
      float target = logit_of<kCapped>(to_float(raw[labels[m]]), scale, softcap);
      losses[m] = static_cast<float>(std::log(sum) + (static_cast<double>(top) - target));
      if (kept != nullptr) row_gradient<kCapped>(raw, kept, labels[m], vocab, sum, scale, softcap);
    }
  });
}

// Labels are within [0, vocab); softcap 0 is none. `powers` is float32 [threads, vocab] to work in;
// without it there is no gradient, and the logits stay as they are.
static void cross_entropy_rows(void* logits, const int64_t* labels, float* losses, float* powers,
                               int64_t rows, int64_t vocab, float scale, float softcap, int dtype,
                               int threads) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    auto run = softcap != 0.0f ? cross_entropy<true, T> : cross_entropy<false, T>;
    run(static_cast<T*>(logits), labels, losses, powers, rows, vocab, scale, softcap, threads);
  });
}

}  // namespace FB_NAMESPACE
