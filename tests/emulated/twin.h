// The host twin of csrc/cuda/primitives.cuh: every CUDA thread is a fiber, all on one system thread, so runs are
// repeatable. Accesses to memory that kernels see are made here, inline and instrumented, so that the sanitizers judge
// them; everything else is plumbing in twin*.cpp, which is compiled without sanitizers. Misuse (divergence, a barrier
// not reached by all, a copy never waited for, misaligned or out-of-range shared memory) ends the process with a
// message that names the lines.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#define THESEUS_DEVICE inline
#define THESEUS_BOTH
#define THESEUS_KERNEL(...) void
#define THESEUS_GRID_CONSTANT
#define THESEUS_UNROLL
#define THESEUS_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace theseus::cuda {
namespace twin {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};
enum class Operand { bfloat16, float16 };

// Runs body(context) as `blocks` blocks of `threads` fibers. Exits with a message on misuse.
void run(int64_t blocks, int threads, int shared_bytes, void (*body)(void*), void* context);
void* shared(int offset, int64_t bytes, int alignment);
void sync_warp(const char* file, int line);
void shuffle(void* value, int bytes, int mask, const char* file, int line);
void load_matrices(const Vector& row, uint32_t (&out)[4], const char* file, int line);
void mma(Operand operand, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line);
void check_vector(const void* address);  // aligned to 16 bytes?
void copy_issue(const Copy& copy);
bool copy_due(int pending, Copy& copy);  // takes the oldest copy out of the groups beyond the newest `pending`

}  // namespace twin

int thread_index();
int thread_count();
int block_index();
void copy_commit();
void sync_block(THESEUS_HERE);
inline void sync_warp(THESEUS_HERE) { twin::sync_warp(file, line); }

template <class T>
T* shared(int offset, int count) {
  return static_cast<T*>(twin::shared(offset, int64_t{count} * static_cast<int64_t>(sizeof(T)), alignof(T)));
}

template <class T>
T shuffle(T value, int mask, THESEUS_HERE) {
  twin::shuffle(&value, sizeof(T), mask, file, line);
  return value;
}

// volatile, word by word: the compiler may not turn these into memcpy, which it would inline past ThreadSanitizer.
inline Vector load_vector(const void* from) {
  twin::check_vector(from);
  const auto* words = static_cast<const volatile Vector*>(from)->word;
  Vector value;
  for (int i = 0; i < 4; ++i) value.word[i] = words[i];
  return value;
}

inline void store_vector(void* to, const Vector& value) {
  twin::check_vector(to);
  auto* words = static_cast<volatile Vector*>(to)->word;
  for (int i = 0; i < 4; ++i) words[i] = value.word[i];
}

inline void load_pair(const double* from, double (&pair)[2]) {
  twin::check_vector(from);
  for (int i = 0; i < 2; ++i) pair[i] = static_cast<const volatile double*>(from)[i];
}

inline void store_pair(double* to, const double (&pair)[2]) {
  twin::check_vector(to);
  for (int i = 0; i < 2; ++i) static_cast<volatile double*>(to)[i] = pair[i];
}

inline void copy_async(void* to, const void* from, int bytes) {
  store_vector(to, {{~0u, ~0u, ~0u, ~0u}});  // NaN in every type until the wait
  twin::copy_issue({to, from, bytes});
}

template <int pending>
void copy_wait() {
  twin::Copy copy;
  while (twin::copy_due(pending, copy)) {
    const auto* from = static_cast<const volatile uint8_t*>(copy.from);
    auto* to = static_cast<volatile uint8_t*>(copy.to);
    for (int i = 0; i < 16; ++i) to[i] = i < copy.bytes ? from[i] : 0;
  }
}

// Each lane reads the row it names, in its own name; the exchange is plumbing.
inline void load_matrices(const void* row, uint32_t (&out)[4], THESEUS_HERE) {
  twin::load_matrices(load_vector(row), out, file, line);
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], THESEUS_HERE);
template <>
inline void mma<bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  twin::mma(twin::Operand::bfloat16, c, a, b, file, line);
}
template <>
inline void mma<float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file, int line) {
  twin::mma(twin::Operand::float16, c, a, b, file, line);
}

inline float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(float16 value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float size = exponent == 31
                         ? (fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity())
                     : exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                                : std::ldexp(static_cast<float>(fraction), -24);
  return value.bits & 0x8000 ? -size : size;
}
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline int exponent_of(float x) { return std::ilogb(x); }
inline int exponent_of(double x) { return std::ilogb(x); }
inline float scale_by(float x, int exponent) { return std::ldexp(x, exponent); }
inline double scale_by(double x, int exponent) { return std::ldexp(x, exponent); }
inline double not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }

namespace twin {
template <class Body>
void run_body(int64_t blocks, int threads, int shared_bytes, Body body) {
  run(blocks, threads, shared_bytes, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}
}  // namespace twin

// As a small GPU of compute capability 9.0 would answer.
inline const char* ask(Fact fact, int, int& value) {
  constexpr int answers[] = {4, 99 * 1024, 9, 0};
  value = answers[static_cast<int>(fact)];
  return nullptr;
}

template <class... P, class... A>
const char* launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void*, const A&... arguments) {
  twin::run_body(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
  return nullptr;
}

}  // namespace theseus::cuda
