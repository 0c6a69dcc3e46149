// The twin's scheduler: runs the fibers of a block by turns. Compiled without sanitizers.
#include <sys/mman.h>

#include <memory>

#include "twin_fibers.h"

#if defined(__x86_64__)
// Saves what a call must preserve, changes the stack, and returns into the other fiber. (ucontext makes a system call
// per switch.)
extern "C" void theseus_switch(void** save, void* to);
asm(R"(
.text
.globl theseus_switch
.type theseus_switch, @function
theseus_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size theseus_switch, . - theseus_switch
)");
#elif defined(__aarch64__)
extern "C" void theseus_switch(void** save, void* to);
asm(R"(
.text
.globl theseus_switch
.type theseus_switch, %function
theseus_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size theseus_switch, . - theseus_switch
)");
#else
#error "the twin switches stacks on x86-64 and aarch64 only"
#endif

namespace theseus::cuda::twin {
namespace {

constexpr size_t kStack = 64 * 1024;  // bytes per fiber
constexpr unsigned kNoSync = 1;       // ThreadSanitizer: a switch orders nothing

void (*the_body)(void*) = nullptr;
void* the_context = nullptr;
void *main_stack_pointer = nullptr, *main_fake_stack = nullptr, *main_tsan = nullptr;
const void* main_bottom = nullptr;
size_t main_size = 0;
char launch_begin = 0, launch_end = 0;

// Stacks and ThreadSanitizer's fibers of thread t of block b, kept from launch to launch: launches follow each other,
// blocks of one launch do not, so that there no two blocks may share them. Without ThreadSanitizer all blocks use those
// of block 0.
struct Home {
  char* stacks = nullptr;
  std::vector<void*> tsan;
};
std::vector<Home> homes;

Home& home_of(int64_t index) {
  const size_t b = __tsan_create_fiber ? index : 0;
  if (homes.size() <= b) homes.resize(b + 1);
  return homes[b];
}

void to_fiber(Fiber& next) {
  fiber = &next;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&main_fake_stack, next.stack, kStack);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan, kNoSync);
  theseus_switch(&main_stack_pointer, next.stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(main_fake_stack, nullptr, nullptr);
  fiber = nullptr;
}

}  // namespace

void to_main() {
  Fiber& self = *fiber;
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(self.done ? nullptr : &self.fake_stack, main_bottom, main_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, kNoSync);
  theseus_switch(&self.stack_pointer, main_stack_pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
}

namespace {

void enter() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
  acquire(&launch_begin);
  the_body(the_context);
  if (!fiber->pending.empty()) {
    SAY("thread %d of block %lld ends with a copy under way; copy_wait<0> is missing", fiber->thread,
        (long long)block->index);
    die();
  }
  fiber->done = true;
  release(&launch_end);
  to_main();
  std::abort();
}

void prepare(Fiber& f, char* stack) {
  f.stack = stack;
  auto* top = reinterpret_cast<void**>(stack + kStack);
#if defined(__x86_64__)
  *--top = nullptr;  // the stack is 16-byte aligned before the call that never was
  *--top = reinterpret_cast<void*>(&enter);
  f.stack_pointer = top - 6;
#else
  top -= 20;
  top[11] = reinterpret_cast<void*>(&enter);  // x30
  f.stack_pointer = top;
#endif
}

bool runnable(const Fiber& f) {
  if (f.done) return false;
  if (f.waiting_warp) return block->warps[f.thread / kWarp].turn != f.turn;
  if (f.waiting_block) return block->phase != f.phase;
  return true;
}

[[noreturn]] void deadlock() {
  int ended = 0;
  for (const Fiber& f : block->fibers) ended += f.done;
  const Fiber* shown = nullptr;
  for (const Fiber& f : block->fibers) {
    if (f.done || (shown && !(f.place != shown->place))) continue;
    SAY("block %lld stands still: thread %d waits at %s:%d, %d of %d threads have ended", (long long)block->index,
        f.thread, base(f.place.file), f.place.line, ended, block->threads);
    shown = &f;
  }
  die();
}

void run_block(int64_t index) {
  Home& home = home_of(index);
  if (!home.stacks) {
    constexpr size_t kBytes = kStack * 1024;  // reserved only; a page takes memory when it is used
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) SAY("no memory for %zu bytes of stacks", kBytes), die();
    home.stacks = static_cast<char*>(memory);
  }
  for (Fiber& f : block->fibers) {
    prepare(f, home.stacks + kStack * f.thread);
    if (!__tsan_create_fiber) continue;
    while (home.tsan.size() <= static_cast<size_t>(f.thread)) home.tsan.push_back(__tsan_create_fiber(0));
    f.tsan = home.tsan[f.thread];
  }
  const int threads = block->threads;
  for (int done = 0; done < threads;) {
    bool moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& f = block->fibers[index % 2 ? threads - 1 - i : i];  // both orders occur: values may not depend on it
      if (!runnable(f)) continue;
      moved = true;
      to_fiber(f);
      done += f.done;
    }
    if (!moved) deadlock();
  }
}

}  // namespace

void run(int64_t blocks, int threads, int shared_bytes, void (*body)(void*), void* context) {
  if (threads <= 0 || threads % kWarp || threads > 1024)
    SAY("%d threads per block; a multiple of 32 up to 1024 is needed", threads), die();
  if (shared_bytes > kSharedLimit) SAY("%d bytes of shared memory; sm_120 has %d", shared_bytes, kSharedLimit), die();
  the_body = body, the_context = context;
  if (__tsan_get_current_fiber) main_tsan = __tsan_get_current_fiber();
  // All shared memory is there from the start: to give it back in between would order one block after another.
  std::vector<std::unique_ptr<Block>> grid;
  for (int64_t b = 0; b < blocks; ++b) {
    grid.push_back(std::make_unique<Block>());
    Block& made = *grid.back();
    made.index = b, made.threads = threads, made.shared_bytes = shared_bytes;
    made.fibers.resize(threads), made.warps.resize(threads / kWarp), made.warp_barrier.resize(2 * threads / kWarp);
    if (posix_memalign(&made.shared, 128, shared_bytes ? shared_bytes : 1)) SAY("no memory for shared memory"), die();
    std::memset(made.shared, 0xff, shared_bytes);  // NaN
    for (int t = 0; t < threads; ++t) made.fibers[t].thread = t;
  }
  release(&launch_begin);
  for (int64_t b = 0; b < blocks; ++b) {
    block = grid[b].get();
    run_block(b);
  }
  acquire(&launch_end);
  for (auto& made : grid) std::free(made->shared);
  block = nullptr;
}

}  // namespace theseus::cuda::twin
