// The kernels that every instruction set offers, and how they are found by name.
#pragma once

#define FB_KERNELS(X) \
  X(rms_norm)         \
  X(rms_norm_backward) \
  X(decode_workspace) \
  X(decode_step)       \
  X(decode_layout)

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
