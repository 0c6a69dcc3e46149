// Inside the twin: fibers, blocks, and the sanitizers' fiber hooks. Included by its plumbing only.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <vector>

#include "primitives.cuh"

// Present in an AddressSanitizer or ThreadSanitizer build, null elsewhere.
extern "C" {
#define WEAK __attribute__((weak))
WEAK void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* address);
WEAK void __tsan_release(void* address);
}

namespace theseus::cuda::twin {

inline constexpr int kSharedLimit = 99 * 1024;  // bytes a block may ask for on the smallest of our GPUs (sm_120)

struct Place {
  const char* file = nullptr;
  int line = 0;
};
inline bool operator!=(const Place& a, const Place& b) { return a.line != b.line || std::strcmp(a.file, b.file) != 0; }

struct Slot {
  uint32_t word[12];
};  // the most a lane deposits: its part of a and b of mma

struct Warp {
  Slot slots[2][kWarp];  // by turn: a lane may already write its next one while others still read this one
  int arrived = 0, turn = 0;
  Place place;
};

struct Pending {
  Copy copy;
  int group;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;  // ThreadSanitizer's name for this fiber
  int thread = 0;
  bool done = false, waiting_warp = false, waiting_block = false;
  int turn = 0, phase = 0;  // what the wait is for: the warp's turn or the block's phase to pass this
  Place place;
  std::deque<Pending> pending;
  int groups = 0;  // committed
};

struct Block {
  int64_t index = 0;
  int threads = 0, shared_bytes = 0;
  void* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int arrived = 0, phase = 0;
  Place place;
  char barrier[2] = {};  // addresses that ThreadSanitizer orders by, used by turns
  std::vector<char> warp_barrier;
};

inline Block* block = nullptr;  // what runs now
inline Fiber* fiber = nullptr;

#define SAY(...) \
  (std::fprintf(stderr, "emulated kernel: "), std::fprintf(stderr, __VA_ARGS__), std::fprintf(stderr, "\n"))
[[noreturn]] inline void die() { std::fflush(nullptr), std::_Exit(3); }

inline const char* base(const char* file) {
  const char* slash = std::strrchr(file, '/');
  return slash ? slash + 1 : file;
}

inline void acquire(void* address) {
  if (__tsan_acquire) __tsan_acquire(address);
}
inline void release(void* address) {
  if (__tsan_release) __tsan_release(address);
}

void to_main();  // lets others run until somebody comes back to this fiber

}  // namespace theseus::cuda::twin
