// One new position's attention for one sequence: its key and value are added to the cache.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

static inline float activated(float x, int64_t activation) {
  return x * (activation == kSilu ? gate_of<kSilu>(x) : gate_of<kGeluTanh>(x));
}

// y = x / rms(x) * weight, or a layer norm.
static inline void normalize(const Norm& norm, const float* x, float* y, int64_t width) {
  float mean = 0, square = 0;
  if (norm.bias != nullptr) {
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < width; ++j) mean += x[j];
    mean /= static_cast<float>(width);
  }
#pragma omp simd reduction(+ : square)
  for (int64_t j = 0; j < width; ++j) square += (x[j] - mean) * (x[j] - mean);
  float scale =
      1.0f / std::sqrt(square / static_cast<float>(width) + static_cast<float>(norm.eps));
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) y[j] = (x[j] - mean) * scale * norm.weight[j];
  if (norm.bias == nullptr) return;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) y[j] += norm.bias[j];
}

// Head norm and rotation of one head's query or key.
static inline void turn_head(const Layer& layer, const Norm& norm, const float* in, float* out,
                             int64_t place) {
  int64_t width = layer.head_dim, half = layer.rotary / 2;
  if (norm.weight != nullptr)
    normalize(norm, in, out, width);
  else
    std::memcpy(out, in, width * 4);
  if (layer.cos == nullptr) return;
  const float* cos = layer.cos + place * layer.rotary;
  const float* sin = layer.sin + place * layer.rotary;
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    float a = out[j], b = out[j + half];
    out[j] = a * cos[j] - b * sin[j];
    out[j + half] = b * cos[j + half] + a * sin[j + half];
  }
}

template <class T>
static inline float dot_key(const float* query, const T* key, int64_t width) {
  Lanes acc = lanes_all(0);
  int64_t j = 0;
  for (; j + Lanes::kWidth <= width; j += Lanes::kWidth)
    acc = lanes_fma(lanes_load(query + j), lanes_load(key + j), acc);
  float sum = lanes_sum(acc);
  for (; j < width; ++j) sum += query[j] * to_float(key[j]);
  return sum;
}

// scores[p] = query . keys[p]
template <class T>
static inline void score_keys(const float* query, const T* keys, int64_t count, int64_t width,
                              float* scores) {
  int64_t p = 0, even = width / Lanes::kWidth * Lanes::kWidth;
  for (; p + 4 <= count; p += 4) {
    const T* key = keys + p * width;
    Lanes acc[4] = {lanes_all(0), lanes_all(0), lanes_all(0), lanes_all(0)};
    for (int64_t j = 0; j < even; j += Lanes::kWidth) {
      Lanes q = lanes_load(query + j);
      for (int i = 0; i < 4; ++i) acc[i] = lanes_fma(q, lanes_load(key + i * width + j), acc[i]);
    }
    lanes_sum4(acc[0], acc[1], acc[2], acc[3], scores + p);
    for (int i = 0; i < 4; ++i)
      for (int64_t j = even; j < width; ++j)
        scores[p + i] += query[j] * to_float(key[i * width + j]);
  }
  for (; p < count; ++p) scores[p] = dot_key(query, keys + p * width, width);
}

// out += weights . values, over `count` positions; several registers of the output at once.
template <class T>
static inline void mix_values(const float* weights, const T* values, int64_t count,
                              int64_t width, float* out) {
  constexpr int kAtOnce = 4;
  int64_t j = 0;
  auto columns = [&](auto registers) {
    constexpr int R = decltype(registers)::value;
    for (; j + R * Lanes::kWidth <= width; j += R * Lanes::kWidth) {
      Lanes acc[R];
      for (int i = 0; i < R; ++i) acc[i] = lanes_load(out + j + i * Lanes::kWidth);
      for (int64_t p = 0; p < count; ++p) {
        Lanes weight = lanes_all(weights[p]);
        for (int i = 0; i < R; ++i)
          acc[i] = lanes_fma(weight, lanes_load(values + p * width + j + i * Lanes::kWidth),
                             acc[i]);
      }
      for (int i = 0; i < R; ++i) lanes_store(out + j + i * Lanes::kWidth, acc[i]);
    }
  };
  columns(std::integral_constant<int, kAtOnce>{});
  columns(std::integral_constant<int, 1>{});
  for (; j < width; ++j)
    for (int64_t p = 0; p < count; ++p) out[j] += weights[p] * to_float(values[p * width + j]);
}

// scores to probabilities.
static inline void softmax(float* scores, int64_t count, float softcap) {
  if (softcap > 0) {
#pragma omp simd
    for (int64_t p = 0; p < count; ++p) scores[p] = softcap * tanh_fast(scores[p] / softcap);
  }
  float largest = scores[0], sum = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t p = 0; p < count; ++p) largest = scores[p] > largest ? scores[p] : largest;
#pragma omp simd reduction(+ : sum)
  for (int64_t p = 0; p < count; ++p) {
    scores[p] = exp_fast(scores[p] - largest);
    sum += scores[p];
  }
  float scale = 1.0f / sum;
#pragma omp simd
  for (int64_t p = 0; p < count; ++p) scores[p] *= scale;
}

// Query heads [first, last) of one key-value head. Every caller of that head turns the new key
// itself, so that nobody waits for the cache; the caller of its first head writes it there.
// `scratch` holds 3 heads and the capacity of the sequence in floats.
template <class T>
static inline void attend(const Layer& layer, const Step& step, int64_t row, int64_t kv_head,
                          int64_t first, int64_t last, const float* qkv, float* out,
                          float* scratch) {
  int64_t width = layer.head_dim, place = step.places[row], capacity = step.capacities[row];
  int64_t offset = (step.starts[row] * layer.kv_heads + kv_head * capacity) * width;
  T* keys = static_cast<T*>(layer.keys) + offset;
  T* values = static_cast<T*>(layer.values) + offset;
  float *turned = scratch, *query = scratch + width, *scores = scratch + 3 * width;
  T* key = reinterpret_cast<T*>(scratch + 2 * width);
  const float* new_key = qkv + (layer.heads + kv_head) * width;
  const float* new_value = new_key + layer.kv_heads * width;
  turn_head(layer, layer.key, new_key, turned, place);
  for (int64_t j = 0; j < width; ++j) key[j] = from_float<T>(turned[j]);
  int64_t begin = layer.window > 0 ? std::max<int64_t>(0, place + 1 - layer.window) : 0;
  int64_t count = place - begin;
  for (int64_t head = first; head < last; ++head) {
    turn_head(layer, layer.query, qkv + head * width, query, place);
    for (int64_t j = 0; j < width; ++j) query[j] *= static_cast<float>(layer.scale);
    score_keys(query, keys + begin * width, count, width, scores);
    scores[count] = dot_key(query, key, width);
    softmax(scores, count + 1, static_cast<float>(layer.softcap));
    float* to = out + head * width;
    for (int64_t j = 0; j < width; ++j)
      to[j] = scores[count] * to_float(from_float<T>(new_value[j]));
    mix_values(scores, values + begin * width, count, width, to);
  }
  if (first != kv_head * (layer.heads / layer.kv_heads)) return;
  for (int64_t j = 0; j < width; ++j) {
    keys[place * width + j] = key[j];
    values[place * width + j] = from_float<T>(new_value[j]);
  }
}

}  // namespace decode
}  // namespace FB_NAMESPACE
