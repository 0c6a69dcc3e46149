// The twin's primitives: barriers, exchanges within a warp, pending copies. Compiled without sanitizers.
#include <cmath>

#include "twin_fibers.h"

namespace theseus::cuda {
namespace twin {
namespace {

// Not memcpy: ThreadSanitizer listens in on that.
void move(volatile uint32_t* to, const volatile uint32_t* from, int bytes) {
  for (int i = 0; i < bytes / 4; ++i) to[i] = from[i];
}

// All lanes deposit `bytes`, a multiple of 4, and meet; returns the slots of all, which stay until the caller's next
// exchange.
const Slot* exchange(const void* mine, int bytes, const char* file, int line) {
  Warp& warp = block->warps[fiber->thread / kWarp];
  const int turn = warp.turn, lane = fiber->thread % kWarp;
  fiber->place = {file, line};
  if (warp.arrived == 0) warp.place = fiber->place;
  if (warp.place != fiber->place) {
    SAY("divergent warp: thread %d of block %lld is at %s:%d, others at %s:%d", fiber->thread, (long long)block->index,
        base(file), line, base(warp.place.file), warp.place.line);
    die();
  }
  move(warp.slots[turn & 1][lane].word, static_cast<const uint32_t*>(mine), bytes);
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.turn;
  } else {
    fiber->turn = turn;
    fiber->waiting_warp = true;
    to_main();
    fiber->waiting_warp = false;
  }
  return warp.slots[turn & 1];
}

float widen(Operand operand, uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(half ? pair >> 16 : pair);
  return operand == Operand::bfloat16 ? to_float(bfloat16{bits}) : to_float(float16{bits});
}

// value rounded toward zero to float32.
float truncate(double value) {
  const auto near = static_cast<float>(value);
  return std::isfinite(near) && std::fabs(near) > std::fabs(value) ? std::nextafter(near, 0.f) : near;
}

// c + the sum of `count` exact products, as tensor cores add: all addends at once, cut (not rounded) to one bit more
// than float32 has of the largest, and the sum cut to float32. Measured, not documented: on the A100 by Fasi, Higham,
// Mikaitis and Pranesh 2021, on later ones by Khattak and Mikaitis 2025, who find a bit more and 16 products at a time
// instead of 8. The twin does the worst of it. Inf and NaN come through.
float add_products(float c, const double* product, int count) {
  double largest = std::fabs(c), plain = c;
  for (int k = 0; k < count; ++k) largest = std::fmax(largest, std::fabs(product[k])), plain += product[k];
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const double unit = std::ldexp(1, std::ilogb(largest) - 24), scale = 1 / unit;
  auto sum = static_cast<int64_t>(c * scale);
  for (int k = 0; k < count; ++k) sum += static_cast<int64_t>(product[k] * scale);
  return truncate(static_cast<double>(sum) * unit);
}

}  // namespace

void* shared(int offset, int64_t bytes, int alignment) {
  if (offset < 0 || offset + bytes > block->shared_bytes)
    SAY("shared memory [%d, %lld) asked for, the launch gave %d bytes", offset, (long long)(offset + bytes),
        block->shared_bytes),
        die();
  if (offset % alignment) SAY("shared memory at %d is not aligned to %d", offset, alignment), die();
  return static_cast<char*>(block->shared) + offset;
}

void check_vector(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(Vector))
    SAY("a 16-byte access at %p, which is not aligned", address), die();
}

void sync_warp(const char* file, int line) {
  const int warp = fiber->thread / kWarp;
  char* order = &block->warp_barrier[2 * warp + (block->warps[warp].turn & 1)];
  release(order);
  exchange(nullptr, 0, file, line);
  acquire(order);
}

void shuffle(void* value, int bytes, int mask, const char* file, int line) {
  const Slot* slots = exchange(value, bytes, file, line);
  move(static_cast<uint32_t*>(value), slots[(fiber->thread % kWarp) ^ mask].word, bytes);
}

void load_matrices(const Vector& row, uint32_t (&out)[4], const char* file, int line) {
  const Slot* slots = exchange(&row, sizeof(row), file, line);
  const int lane = fiber->thread % kWarp, column = lane / 4, first = 2 * (lane % 4);
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t element[2];
    for (int i = 0; i < 2; ++i)
      element[i] = slots[8 * matrix + first + i].word[column / 2] >> 16 * (column % 2) & 0xffff;
    out[matrix] = element[0] | element[1] << 16;
  }
}

void mma(Operand operand, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  uint32_t mine[12];  // a then b, widened
  for (int i = 0; i < 8; ++i) mine[i] = bits_of(widen(operand, a[i / 2], i % 2));
  for (int i = 0; i < 4; ++i) mine[8 + i] = bits_of(widen(operand, b[i / 2], i % 2));
  const Slot* slots = exchange(mine, sizeof(mine), file, line);
  const int lane = fiber->thread % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, upper = i / 2, column = 2 * (lane % 4) + i % 2;
    for (int far = 0; far < 2; ++far) {  // of the 16 products, eight at a time
      double product[8];
      for (int k = 0; k < 8; ++k) {
        const int quad = k / 2, half = k % 2;
        const float x = float_of(slots[4 * row + quad].word[2 * (2 * far + upper) + half]);
        product[k] = static_cast<double>(x) * float_of(slots[4 * column + quad].word[8 + 2 * far + half]);
      }
      c[i] = add_products(c[i], product, 8);
    }
  }
}

void copy_issue(const Copy& copy) {
  const auto to = static_cast<char*>(copy.to), first = static_cast<char*>(block->shared);
  if (copy.bytes < 0 || copy.bytes > 16)
    SAY("an asynchronous copy of %d bytes; 0 to 16 are possible", copy.bytes), die();
  if (to < first || to + 16 > first + block->shared_bytes)
    SAY("an asynchronous copy to outside of shared memory"), die();
  if (copy.bytes) check_vector(copy.from);
  fiber->pending.push_back({copy, fiber->groups});
}

bool copy_due(int pending, Copy& copy) {
  if (fiber->pending.empty() || fiber->pending.front().group >= fiber->groups - pending) return false;
  copy = fiber->pending.front().copy;
  fiber->pending.pop_front();
  return true;
}

}  // namespace twin

int thread_index() { return twin::fiber->thread; }
int thread_count() { return twin::block->threads; }
int block_index() { return static_cast<int>(twin::block->index); }
void copy_commit() { ++twin::fiber->groups; }

void sync_block(const char* file, int line) {
  using namespace twin;
  fiber->place = {file, line};
  if (block->arrived == 0) block->place = fiber->place;
  if (block->place != fiber->place) {
    SAY("threads of block %lld meet at different barriers: %s:%d and %s:%d", (long long)block->index,
        base(block->place.file), block->place.line, base(file), line);
    die();
  }
  char* order = &block->barrier[block->phase & 1];
  release(order);
  if (++block->arrived == block->threads) {
    block->arrived = 0;
    ++block->phase;
  } else {
    fiber->phase = block->phase;
    fiber->waiting_block = true;
    to_main();
    fiber->waiting_block = false;
  }
  acquire(order);
}

}  // namespace theseus::cuda
