// What a decoding step is told about a model: structures that `fourbit.decoding.layout` mirrors.
#pragma once

namespace FB_NAMESPACE {
namespace decode {

enum Format : int64_t { kPlain = 0, kTransposed = 1, kFourBit = 2, kEightBit = 3 };

// One projection, W [rows, columns]. Weights and scales are the model's own storage.
struct Matrix {
  const void* weight;
  const void* absmax;      // four bits: a float or a code for each block; eight: a float a row
  const float* nested;     // the scale of each 256 codes; null where absmax is floats
  const float* code_map;   // the 256 values of scale codes
  const float* values;     // the 16 values of weight codes
  const float* bias;       // [rows] or null
  const void* lora_a;      // [rank, columns padded to 32]
  const void* lora_b;      // [rows, rank padded to 16]
  double offset;           // added to every scale that was a code
  double scaling;          // of the adapter
  double threshold;        // eight bits: activations that reach it are multiplied unrounded
  int64_t rows, columns;
  int64_t format, dtype;   // dtype of plain weights
  int64_t blocksize, rank;
  int64_t half;            // whether the product takes bf16 activations, and the adapter is bf16
};

// Projections of the same input, their outputs one after the other.
struct Group {
  int64_t count;
  Matrix parts[3];
};

// weight is null where there is no such norm; a bias makes it a layer norm.
struct Norm {
  const float* weight;
  const float* bias;
  double eps;
};

struct Layer {
  Group qkv, out, up, down;
  Norm before_attention, after_attention, before_mlp, after_mlp, query, key;
  const float* cos;  // [positions, rotary], or null
  const float* sin;
  void* keys;    // for each sequence [kv_heads, its capacity, head_dim]
  void* values;
  double scale, softcap, residual;
  int64_t window, heads, kv_heads, head_dim, rotary;
  int64_t gated, activation;
};

struct Model {
  const Layer* layers;
  const void* embedding;  // [vocabulary, width]
  const void* positions;  // learned, [positions, width], or null
  Norm last;
  Matrix head;
  const void* sketch;     // a Sketch of the head, or null
  double embedding_scale, logit_scale, logit_softcap;
  int64_t layer_count, width, embedding_dtype, cache_dtype;
};

// One token for each of `rows` sequences.
struct Step {
  const int64_t* tokens;
  const int64_t* places;      // position of the token
  const int64_t* starts;      // where the sequence's cache begins, in positions
  const int64_t* capacities;  // its length
  const float* states;        // [rows, width] after the last norm: only the head is to be applied
  float* logits;              // [rows, vocabulary]; null for one row with a sketch
  int64_t* best;              // the likeliest token of each row
  void* workspace;
  int64_t rows;
};

}  // namespace decode
}  // namespace FB_NAMESPACE
