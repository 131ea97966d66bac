// Softmax attention, forward and backward, block by block: no matrix of all scores is ever made.
//
// Query t of batch b sees the keys first[b, t] ... t (first = null: 0 ... t), which covers causal
// masks, packed documents, sliding windows and left padding; first > t: nothing, and the output is
// 0. Forward also takes shared[b, t] (null: 0): query t sees the keys 0 ... shared - 1 besides, so
// that several continuations of one text may lie in one row. Blocks in which nothing is visible cost
// nothing. Scores, statistics and sums are float32; with
// bf16 instructions the weights and their gradients are rounded to bf16 for the second product.
//
// Tensors are told by `layout` (int64): batch, length, heads, kv heads, width of q and k, width of
// v; then steps in elements between batches, tokens and heads, for each of q, k, v, o and, in
// backward, grad_o, dq, dk, dv. Elements of a head lie side by side.
#pragma once

#include "packing.h"

namespace FB_NAMESPACE {
namespace attend {

using namespace tiles;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr int kQueries = 32;  // of a forward block: what it holds stays in the first-level cache

struct Shape {
  int64_t batch, length, heads, kv_heads, width, value_width;

  explicit Shape(const int64_t* layout)
      : batch(layout[0]), length(layout[1]), heads(layout[2]), kv_heads(layout[3]),
        width(layout[4]), value_width(layout[5]) {}

  int64_t group() const { return heads / kv_heads; }
  int64_t blocks() const { return (length + kBlock - 1) / kBlock; }
};

template <class T>
struct Heads {
  T* data;
  const int64_t* steps;

  Heads(T* tensor, const int64_t* layout, int number)
      : data(tensor), steps(layout + 6 + 3 * number) {}

  T* at(int64_t b, int64_t t, int64_t h) const {
    return data + b * steps[0] + t * steps[1] + h * steps[2];
  }
  int64_t step() const { return steps[1]; }
};

// How a product of q and k becomes an exponent to the base 2; `scale` is positive.
struct Curve {
  float scale, softcap;

  // What is left to multiply with after `bend`.
  template <bool Capped>
  float factor() const {
    return Capped ? softcap * kLog2e : scale * kLog2e;
  }
  template <bool Capped>
  FB_INLINE_MEMBER vf bend(vf score) const {
    return Capped ? tanh_of(score * splat(scale / softcap)) : score;
  }
};

// Which keys the queries of one batch entry see: a range that ends at themselves, and perhaps the
// beginning of the row.
struct Visible {
  const int32_t* first;
  int64_t length;
  const int32_t* shared = nullptr;

  int64_t from(int64_t t) const {
    return first == nullptr ? 0 : std::max<int64_t>(first[t], 0);
  }
  int64_t upto(int64_t t) const {
    return shared == nullptr ? 0 : std::min<int64_t>(shared[t], length);
  }
};

// What a few neighbouring queries see together.
struct Span {
  int64_t lowest, latest, begin, end;  // keys [lowest, end); all see those from `latest` on
  int64_t own, most, least;  // keys [most, own) are seen by none, those before `least` by all

  Span(const Visible& visible, int64_t start, int64_t count) : begin(start) {
    end = std::min(start + count, visible.length);
    own = end, latest = 0, most = 0, least = start < end ? visible.length : 0;
    for (int64_t t = start; t < end; ++t) {
      int64_t from = visible.from(t), upto = visible.upto(t);
      latest = std::max(latest, from);
      if (from <= t) own = std::min(own, from);
      most = std::max(most, upto);
      least = std::min(least, upto);
    }
    lowest = most > 0 ? 0 : own;
    end = std::max(end, most);
  }

  // Vectors of the block of keys from `key` on that must be computed: [low, high).
  void vectors(int64_t key, int* low, int* high) const {
    int64_t from = std::max<int64_t>(lowest - key, 0) / kLanes;
    int64_t to = (std::min<int64_t>(end - key, kBlock) + kLanes - 1) / kLanes;
    *low = static_cast<int>(from / kColumns * kColumns);
    *high = static_cast<int>(std::max<int64_t>(to, *low));
  }

  bool all_see(int64_t key, int64_t stop) const {
    return (latest <= key && stop <= begin + 1) || stop <= least;
  }
  bool none_see(int64_t key, int64_t stop) const { return most <= key && stop <= own; }
};

FB_INLINE vi count_up(int64_t from) {
  vi value;
  for (int i = 0; i < kLanes; ++i) value[i] = static_cast<int32_t>(from) + i;
  return value;
}

// Hides what query t does not see of the keys from `key` on.
FB_INLINE vf hidden(vf score, const Visible& visible, int64_t t, int64_t key) {
  vi keys = count_up(key);
  int32_t from = static_cast<int32_t>(t < visible.length ? visible.from(t) : 0);
  int32_t upto = static_cast<int32_t>(t < visible.length ? visible.upto(t) : 0);
  vi seen = ((keys >= splat(from)) & (keys <= splat(static_cast<int32_t>(t)))) | (keys < splat(upto));
  return choose(seen, score, splat(-INFINITY));
}

// Memory that is handed out piece by piece, each on its own cache lines; with a null start it only
// counts.
struct Arena {
  float* start;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* piece = start == nullptr ? nullptr : start + used;
    used += (floats + 15) / 16 * 16;
    return piece;
  }
};

template <bool P, class T>
class Forward {
 public:
  Forward(const Shape& shape, Arena& arena)
      : s_(shape), depth_(cells<P>(shape.width)), wide_(padded(shape.value_width)) {
    keys_ = arena.take(s_.blocks() * depth_ * kBlock);
    values_ = arena.take(s_.blocks() * kBlock / kStep<P> * wide_);
    queries_ = arena.take(kQueries * depth_);
    out_ = arena.take(kQueries * wide_);
    sums_ = arena.take(kQueries * kLanes);
    scores_ = arena.take(kRows * kBlock);
    weights_ = arena.take(kRows * kBlock);
    maxima_ = arena.take(kQueries + kLanes);
  }

  void pack(const Heads<const T>& k, const Heads<const T>& v, int64_t b, int64_t kv) {
    for (int64_t block = 0; block < s_.blocks(); ++block) {
      const int64_t t = block * kBlock, count = std::min<int64_t>(kBlock, s_.length - t);
      pack_columns<P>(keys_ + block * depth_ * kBlock, k.at(b, t, kv), k.step(), count, s_.width);
      pack_summed<P>(values_ + block * kBlock / kStep<P> * wide_, v.at(b, t, kv), v.step(), count,
                     s_.value_width);
    }
  }

  // The queries from t on of one head: their outputs and the logarithms of their sums.
  template <bool Capped>
  void run(const Heads<const T>& q, const Heads<T>& o, float* lse, const Visible& visible,
           const Curve& curve, int64_t b, int64_t h, int64_t t) {
    const int64_t count = std::min<int64_t>(kQueries, s_.length - t);
    pack_rows<P>(queries_, q.at(b, t, h), q.step(), count, kQueries, s_.width);
    if (t >= kQueries) fetch(q.at(b, t - kQueries, h), q.step(), kQueries, s_.width);
    std::memset(out_, 0, kQueries * wide_ * sizeof(float));
    std::memset(sums_, 0, kQueries * kLanes * sizeof(float));
    for (int i = 0; i < kQueries + kLanes; ++i) maxima_[i] = -INFINITY;
    const Span whole(visible, t, count);
    for (int64_t key = whole.lowest / kBlock * kBlock; key < whole.end; key += kBlock)
      for (int64_t row = 0; row < count; row += kRows)
        block<Capped>(visible, curve, Span(visible, t + row, kRows), row, key);
    finish(o.at(b, t, h), o.step(), lse + (b * s_.heads + h) * s_.length + t, count);
  }

 private:
  template <bool Capped>
  FB_INLINE_MEMBER void block(const Visible& visible, const Curve& curve, const Span& span,
                              int64_t row, int64_t key) {
    int low, high;
    span.vectors(key, &low, &high);
    if (low >= high || span.none_see(key, key + kBlock)) return;
    const float* keys = keys_ + key * depth_ + low * kLanes;
    product<P, Into::kStore>({queries_ + row * depth_, depth_, 1}, {keys, kBlock}, depth_,
                             high - low, scores_ + low * kLanes, kBlock);
    if (span.all_see(key + low * kLanes, key + high * kLanes))
      weigh<Capped, false>(visible, curve, span, row, key, low, high);
    else
      weigh<Capped, true>(visible, curve, span, row, key, low, high);
    const int64_t skipped = low * kLanes / kStep<P>;
    const float* values = values_ + (key / kStep<P> + skipped) * wide_;
    product<P, Into::kAdd>({weights_ + skipped, kBlock / kStep<P>, 1}, {values, wide_},
                           (high - low) * kLanes / kStep<P>, wide_ / kLanes, out_ + row * wide_,
                           wide_);
  }

  // Scores to weights, relative to the largest score so far; older sums are brought there.
  template <bool Capped, bool Masked>
  FB_INLINE_MEMBER void weigh(const Visible& visible, const Curve& curve, const Span& span,
                              int64_t row, int64_t key, int low, int high) {
    alignas(64) float largest[kLanes] = {}, bases[kLanes], factor[kLanes];
    const float scale = curve.factor<Capped>();
    for (int m = 0; m < kRows; ++m) {
      vf top = splat(-INFINITY);
      for (int n = low; n < high; ++n) {
        float* at = scores_ + m * kBlock + n * kLanes;
        vf x = curve.bend<Capped>(load(at));
        if constexpr (Masked) x = hidden(x, visible, span.begin + m, key + n * kLanes);
        if constexpr (Capped || Masked) store(at, x);
        top = larger(x, top);
      }
      largest[m] = largest_of(top) * scale;
    }
    // lanes past the rows hold what belongs to other rows, and are not used
    vf before = load(maxima_ + row), now = larger(load(largest), before);
    // a query that has seen nothing yet keeps sums of 0 instead of exponents of inf - inf
    vf base = choose(now == splat(-INFINITY), splat(0.0f), now);
    vf shrink = exp2_of(before - base);
    store(factor, shrink);
    store(bases, base);
    for (int m = 0; m < kRows; ++m) {
      if (maxima_[row + m] == bases[m]) continue;
      maxima_[row + m] = now[m];
      float* sums = out_ + (row + m) * wide_;
      const vf shorter = splat(factor[m]);
      for (int64_t n = 0; n < wide_; n += kLanes) store(sums + n, load(sums + n) * shorter);
    }
    for (int m = 0; m < kRows; ++m) {
      float* sums = sums_ + (row + m) * kLanes;
      vf sum = load(sums) * splat(factor[m]);
      for (int n = low; n < high; ++n) {
        vf x = load(scores_ + m * kBlock + n * kLanes);
        vf p = exp2_of(mul_add(x, splat(scale), splat(-bases[m])));
        sum += p;
        store_row<P>(weights_ + m * (kBlock / kStep<P>), n, p);
      }
      store(sums, sum);
    }
  }

  void finish(T* out, int64_t step, float* lse, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const float sum = sum_of(load(sums_ + row * kLanes));
      const bool empty = maxima_[row] == -INFINITY && sum == 0.0f;
      // +inf makes every weight that backward computes again 0
      lse[row] = empty ? INFINITY : (maxima_[row] + std::log2(sum)) * kLn2;
      const float inverse = empty ? 0.0f : 1.0f / sum;
      narrow(out + row * step, out_ + row * wide_, s_.value_width, inverse);
    }
  }

  Shape s_;
  int64_t depth_, wide_;
  float *keys_, *values_, *queries_, *out_, *sums_, *scores_, *weights_, *maxima_;
};

template <bool P, bool Capped, class T>
static void forward(const T* q, const T* k, const T* v, const int32_t* first,
                    const int32_t* shared, T* o, float* lse, const int64_t* layout, Curve curve,
                    int threads, float* scratch) {
  const Shape shape(layout);
  const Heads<const T> qs(q, layout, 0), ks(k, layout, 1), vs(v, layout, 2);
  const Heads<T> os(o, layout, 3);
  Arena counter{nullptr};
  Forward<P, T> measured(shape, counter);
  const int64_t size = counter.used, parts = (shape.length + kQueries - 1) / kQueries;
  const int64_t units = shape.batch * shape.heads * parts;
  parallel(units, 1, threads, [&](int64_t from, int64_t to, int thread) {
    Arena arena{scratch + thread * size};
    Forward<P, T> worker(shape, arena);
    int64_t packed = -1;
    for (int64_t unit = from; unit < to; ++unit) {
      const int64_t head = unit / parts, b = head / shape.heads, h = head % shape.heads;
      const int64_t source = head / shape.group();
      if (source != packed) worker.pack(ks, vs, b, h / shape.group());
      packed = source;
      // long and short rows by turns: half of a head's blocks is half of its work
      const int64_t turn = unit % parts, part = turn % 2 ? turn / 2 : parts - 1 - turn / 2;
      const int64_t row = b * shape.length;
      const Visible visible{first == nullptr ? nullptr : first + row, shape.length,
                            shared == nullptr ? nullptr : shared + row};
      worker.template run<Capped>(qs, os, lse, visible, curve, b, h, part * kQueries);
    }
  });
}

}  // namespace attend
}  // namespace FB_NAMESPACE
