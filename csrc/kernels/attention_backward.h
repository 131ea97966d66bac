// The gradients of attention: scores are computed again from q, k and the kept logarithms of sums.
//
// A piece of work is one query head, or with few heads half of its blocks. It owns its rows of dq;
// what it adds to dk and dv it sums apart, and the pieces of one key/value head are then added in
// their order. So the result has the same bits however the pieces are spread over threads.
#pragma once

#include "attention.h"

namespace FB_NAMESPACE {
namespace attend {

constexpr int64_t kFewHeads = 32;  // fewer are cut in two, so that threads end together

template <class T>
struct Gradients {
  Heads<const T> q, k, v, o, g;
  Heads<T> dq, dk, dv;
  const float* lse;
};

template <bool P, class T>
class Backward {
 public:
  Backward(const Shape& shape, Arena& arena)
      : s_(shape), depth_(cells<P>(shape.width)), v_depth_(cells<P>(shape.value_width)),
        wide_(padded(shape.width)), v_wide_(padded(shape.value_width)) {
    const int64_t blocks = s_.blocks(), summed = kBlock / kStep<P>;
    key_columns_ = arena.take(blocks * depth_ * kBlock);
    value_columns_ = arena.take(blocks * v_depth_ * kBlock);
    keys_ = arena.take(blocks * summed * wide_);
    query_rows_ = arena.take(kBlock * depth_);
    grad_rows_ = arena.take(kBlock * v_depth_);
    queries_ = arena.take(summed * wide_);
    grads_ = arena.take(summed * v_wide_);
    dq_ = arena.take(kBlock * wide_);
    scores_ = arena.take(kRows * kBlock);
    slopes_ = arena.take(kRows * kBlock);
    weights_ = arena.take(kBlock * kBlock / kStep<P>);
    ds_ = arena.take(kBlock * kBlock / kStep<P>);
    ds_rows_ = P ? arena.take(kRows * kBlock / kStep<P>) : nullptr;
    delta_ = arena.take(kBlock);
    lse_ = arena.take(kBlock);
  }

  // Floats of one sum of dk and dv.
  static int64_t sums(const Shape& shape) {
    return shape.blocks() * kBlock * (padded(shape.width) + padded(shape.value_width));
  }

  void pack(const Gradients<T>& x, int64_t b, int64_t kv) {
    for (int64_t block = 0; block < s_.blocks(); ++block) {
      const int64_t t = block * kBlock, count = std::min<int64_t>(kBlock, s_.length - t);
      const T* k = x.k.at(b, t, kv);
      pack_columns<P>(key_columns_ + t * depth_, k, x.k.step(), count, s_.width);
      pack_columns<P>(value_columns_ + t * v_depth_, x.v.at(b, t, kv), x.v.step(), count,
                      s_.value_width);
      pack_summed<P>(keys_ + t / kStep<P> * wide_, k, x.k.step(), count, s_.width);
    }
  }

  // Queries [t, t + kBlock) of one head: writes their dq, adds to the sums of dk and dv.
  template <bool Capped>
  void run(const Gradients<T>& x, const Visible& visible, const Curve& curve, int64_t b, int64_t h,
           int64_t t, float* dk, float* dv) {
    const int64_t count = std::min<int64_t>(kBlock, s_.length - t);
    const T *q = x.q.at(b, t, h), *g = x.g.at(b, t, h);
    fetch(x.o.at(b, t, h), x.o.step(), count, s_.value_width);
    pack_rows<P>(query_rows_, q, x.q.step(), count, kBlock, s_.width);
    pack_summed<P>(queries_, q, x.q.step(), count, s_.width);
    pack_rows<P>(grad_rows_, g, x.g.step(), count, kBlock, s_.value_width);
    pack_summed<P>(grads_, g, x.g.step(), count, s_.value_width);
    prepare(x, b, h, t, count);
    if (const int64_t next = std::min<int64_t>(kBlock, s_.length - t - kBlock); next > 0) {
      fetch(q + kBlock * x.q.step(), x.q.step(), next, s_.width);
      fetch(g + kBlock * x.g.step(), x.g.step(), next, s_.value_width);
    }
    std::memset(dq_, 0, kBlock * wide_ * sizeof(float));
    const Span whole(visible, t, count);
    for (int64_t key = whole.lowest / kBlock * kBlock; key < whole.end; key += kBlock) {
      bool seen = false;
      for (int64_t row = 0; row < kBlock; row += kRows)
        seen |= slope_rows<Capped>(visible, curve, Span(visible, t + row, kRows), row, key);
      if (seen) add_keys(key, key == t, dk + key * wide_, dv + key * v_wide_);
    }
    T* to = x.dq.at(b, t, h);
    for (int64_t row = 0; row < count; ++row)
      narrow(to + row * x.dq.step(), dq_ + row * wide_, s_.width, curve.scale);
  }

 private:
  void prepare(const Gradients<T>& x, int64_t b, int64_t h, int64_t t, int64_t count) {
    const float* lse = x.lse + (b * s_.heads + h) * s_.length + t;
    for (int64_t row = 0; row < kBlock; ++row) {
      const bool inside = row < count;
      delta_[row] =
          inside ? dot(x.g.at(b, t + row, h), x.o.at(b, t + row, h), s_.value_width) : 0.0f;
      lse_[row] = inside ? lse[row] * kLog2e : INFINITY;
    }
  }

  // Weights and score gradients of kRows queries and one block of keys; their part of dq.
  template <bool Capped>
  bool slope_rows(const Visible& visible, const Curve& curve, const Span& span, int64_t row,
                  int64_t key) {
    int low, high;
    span.vectors(key, &low, &high);
    if (low >= high || span.lowest >= span.end) {
      // what the sums over queries read, though nobody sees it
      clear(row, 0, kVectors);
      return false;
    }
    clear(row, 0, low);
    const int64_t columns = low * kLanes;
    product<P, Into::kStore>({query_rows_ + row * depth_, depth_, 1},
                             {key_columns_ + key * depth_ + columns, kBlock}, depth_, high - low,
                             scores_ + columns, kBlock);
    product<P, Into::kStore>({grad_rows_ + row * v_depth_, v_depth_, 1},
                             {value_columns_ + key * v_depth_ + columns, kBlock}, v_depth_,
                             high - low, slopes_ + columns, kBlock);
    if (span.all_see(key + columns, key + high * kLanes))
      slope<Capped, false>(visible, curve, span, row, key, low, high);
    else
      slope<Capped, true>(visible, curve, span, row, key, low, high);
    const int64_t skipped = columns / kStep<P>;
    const float* ds = (P ? ds_rows_ : ds_ + row * kBlock) + skipped;
    product<P, Into::kAdd>({ds, kBlock / kStep<P>, 1},
                           {keys_ + (key / kStep<P> + skipped) * wide_, wide_},
                           (high - low) * kLanes / kStep<P>, wide_ / kLanes, dq_ + row * wide_,
                           wide_);
    return true;
  }

  void clear(int64_t row, int low, int high) {
    for (int64_t r = row / kStep<P>; r < (row + kRows) / kStep<P>; ++r)
      for (int n = low; n < high; ++n) {
        store(weights_ + r * kBlock + n * kLanes, vf{});
        store(ds_ + r * kBlock + n * kLanes, vf{});
      }
  }

  template <bool Capped, bool Masked>
  FB_INLINE_MEMBER void slope(const Visible& visible, const Curve& curve, const Span& span,
                              int64_t row, int64_t key, int low, int high) {
    const float scale = curve.factor<Capped>();
    for (int m = 0; m < kRows; m += 2)
      for (int n = low; n < high; ++n) {
        vf p[2], ds[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at = (m + i) * kBlock + n * kLanes;
          const vf bent = curve.bend<Capped>(load(scores_ + at));
          vf x = bent;
          if constexpr (Masked) x = hidden(x, visible, span.begin + m + i, key + n * kLanes);
          p[i] = exp2_of(mul_add(x, splat(scale), splat(-lse_[row + m + i])));
          ds[i] = p[i] * (load(slopes_ + at) - splat(delta_[row + m + i]));
          if constexpr (Capped) ds[i] *= splat(1.0f) - bent * bent;
          if constexpr (P) store_row<P>(ds_rows_ + (m + i) * (kBlock / kStep<P>), n, ds[i]);
        }
        const int64_t at = (row + m) / kStep<P> * kBlock;
        store_two<P>(weights_ + at, n, p[0], p[1]);
        store_two<P>(ds_ + at, n, ds[0], ds[1]);
      }
  }

  // dv += weights' * grads and dk += ds' * queries, for one block of keys.
  void add_keys(int64_t key, bool diagonal, float* dk, float* dv) {
    const int64_t count = std::min<int64_t>(kBlock, s_.length - key);
    for (int64_t row = 0; row < count; row += kRows) {
      // on the diagonal, no query before the keys sees them, and nothing was written there
      const int64_t skipped = diagonal ? row / kStep<P> : 0;
      const int64_t depth = kBlock / kStep<P> - skipped;
      product<P, Into::kAdd>({weights_ + skipped * kBlock + row, 1, kBlock},
                             {grads_ + skipped * v_wide_, v_wide_}, depth, v_wide_ / kLanes,
                             dv + row * v_wide_, v_wide_);
      product<P, Into::kAdd>({ds_ + skipped * kBlock + row, 1, kBlock},
                             {queries_ + skipped * wide_, wide_}, depth, wide_ / kLanes,
                             dk + row * wide_, wide_);
    }
  }

  Shape s_;
  int64_t depth_, v_depth_, wide_, v_wide_;
  float *key_columns_, *value_columns_, *keys_, *query_rows_, *grad_rows_, *queries_, *grads_, *dq_,
      *scores_, *slopes_, *weights_, *ds_, *ds_rows_, *delta_, *lse_;
};

// How the work is cut: pieces, `each` of them for one key/value head, `halves` for one query head.
struct Cut {
  int64_t halves, each, pieces;

  explicit Cut(const Shape& s)
      : halves(s.batch * s.heads < kFewHeads && s.blocks() > 1 ? 2 : 1),
        each(s.group() * halves), pieces(s.batch * s.kv_heads * each) {}
};

template <bool P, class T>
class Keys {
 public:
  Keys(const Shape& shape, const Gradients<T>& x, float scale)
      : s_(shape), x_(x), scale_(scale), wide_(padded(shape.width)),
        v_wide_(padded(shape.value_width)), sums_(Backward<P, T>::sums(shape)) {}

  int64_t size() const { return sums_; }
  float* dv(float* sums) const { return sums + s_.blocks() * kBlock * wide_; }

  void add(float* to, const float* from) const {
#pragma omp simd
    for (int64_t i = 0; i < sums_; ++i) to[i] += from[i];
  }

  // Sums of the key/value head number `group` to where they belong.
  void emit(int64_t group, float* sums) const {
    const int64_t b = group / s_.kv_heads, kv = group % s_.kv_heads;
    for (int64_t t = 0; t < s_.length; ++t) {
      narrow(x_.dk.at(b, t, kv), sums + t * wide_, s_.width, scale_);
      narrow(x_.dv.at(b, t, kv), dv(sums) + t * v_wide_, s_.value_width, 1.0f);
    }
  }

 private:
  const Shape& s_;
  const Gradients<T>& x_;
  float scale_;
  int64_t wide_, v_wide_, sums_;
};

template <bool P, bool Capped, class T>
static void backward(const Gradients<T>& x, const int32_t* first, const int64_t* layout,
                     Curve curve, int threads, float* scratch) {
  const Shape shape(layout);
  const Cut cut(shape);
  const Keys<P, T> keys(shape, x, curve.scale);
  Arena counter{nullptr};
  Backward<P, T> measured(shape, counter);
  const int64_t fixed = counter.used, size = fixed + 2 * keys.size();
  // one place for each piece, used by those key/value heads that several threads share
  float* shared = scratch + threads * size;
  // 1: this piece's sums lie in its shared place; 0: they went into an earlier piece's
  int32_t* apart = reinterpret_cast<int32_t*>(shared + cut.pieces * keys.size());
  std::memset(apart, 0, cut.pieces * sizeof(int32_t));

  parallel(cut.pieces, 1, threads, [&](int64_t from, int64_t to, int thread) {
    Arena arena{scratch + thread * size};
    Backward<P, T> worker(shape, arena);
    float *total = arena.take(keys.size()), *addend = arena.take(keys.size());
    int64_t packed = -1;
    for (int64_t piece = from; piece < to; ++piece) {
      const int64_t group = piece / cut.each, place = piece % cut.each, start = piece - place;
      const bool mine = start >= from && start + cut.each <= to, folds = start >= from;
      float* sums = mine ? total : shared + start * keys.size();
      float* into = place == 0 ? sums : folds ? addend : shared + piece * keys.size();
      apart[piece] = into != addend && !mine;
      const int64_t b = group / shape.kv_heads, kv = group % shape.kv_heads;
      if (group != packed) worker.pack(x, b, kv);
      packed = group;
      std::memset(into, 0, keys.size() * sizeof(float));
      const int64_t h = kv * shape.group() + place / cut.halves;
      const Visible visible{first == nullptr ? nullptr : first + b * shape.length, shape.length};
      for (int64_t block = 0; block < shape.blocks(); ++block)
        // halves of equal work: blocks 0, 3, 4, 7, ... and 1, 2, 5, 6, ...
        if (cut.halves == 1 || ((block + 1) / 2) % 2 == place % 2)
          worker.template run<Capped>(x, visible, curve, b, h, block * kBlock, into,
                                      keys.dv(into));
      if (into == addend) keys.add(sums, addend);
      if (mine && place == cut.each - 1) keys.emit(group, total);
    }
  });

  parallel(shape.batch * shape.kv_heads, 1, threads, [&](int64_t from, int64_t to, int) {
    for (int64_t group = from; group < to; ++group) {
      const int64_t start = group * cut.each;
      if (apart[start] == 0) continue;
      float* sums = shared + start * keys.size();
      for (int64_t piece = start + 1; piece < start + cut.each; ++piece)
        if (apart[piece] != 0) keys.add(sums, shared + piece * keys.size());
      keys.emit(group, sums);
    }
  });
}

// Floats of scratch memory for one call.
template <bool P, class T>
static int64_t scratch_floats(const Shape& shape, int backward, int threads) {
  Arena arena{nullptr};
  if (backward == 0) {
    Forward<P, T> measured(shape, arena);
    return arena.used * threads;
  }
  Backward<P, T> measured(shape, arena);
  const int64_t sums = Backward<P, T>::sums(shape), pieces = Cut(shape).pieces;
  return (arena.used + 2 * sums) * threads + pieces * (sums + 1);
}

template <class Body>
static void choose_kernel(int dtype, float softcap, const Body& body) {
  by_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr bool pairs = kPairs && sizeof(T) == 2;
    if (softcap > 0)
      body(zero, std::integral_constant<bool, pairs>(), std::true_type());
    else
      body(zero, std::integral_constant<bool, pairs>(), std::false_type());
  });
}

}  // namespace attend

// Floats of scratch that attention_forward, or attention_backward, needs for this layout.
static void attention_scratch(const int64_t* layout, int64_t* floats, int backward, int dtype,
                              int threads) {
  attend::choose_kernel(dtype, 0, [&](auto zero, auto pairs, auto) {
    using T = decltype(zero);
    *floats = attend::scratch_floats<decltype(pairs)::value, T>(attend::Shape(layout), backward,
                                                                threads);
  });
}

// first and shared int32 [batch, length] or null; lse float32 [batch, heads, length]; softcap 0:
// none; scratch on a cache line.
static void attention_forward(const void* q, const void* k, const void* v, const int32_t* first,
                              const int32_t* shared, void* o, float* lse, const int64_t* layout,
                              void* scratch, float scale, float softcap, int dtype, int threads) {
  attend::choose_kernel(dtype, softcap, [&](auto zero, auto pairs, auto capped) {
    using T = decltype(zero);
    attend::forward<decltype(pairs)::value, decltype(capped)::value>(
        static_cast<const T*>(q), static_cast<const T*>(k), static_cast<const T*>(v), first,
        shared, static_cast<T*>(o), lse, layout, attend::Curve{scale, softcap}, threads,
        static_cast<float*>(scratch));
  });
}

static void attention_backward(const void* grad_o, const void* q, const void* k, const void* v,
                               const void* o, const float* lse, const int32_t* first, void* dq,
                               void* dk, void* dv, const int64_t* layout, void* scratch,
                               float scale, float softcap, int dtype, int threads) {
  attend::choose_kernel(dtype, softcap, [&](auto zero, auto pairs, auto capped) {
    using T = decltype(zero);
    using Const = attend::Heads<const T>;
    using Out = attend::Heads<T>;
    const attend::Gradients<T> x{Const(static_cast<const T*>(q), layout, 0),
                                 Const(static_cast<const T*>(k), layout, 1),
                                 Const(static_cast<const T*>(v), layout, 2),
                                 Const(static_cast<const T*>(o), layout, 3),
                                 Const(static_cast<const T*>(grad_o), layout, 4),
                                 Out(static_cast<T*>(dq), layout, 5),
                                 Out(static_cast<T*>(dk), layout, 6),
                                 Out(static_cast<T*>(dv), layout, 7),
                                 lse};
    attend::backward<decltype(pairs)::value, decltype(capped)::value>(
        x, first, layout, attend::Curve{scale, softcap}, threads, static_cast<float*>(scratch));
  });
}

}  // namespace FB_NAMESPACE
