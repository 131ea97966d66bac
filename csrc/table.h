// The kernels that every instruction set offers, and how they are found by name.
#pragma once

#define FB_KERNELS(X)        \
  X(activate)                \
  X(activate_backward)       \
  X(adamw_32bit)             \
  X(adamw_8bit)              \
  X(attention_backward)      \
  X(attention_forward)       \
  X(attention_scratch)       \
  X(count_nonfinite)         \
  X(cross_entropy_rows)      \
  X(decode_layout)           \
  X(decode_step)             \
  X(decode_workspace)        \
  X(dequantize_4bit)         \
  X(dequantize_int8)         \
  X(dropout)                 \
  X(finish_int8)             \
  X(layer_norm)              \
  X(layer_norm_backward)     \
  X(linear_product)          \
  X(linear_room)             \
  X(low_rank_gradient)       \
  X(low_rank_gradient_room)  \
  X(low_rank_reduce)         \
  X(low_rank_reduce_room)    \
  X(quantize_4bit)           \
  X(quantize_absmax)         \
  X(quantize_activations)    \
  X(quantize_int8)           \
  X(rms_norm)                \
  X(rms_norm_backward)       \
  X(rotate)

namespace fb {

struct Entry {
  const char* name;
  void* function;
};

struct Table {
  const char* isa;
  const Entry* entries;
  int count;
};

}  // namespace fb
