// The kernels that every instruction set offers, and how they are found by name.
#pragma once

#define FB_KERNELS(X) \
  X(rms_norm)         \
  X(rms_norm_backward) \
  X(quantize_4bit) \
  X(dequantize_4bit) \
  X(quantize_absmax) \
  X(quantize_int8) \
  X(dequantize_int8) \
  X(quantize_activations) \
  X(finish_int8) \
  X(count_nonfinite)

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
