// Large aligned memory, in which freed room is used again: preloaded into a training process.
//
// torch asks glibc for 64-byte aligned blocks. glibc cuts each out of a larger piece and gives small
// objects what is left at both ends, so that a freed block's room is short by a few bytes for
// the next block of the same size: a step then grows to up to twice what is alive in it, several
// times with recomputation. Here blocks lie in one stretch of addresses, best fit, neighbours
// joined, and pages stay until `fb_arena_trim` gives them back. Small and other memory is glibc's.

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
void* __libc_realloc(void*, size_t);
void __libc_free(void*);
}

namespace {

constexpr size_t kSmallest = 128 << 10;  // below this, glibc's waste is small as well
constexpr size_t kGrain = 64;
constexpr size_t kGrowth = 16 << 20;

// What the standard containers below allocate is small, and comes from glibc.
struct Arena {
  char* base = nullptr;
  size_t reserved = 0;
  size_t usable = 0;   // bytes from `base` on that may be touched
  size_t top = 0;      // bytes from `base` on that hold blocks or holes between them
  size_t live = 0;
  size_t high = 0;     // the highest `top` since `fb_arena_trim`
  std::map<size_t, size_t> taken;                // start -> bytes
  std::map<size_t, size_t> holes;                // start -> bytes
  std::set<std::pair<size_t, size_t>> by_size;   // (bytes, start) of the holes

  bool reserve() {
    rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return false;
    const auto pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES));
    reserved = 4 * pages * static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    void* found = mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
    if (found == MAP_FAILED) return false;
    base = static_cast<char*>(found);
    return true;
  }

  void add_hole(size_t start, size_t bytes) {
    auto next = holes.lower_bound(start);
    if (next != holes.end() && next->first == start + bytes) {
      bytes += next->second;
      by_size.erase({next->second, next->first});
      next = holes.erase(next);
    }
    if (next != holes.begin()) {
      auto before = std::prev(next);
      if (before->first + before->second == start) {
        start = before->first;
        bytes += before->second;
        by_size.erase({before->second, before->first});
        holes.erase(before);
      }
    }
    if (start + bytes == top) {
      top = start;
      return;
    }
    holes.emplace(start, bytes);
    by_size.emplace(bytes, start);
  }

  void* take(size_t bytes) {
    // blocks that are a whole number of pages would all begin at the same place of a cache set
    const size_t need = (bytes + kGrain - 1) / kGrain * kGrain + 3 * kGrain;
    auto fit = by_size.lower_bound({need, 0});
    size_t start;
    if (fit != by_size.end()) {
      start = fit->second;
      const size_t rest = fit->first - need;
      by_size.erase(fit);
      holes.erase(start);
      if (rest) {
        holes.emplace(start + need, rest);
        by_size.emplace(rest, start + need);
      }
    } else {
      start = top;
      if (start + need > usable) {
        const size_t wanted = (start + need - usable + kGrowth - 1) / kGrowth * kGrowth;
        if (usable + wanted > reserved ||
            mprotect(base + usable, wanted, PROT_READ | PROT_WRITE) != 0)
          return nullptr;
        usable += wanted;
      }
      top = start + need;
      high = std::max(high, top);
    }
    taken.emplace(start, need);
    live += need;
    return base + start;
  }

  void give(size_t start) {
    auto found = taken.find(start);
    if (found == taken.end()) abort();  // as glibc does: freed twice, or never allocated
    const size_t bytes = found->second;
    taken.erase(found);
    live -= bytes;
    add_hole(start, bytes);
  }

  void trim() {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGE_SIZE));
    auto drop = [&](size_t start, size_t end) {
      start = (start + page - 1) / page * page;
      end = end / page * page;
      if (end > start) madvise(base + start, end - start, MADV_DONTNEED);
    };
    for (const auto& hole : holes) drop(hole.first, hole.first + hole.second);
    drop(top, high);
    high = top;
  }
};

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
Arena* arena = nullptr;
int state = 0;  // 0: not asked for yet, 1: there, -1: cannot be

struct Locked {
  Locked() { pthread_mutex_lock(&lock); }
  ~Locked() { pthread_mutex_unlock(&lock); }
};

Arena* ready() {
  if (state == 0) {
    alignas(Arena) static char room[sizeof(Arena)];
    auto* made = new (room) Arena;
    state = made->reserve() ? 1 : -1;
    if (state == 1) {
      __atomic_store_n(&arena, made, __ATOMIC_RELEASE);
      pthread_atfork([] { pthread_mutex_lock(&lock); }, [] { pthread_mutex_unlock(&lock); },
                     [] { pthread_mutex_unlock(&lock); });
    }
  }
  return state == 1 ? arena : nullptr;
}

bool ours(const void* pointer) {
  const Arena* a = __atomic_load_n(&arena, __ATOMIC_ACQUIRE);
  const char* p = static_cast<const char*>(pointer);
  return a != nullptr && p >= a->base && p < a->base + a->reserved;
}

size_t room_of(const void* pointer) {
  Locked locked;
  auto found = arena->taken.find(static_cast<size_t>(static_cast<const char*>(pointer) -
                                                     arena->base));
  return found == arena->taken.end() ? 0 : found->second;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int posix_memalign(void** result, size_t alignment,
                                                          size_t bytes) {
  if (alignment % sizeof(void*) != 0 || (alignment & (alignment - 1)) != 0 || alignment == 0)
    return EINVAL;
  if (bytes >= kSmallest && alignment <= kGrain && bytes < (SIZE_MAX >> 1)) {
    Locked locked;
    Arena* a = ready();
    if (a != nullptr) {
      void* found = a->take(bytes);
      if (found != nullptr) {
        *result = found;
        return 0;
      }
    }
  }
  const int before = errno;
  void* found = __libc_memalign(alignment, bytes);
  errno = before;
  if (found == nullptr) return ENOMEM;
  *result = found;
  return 0;
}

__attribute__((visibility("default"))) void free(void* pointer) {
  if (!ours(pointer)) {
    __libc_free(pointer);
    return;
  }
  Locked locked;
  arena->give(static_cast<size_t>(static_cast<char*>(pointer) - arena->base));
}

__attribute__((visibility("default"))) void* realloc(void* pointer, size_t bytes) {
  if (!ours(pointer)) return __libc_realloc(pointer, bytes);
  if (bytes == 0) {
    free(pointer);
    return nullptr;
  }
  void* moved = __libc_malloc(bytes);
  if (moved != nullptr) {
    memcpy(moved, pointer, std::min(bytes, room_of(pointer)));
    free(pointer);
  }
  return moved;
}

// Bytes that are alive in the arena; -1 where it is not in use.
__attribute__((visibility("default"))) int64_t fb_arena_live() {
  Locked locked;
  return ready() == nullptr ? -1 : static_cast<int64_t>(arena->live);
}

// Gives the pages of free room back to the system.
__attribute__((visibility("default"))) void fb_arena_trim() {
  Locked locked;
  if (arena != nullptr) arena->trim();
}
}
