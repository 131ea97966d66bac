// The library's whole C ABI: which instruction sets it can serve here, and its kernels by name.
#include <cstring>

#include "source_hash.h"  // made by the build
#include "table.h"

namespace fb_scalar {
extern const fb::Table kTable;
}
#ifdef FB_WITH_AVX2
namespace fb_avx2 {
extern const fb::Table kTable;
}
#endif
#ifdef FB_WITH_AVX512
namespace fb_avx512 {
extern const fb::Table kTable;
}
#endif
#ifdef FB_WITH_AVX512_BF16
namespace fb_avx512_bf16 {
extern const fb::Table kTable;
}
#endif
#ifdef FB_WITH_NEON
namespace fb_neon {
extern const fb::Table kTable;
}
#endif

namespace {

struct Choice {
  const fb::Table* table;
  bool (*supported)();
};

bool always() { return true; }

[[maybe_unused]] bool has_avx2() {
#ifdef FB_WITH_AVX2
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

[[maybe_unused]] bool has_avx512() {
#ifdef FB_WITH_AVX512
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

[[maybe_unused]] bool has_avx512_bf16() {
#ifdef FB_WITH_AVX512_BF16
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Weakest first.
const Choice* choices(int* count) {
  static const Choice all[] = {
      {&fb_scalar::kTable, always},
#ifdef FB_WITH_NEON
      {&fb_neon::kTable, always},
#endif
#ifdef FB_WITH_AVX2
      {&fb_avx2::kTable, has_avx2},
#endif
#ifdef FB_WITH_AVX512
      {&fb_avx512::kTable, has_avx512},
#endif
#ifdef FB_WITH_AVX512_BF16
      {&fb_avx512_bf16::kTable, has_avx512_bf16},
#endif
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

extern "C" {

#define FB_EXPORT __attribute__((visibility("default")))

// Name of the i-th instruction set this CPU can run, weakest first; null past the last.
FB_EXPORT const char* fb_isa(int index) {
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i)
    if (all[i].supported() && index-- == 0) return all[i].table->isa;
  return nullptr;
}

// The kernel `name` made for `isa`; null when there is none.
FB_EXPORT void* fb_kernel(const char* isa, const char* name) {
  int count;
  const Choice* all = choices(&count);
  for (int i = 0; i < count; ++i) {
    if (!all[i].supported() || std::strcmp(all[i].table->isa, isa) != 0) continue;
    for (int k = 0; k < all[i].table->count; ++k)
      if (std::strcmp(all[i].table->entries[k].name, name) == 0)
        return all[i].table->entries[k].function;
  }
  return nullptr;
}

// Counts up whenever a kernel's arguments change: a library of another build is not used.
FB_EXPORT int fb_abi() { return 1; }

// Which sources it was made of, as source_hash.cmake counts them.
FB_EXPORT const char* fb_source() { return FB_SOURCE_HASH; }

}  // extern "C"
