// Dropout whose mask is a function of (seed, position): drawn again in backward, never saved.
#pragma once

namespace FB_NAMESPACE {

// 32 random bits for element `index`; `fourbit.ops.reference` computes the same.
static inline uint32_t dropout_bits(uint32_t index, uint32_t low, uint32_t high) {
  uint32_t bits = index * 0x9E3779B1u + low;
  bits = (bits ^ (bits >> 16)) * 0x85EBCA6Bu;
  bits = (bits ^ (bits >> 13)) + high;
  bits = bits * 0xC2B2AE35u;
  return bits ^ (bits >> 16);
}

// out = x * mask * scale, or out += the same; an element is kept when its bits reach `threshold`.
template <class T, bool add>
static void dropout_rows(const T* x, T* out, int64_t count, uint32_t low, uint32_t high,
                         uint32_t threshold, float scale, int threads) {
  parallel(count, 1 << 15, threads, [=](int64_t begin, int64_t end, int) {
    for (int64_t start = begin; start < end;) {
      // the upper half of the index joins the seed, so that 32 bits of it are enough inside
      int64_t stop = std::min(end, ((start >> 32) + 1) << 32);
      uint32_t upper = high + static_cast<uint32_t>(start >> 32) * 0x27D4EB2Fu;
#pragma omp simd
      for (int64_t i = start; i < stop; ++i) {
        bool keep = dropout_bits(static_cast<uint32_t>(i), low, upper) >= threshold;
        float value = to_float(x[i]) * (keep ? scale : 0.0f);
        out[i] = from_float<T>(add ? to_float(out[i]) + value : value);
      }
      start = stop;
    }
  });
}

static void dropout(const void* x, void* out, int64_t count, int64_t seed, int64_t threshold,
                    float scale, int add, int dtype, int threads) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  uint32_t limit = static_cast<uint32_t>(threshold);
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x);
    if (add)
      dropout_rows<T, true>(from, static_cast<T*>(out), count, low, high, limit, scale, threads);
    else
      dropout_rows<T, false>(from, static_cast<T*>(out), count, low, high, limit, scale, threads);
  });
}

}  // namespace FB_NAMESPACE
