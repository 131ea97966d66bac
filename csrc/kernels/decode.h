// Decoding: the next token's scores for a batch of sequences in one call, in one parallel region.
#pragma once

#include <atomic>
#include <thread>
#include <type_traits>

#include "lanes.h"
#include "decode_types.h"
#include "decode_input.h"
#include "decode_weights.h"
#include "decode_products.h"
#include "decode_attention.h"
#include "decode_sketch.h"

namespace FB_NAMESPACE {
namespace decode {

// Threads wait here for each other some ten times a layer, too often for the operating system.
struct Gate {
  std::atomic<int> waiting;
  std::atomic<int> round;

  void wait(int threads) {
    if (threads == 1) return;
    int now = round.load(std::memory_order_relaxed);
    if (waiting.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      waiting.store(0, std::memory_order_relaxed);
      round.store(now + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round.load(std::memory_order_acquire) == now; ++spins) {
#if defined(__x86_64__) || defined(_M_X64)
      __builtin_ia32_pause();
#endif
      // more threads than processors: the last one may be waiting for this one's
      if (spins > 200000) std::this_thread::yield();
    }
  }
};

// The sizes of everything between two layers.
struct Sizes {
  int64_t stride = 0;   // the widest activations
  int64_t qkv = 0, inner = 0, up = 0, low = 16, head_dim = 0;

  explicit Sizes(const Model& m) {
    stride = std::max(m.width, m.head.columns);
    low = std::max(low, round_up(m.head.rank, 16));
    for (int64_t i = 0; i < m.layer_count; ++i) {
      const Layer& layer = m.layers[i];
      int64_t attention = layer.heads * layer.head_dim;
      int64_t ups = rows_of(layer.up);
      stride = std::max({stride, attention, layer.gated ? ups / 2 : ups});
      qkv = std::max(qkv, rows_of(layer.qkv));
      up = std::max(up, ups);
      head_dim = std::max(head_dim, layer.head_dim);
      for (const Group* g : {&layer.qkv, &layer.out, &layer.up, &layer.down})
        low = std::max(low, ranks_of(*g));
    }
    stride = round_up(stride, 64);
  }
};

// Cuts a workspace into arrays, each on a cache line of its own; without memory it only counts.
struct Carver {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* found = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used = round_up(used + count * static_cast<int64_t>(sizeof(T)), 64);
    return found;
  }
};

struct Desk {  // one thread's own
  float* x;
  float* y;
  Input in;
  void* strip;
  int16_t* whole;
  float* scores;
  float* best_value;
  int64_t* best;
};

struct Hall {  // shared by all threads
  Gate* gate;
  float *x, *qkv, *attention, *up, *added;
  float *uppers, *floors;  // of tokens, of threads
  Input in;
};

static inline Input carve_input(Carver& carver, const Sizes& s, int64_t rows) {
  Input in;
  in.plain = carver.take<float>(rows * s.stride);
  in.half = carver.take<bf16>(rows * s.stride);
  in.split = carver.take<float>(rows * s.stride);
  in.split_half = carver.take<bf16>(rows * s.stride);
  in.codes = carver.take<int8_t>(rows * s.stride);
  in.outliers = carver.take<int32_t>(rows * s.stride);
  in.outlier_counts = carver.take<int32_t>(rows);
  in.scales = carver.take<float>(rows);
  in.low = carver.take<float>(rows * s.low);
  in.low_half = carver.take<bf16>(rows * s.low);
  in.stride = s.stride;
  in.low_stride = s.low;
  return in;
}

static inline Hall carve_hall(Carver& carver, const Model& m, const Sizes& s, int64_t rows,
                              int threads) {
  Hall hall;
  hall.gate = carver.take<Gate>(1);
  hall.x = carver.take<float>(rows * m.width);
  hall.qkv = carver.take<float>(rows * s.qkv);
  hall.attention = carver.take<float>(rows * s.stride);
  hall.up = carver.take<float>(rows * s.up);
  hall.added = carver.take<float>(rows * m.width);
  hall.uppers = carver.take<float>(m.sketch == nullptr ? 0 : m.head.rows);
  hall.floors = carver.take<float>(threads);
  hall.in = carve_input(carver, s, rows);
  return hall;
}

static inline Desk carve_desk(Carver& carver, const Model& m, const Sizes& s, int64_t rows,
                              int64_t longest) {
  Desk desk;
  desk.x = carver.take<float>(m.width);
  desk.y = carver.take<float>(s.stride);
  desk.in = carve_input(carver, s, 1);
  desk.strip = carver.take<float>(s.stride * (s.stride <= 2048 ? 32 : 16));
  desk.whole = carver.take<int16_t>(s.stride);
  desk.scores = carver.take<float>(3 * s.head_dim + longest + 16);
  desk.best_value = carver.take<float>(rows);
  desk.best = carver.take<int64_t>(rows);
  return desk;
}

// Bytes of workspace that `decode_step` needs for so many sequences of up to `longest` positions.
static void decode_workspace(const void* model, int64_t rows, int64_t longest, int threads,
                             int64_t* bytes) {
  const Model& m = *static_cast<const Model*>(model);
  Sizes sizes(m);
  Carver carver{nullptr};
  carve_hall(carver, m, sizes, rows, threads);
  for (int t = 0; t < threads; ++t) carve_desk(carver, m, sizes, rows, longest);
  *bytes = carver.used + 64;
}

// One thread's way through the model.
class Worker {
 public:
  Worker(const Model& model, const Step& step, const Hall& hall, const Desk& desk, int thread,
         int threads)
      : m_(model), step_(step), hall_(hall), desk_(desk), thread_(thread), threads_(threads),
        alone_(step.rows == 1), in_(alone_ ? desk.in : hall.in) {
    in_.low = hall.in.low, in_.low_half = hall.in.low_half;
  }

  void run() {
    if (step_.states != nullptr) {
      each_row([&](int64_t b, float*) {
        const float* state = step_.states + b * m_.width;
        prepare(in_, b, state, m_.width, forms_of(m_.head), 0.0f);
      });
    } else {
      const Layer* layers = m_.layers;
      each_row([&](int64_t b, float* x) {
        embed(b, x);
        enter(b, x, m_.layer_count ? layers[0].before_attention : m_.last,
              m_.layer_count ? layers[0].qkv : single_head());
      });
      for (int64_t i = 0; i < m_.layer_count; ++i) {
        bool last = i + 1 == m_.layer_count;
        through(layers[i], last ? m_.last : layers[i + 1].before_attention,
                last ? single_head() : layers[i + 1].qkv);
      }
    }
    if (step_.logits == nullptr)
      search();
    else
      score();
  }

 private:
  // body(row, its residual stream) for this thread's rows; a single row is every thread's own
  // business, so that nobody waits for it.
  template <class Body>
  void each_row(const Body& body) {
    if (alone_) {
      body(0, desk_.x);
      return;
    }
    int64_t begin = step_.rows * thread_ / threads_, end = step_.rows * (thread_ + 1) / threads_;
    for (int64_t b = begin; b < end; ++b) body(b, hall_.x + b * m_.width);
    wait();
  }

  void wait() { hall_.gate->wait(threads_); }

  Group single_head() const {
    Group group = {};
    group.count = 1;
    group.parts[0] = m_.head;
    return group;
  }

  void embed(int64_t b, float* x) const {
    int64_t token = step_.tokens[b];
    float scale = static_cast<float>(m_.embedding_scale);
    copy_floats(m_.embedding, token, x);
    for (int64_t j = 0; j < m_.width; ++j) x[j] *= scale;
    if (m_.positions == nullptr) return;
    copy_floats(m_.positions, step_.places[b], desk_.y);
    for (int64_t j = 0; j < m_.width; ++j) x[j] += desk_.y[j];
  }

  void copy_floats(const void* table, int64_t row, float* out) const {
    by_type(static_cast<int>(m_.embedding_dtype), [&](auto zero) {
      using T = decltype(zero);
      const T* from = static_cast<const T*>(table) + row * m_.width;
      for (int64_t j = 0; j < m_.width; ++j) out[j] = to_float(from[j]);
    });
  }

  static float threshold_of(const Group& group) {
    for (int64_t i = 0; i < group.count; ++i)
      if (group.parts[i].format == kEightBit)
        return static_cast<float>(group.parts[i].threshold);
    return 0.0f;
  }

  void take(const Group& group, int64_t b, const float* y, int64_t columns) {
    prepare(in_, b, y, columns, forms_of(group), threshold_of(group));
  }

  void enter(int64_t b, const float* x, const Norm& norm, const Group& next) {
    normalize(norm, x, desk_.y, m_.width);
    take(next, b, desk_.y, m_.width);
  }

  // This thread's share of `rows` output rows, by whole sixteens.
  void share(int64_t rows, int64_t* begin, int64_t* end) const {
    int64_t blocks = (rows + 15) / 16;
    *begin = std::min(rows, blocks * thread_ / threads_ * 16);
    *end = std::min(rows, blocks * (thread_ + 1) / threads_ * 16);
  }

  void adapt(const Group& group) {
    if (ranks_of(group) == 0) return;
    low_rank(group, in_, step_.rows, thread_, threads_, desk_.strip);
    wait();
  }

  void multiply(const Group& group, float* out, int64_t out_stride) {
    int64_t begin, end;
    adapt(group);
    share(rows_of(group), &begin, &end);
    group_product(group, in_, step_.rows, begin, end, out, out_stride, desk_.strip);
    wait();
  }

  void through(const Layer& layer, const Norm& next_norm, const Group& next) {
    multiply(layer.qkv, hall_.qkv, rows_of(layer.qkv));
    int64_t inner = layer.heads * layer.head_dim;
    attention(layer, rows_of(layer.qkv), inner);
    wait();
    each_row([&](int64_t b, float*) { take(layer.out, b, hall_.attention + b * inner, inner); });
    multiply(layer.out, hall_.added, m_.width);
    each_row([&](int64_t b, float* x) {
      add(b, x, layer.after_attention, layer.residual);
      enter(b, x, layer.before_mlp, layer.up);
    });
    int64_t ups = rows_of(layer.up), middle = layer.gated ? ups / 2 : ups;
    feed(layer, ups, middle);
    wait();
    each_row([&](int64_t b, float*) { take(layer.down, b, hall_.up + b * ups, middle); });
    multiply(layer.down, hall_.added, m_.width);
    each_row([&](int64_t b, float* x) {
      add(b, x, layer.after_mlp, layer.residual);
      enter(b, x, next_norm, next);
    });
  }

  void add(int64_t b, float* x, const Norm& norm, double residual) {
    const float* added = hall_.added + b * m_.width;
    if (norm.weight != nullptr) {
      normalize(norm, added, desk_.y, m_.width);
      added = desk_.y;
    }
    float scale = static_cast<float>(residual);
#pragma omp simd
    for (int64_t j = 0; j < m_.width; ++j) x[j] += added[j] * scale;
  }

  void attention(const Layer& layer, int64_t qkv_stride, int64_t inner) {
    int64_t group = layer.heads / layer.kv_heads;
    // whole groups read the cache once; few of them would leave threads without work
    int64_t tasks = step_.rows * layer.kv_heads;
    int64_t parts = tasks % threads_ == 0 || tasks >= 4 * threads_ ? 1 : group;
    int64_t begin = tasks * parts * thread_ / threads_;
    int64_t end = tasks * parts * (thread_ + 1) / threads_;
    for (int64_t task = begin; task < end; ++task) {
      int64_t row = task / parts / layer.kv_heads, kv_head = task / parts % layer.kv_heads;
      int64_t first = kv_head * group + task % parts * (group / parts);
      by_type(static_cast<int>(m_.cache_dtype), [&](auto zero) {
        attend<decltype(zero)>(layer, step_, row, kv_head, first, first + group / parts,
                               hall_.qkv + row * qkv_stride, hall_.attention + row * inner,
                               desk_.scores);
      });
    }
  }

  void feed(const Layer& layer, int64_t ups, int64_t middle) {
    int64_t begin, end, rows = step_.rows;
    adapt(layer.up);
    share(middle, &begin, &end);
    group_product(layer.up, in_, rows, begin, end, hall_.up, ups, desk_.strip);
    if (layer.gated)
      group_product(layer.up, in_, rows, middle + begin, middle + end, hall_.up, ups,
                    desk_.strip);
    for (int64_t b = 0; b < rows; ++b) {
      float* gate = hall_.up + b * ups;
      const float* other = gate + middle;
      if (!layer.gated) {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) gate[j] = activated(gate[j], layer.activation);
      } else if (layer.activation == kSilu) {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) gate[j] = activated(gate[j], kSilu) * other[j];
      } else {
#pragma omp simd
        for (int64_t j = begin; j < end; ++j) gate[j] = activated(gate[j], kGeluTanh) * other[j];
      }
    }
  }

  // The head over this thread's part of the vocabulary, in pieces that stay in its cache.
  void score() {
    Group head = single_head();
    adapt(head);
    int64_t begin, end, vocabulary = m_.head.rows, rows = step_.rows;
    share(vocabulary, &begin, &end);
    for (int64_t b = 0; b < rows; ++b) {
      desk_.best_value[b] = -INFINITY;
      desk_.best[b] = begin;
    }
    float scale = static_cast<float>(m_.logit_scale), cap = static_cast<float>(m_.logit_softcap);
    for (int64_t n = begin; n < end; n += 1024) {
      int64_t stop = std::min(end, n + 1024);
      group_product(head, in_, rows, n, stop, step_.logits, vocabulary, desk_.strip);
      for (int64_t b = 0; b < rows; ++b) {
        float* logits = step_.logits + b * vocabulary;
        if (scale != 1.0f)
          for (int64_t j = n; j < stop; ++j) logits[j] *= scale;
        if (cap > 0) {
#pragma omp simd
          for (int64_t j = n; j < stop; ++j) logits[j] = cap * tanh_fast(logits[j] / cap);
        }
        find_best(logits, n, stop, b);
      }
    }
    wait();
    if (thread_ == 0) {
      for (int64_t b = 0; b < rows; ++b) step_.best[b] = desk_.best[b];
    }
  }

  // The best token of one row by the sketch: first what each token can score at most, then the
  // scores of those that can win.
  void search() {
    const Sketch& sketch = *static_cast<const Sketch*>(m_.sketch);
    const Matrix& head = m_.head;
    WholeState state = {desk_.whole, 0, 0, 0};
    float* x = desk_.y;
    for (int64_t j = 0; j < head.columns; ++j) x[j] = head.half ? to_float(in_.half[j]) : in_.plain[j];
    to_whole(x, head.columns, state);
    int64_t begin, end;
    share(head.rows, &begin, &end);
    float* uppers = hall_.uppers;
    hall_.floors[thread_] = bound_scores(sketch, state, head.columns, begin, end, uppers);
    wait();
    float floor = *std::max_element(hall_.floors, hall_.floors + threads_);
    desk_.best_value[0] = -INFINITY;
    desk_.best[0] = begin;
    for (int64_t n = begin; n < end; n += 4) {
      int64_t count = std::min<int64_t>(4, end - n);
      if (!(*std::max_element(uppers + n, uppers + n + count) >= floor)) continue;
      // by fours, so that the sums are those of `score`
      float exact[4];
      product(head, in_, 0, 1, n, n + count, exact - n, 0, desk_.strip);
      for (int64_t i = 0; i < count; ++i)
        if (exact[i] > desk_.best_value[0]) {
          desk_.best_value[0] = exact[i];
          desk_.best[0] = n + i;
        }
    }
    if (thread_ == 0) step_.best[0] = desk_.best[0];
  }

  void find_best(const float* logits, int64_t begin, int64_t end, int64_t b) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (int64_t j = begin; j < end; ++j) largest = logits[j] > largest ? logits[j] : largest;
    if (!(largest > desk_.best_value[b])) return;
    int64_t at = begin;
    while (logits[at] != largest) ++at;
    desk_.best_value[b] = largest;
    desk_.best[b] = at;
  }

  const Model& m_;
  const Step& step_;
  const Hall& hall_;
  const Desk& desk_;
  int thread_, threads_;
  bool alone_;
  Input in_;
};

static void decode_step(const void* model, const void* step, int64_t longest, int threads) {
  const Model& m = *static_cast<const Model*>(model);
  const Step& s = *static_cast<const Step*>(step);
  Sizes sizes(m);
  uintptr_t start = reinterpret_cast<uintptr_t>(s.workspace);
  char* aligned = reinterpret_cast<char*>((start + 63) / 64 * 64);
  Carver carver{aligned};
  Hall hall = carve_hall(carver, m, sizes, s.rows, threads);
  hall.gate->waiting.store(0);
  hall.gate->round.store(0);
  int64_t shared = carver.used;
  Carver counter{nullptr};
  carve_desk(counter, m, sizes, s.rows, longest);
  int64_t own = counter.used;
  int given = 1;
  auto desk_of = [&](int t) {
    Carver mine{aligned + shared + own * t};
    return carve_desk(mine, m, sizes, s.rows, longest);
  };
  auto work = [&](int t, int total) {
    Desk desk = desk_of(t);
    Worker(m, s, hall, desk, t, total).run();
  };
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      given = omp_get_num_threads();
      work(omp_get_thread_num(), given);
    }
  } else {
    work(0, 1);
  }
#else
  work(0, 1);
#endif
  for (int t = 1; t < given; ++t) {
    Desk desk = desk_of(t), first = desk_of(0);
    for (int64_t b = 0; b < s.rows; ++b)
      if (desk.best_value[b] > first.best_value[b]) {
        first.best_value[b] = desk.best_value[b];
        s.best[b] = desk.best[b];
      }
  }
}

// So that a layout that differs between the two languages is noticed.
static void decode_layout(int64_t* sizes) {
  sizes[0] = sizeof(Matrix), sizes[1] = sizeof(Layer), sizes[2] = sizeof(Model);
  sizes[3] = sizeof(Step);
}

}  // namespace decode

using decode::decode_layout;
using decode::decode_step;
using decode::decode_workspace;

}  // namespace FB_NAMESPACE
