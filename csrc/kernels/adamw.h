// One step of AdamW, the state in 32 bits or in blocks of 8-bit codes.
//
// Arithmetic is that of the plain PyTorch form in fourbit/optim/update.py, operation by operation,
// so the bits are the same.
#pragma once

#include "quantize.h"

namespace FB_NAMESPACE {
namespace adamw {

constexpr int64_t kBlock = 256;  // of the state, and what a thread takes at once

// As `fourbit.optim.update.Coefficients` lists them.
struct Rule {
  float decay, rest1, beta2, rest2, step_size, root, eps;
};

template <class T>
static inline void update(T* p, const T* g, float* m, float* v, int64_t count, const Rule& r) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float grad = to_float(g[i]);
    m[i] = m[i] + (grad - m[i]) * r.rest1;
    v[i] = v[i] * r.beta2 + grad * grad * r.rest2;
    float change = m[i] / (std::sqrt(v[i]) * r.root + r.eps);
    p[i] = from_float<T>(to_float(p[i]) * r.decay - change * r.step_size);
  }
}

// The state of one moment in 8 bits.
struct Moment {
  uint8_t* codes;
  float* absmax;
  const float* map;         // 256 values, ascending
  const float* thresholds;  // 255 midpoints

  void decode(int64_t block, int64_t count, float* out) const {
    for (int64_t i = 0; i < count; ++i)
      out[i] = map[codes[block * kBlock + i]] * absmax[block];
  }
  void encode(int64_t block, int64_t count, float* values) const {
    float most = largest(values, count), factor = 1.0f / (most < kTiny ? kTiny : most);
    absmax[block] = most;
    for (int64_t i = 0; i < kBlock; ++i) values[i] = i < count ? values[i] * factor : 0.0f;
    encode_scales(values, count, thresholds, codes + block * kBlock);
  }
};

// Calls body(values, gradients, first block, past the last) on the threads' shares.
template <class Body>
static void share_blocks(void* p, const void* g, int64_t count, int dtype, int threads,
                         const Body& body) {
  by_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* values = static_cast<T*>(p);
    const T* grads = static_cast<const T*>(g);
    parallel((count + kBlock - 1) / kBlock, kSplit / kBlock, threads,
             [=](int64_t begin, int64_t end, int) { body(values, grads, begin, end); });
  });
}

}  // namespace adamw

static void adamw_32bit(void* p, const void* g, float* m, float* v, int64_t count,
                        const adamw::Rule* rule, int dtype, int threads) {
  using adamw::kBlock;
  adamw::share_blocks(p, g, count, dtype, threads,
                      [=](auto* values, auto* grads, int64_t begin, int64_t end) {
    const int64_t from = begin * kBlock, to = std::min(end * kBlock, count);
    adamw::update(values + from, grads + from, m + from, v + from, to - from, *rule);
  });
}

static void adamw_8bit(void* p, const void* g, const adamw::Moment* first,
                       const adamw::Moment* second, int64_t count, const adamw::Rule* rule,
                       int dtype, int threads) {
  using adamw::kBlock;
  adamw::share_blocks(p, g, count, dtype, threads,
                      [=](auto* values, auto* grads, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t at = block * kBlock, part = std::min(kBlock, count - at);
      float m[kBlock], v[kBlock];
      first->decode(block, part, m);
      second->decode(block, part, v);
      adamw::update(values + at, grads + at, m, v, part, *rule);
      first->encode(block, part, m);
      second->encode(block, part, v);
    }
  });
}

}  // namespace FB_NAMESPACE
