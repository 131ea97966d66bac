// All kernels, compiled once for each instruction set: `isa/*.cpp` set FB_NAMESPACE and include this.
#pragma once

#include <type_traits>

#include "numbers.h"
#include "parallel.h"
#include "table.h"

namespace FB_NAMESPACE {

// How activations arrive: the codes that `fourbit.native` passes.
enum DType : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

template <class Body>
static inline void by_type(int dtype, const Body& body) {
  if (dtype == kBfloat16)
    body(bf16{0});
  else
    body(0.0f);
}

}  // namespace FB_NAMESPACE

#include "half.h"
#include "kernels/adamw.h"
#include "kernels/activation.h"
#include "kernels/dropout.h"
#include "kernels/attention_backward.h"
#include "kernels/linear.h"
#include "kernels/loss.h"
#include "kernels/low_rank.h"
#include "kernels/norm.h"
#include "kernels/rotary.h"
#include "kernels/dequantize.h"
#include "kernels/int8.h"
#include "kernels/decode.h"

namespace FB_NAMESPACE {

#define FB_ENTRY(name) {#name, reinterpret_cast<void*>(&name)},
static const fb::Entry kEntries[] = {FB_KERNELS(FB_ENTRY)};
#undef FB_ENTRY

extern const fb::Table kTable;
const fb::Table kTable = {FB_ISA, kEntries, sizeof(kEntries) / sizeof(kEntries[0])};

}  // namespace FB_NAMESPACE
