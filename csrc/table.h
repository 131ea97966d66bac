// The kernels that every instruction set offers, and how they are found by name.
#pragma once

#define FB_KERNELS(X)   \
  X(cross_entropy_rows) \
  X(rms_norm)           \
  X(rms_norm_backward)

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
