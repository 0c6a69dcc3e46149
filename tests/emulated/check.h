// What the tests of the kernels share: named tests, checks that fail on NaN, buffers of exactly their size, numbers
// that repeat. The same tests run on the twin, and on a GPU where nvcc compiles them (make gpu-check).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cross_moment.h"
#include "primitives.cuh"

namespace theseus::cuda {

struct Test {
  const char* name;
  void (*function)();
  static std::vector<Test>& all() {
    static std::vector<Test> tests;
    return tests;
  }
  Test(const char* n, void (*f)()) : name(n), function(f) { all().push_back(*this); }
};

// Small: also runs in `make test` under the sanitizers. Every test runs in CI in every build.
#define TEST(name)                                             \
  static void name();                                          \
  static const ::theseus::cuda::Test test_##name(#name, name); \
  static void name()

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition, ...)                                       \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("  %s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__), std::printf("\n");                  \
      ++::theseus::cuda::failures();                                \
    }                                                               \
  } while (0)

#ifdef __CUDACC__
// Memory that the host and the GPU address alike.
inline void* take_memory(int64_t bytes) {
  void* memory = nullptr;
  return cudaMallocHost(&memory, bytes) == cudaSuccess ? memory : nullptr;
}
inline void give_memory_back(void* memory) { cudaFreeHost(memory); }
// Waits for the kernels. Returns null or what went wrong in one.
inline const char* finish() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#else
inline void* take_memory(int64_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, 64, bytes) ? nullptr : memory;
}
inline void give_memory_back(void* memory) { std::free(memory); }
inline const char* finish() { return nullptr; }
#endif

// finish(), unless the launch already failed.
inline const char* finish(const char* error) { return error ? error : finish(); }

// Launches a kernel and waits for it.
template <class... P, class... A>
void run_kernel(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, const A&... arguments) {
  const char* error = finish(launch(kernel, blocks, threads, shared_bytes, nullptr, arguments...));
  CHECK(!error, "%s", error);
}

// Exactly `count` elements on the heap, `offset` elements behind a boundary of 64 bytes: AddressSanitizer guards both
// ends.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int offset = 0)
      : count_(count), bytes_(count * static_cast<int64_t>(sizeof(T)) + offset) {
    memory_.reset(static_cast<char*>(take_memory(bytes_ ? bytes_ : 1)));
    if (!memory_) std::printf("no memory for %lld bytes\n", static_cast<long long>(bytes_)), std::exit(2);
    data_ = reinterpret_cast<T*>(memory_.get() + offset);
    for (int64_t i = 0; i < count; ++i) data_[i] = T{};
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(char* memory) const { give_memory_back(memory); }
  };
  int64_t count_, bytes_;
  std::unique_ptr<char, Free> memory_;
  T* data_;
};

// A linear congruential generator: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 88172645463325252u) {}
  uint32_t bits() {
    return static_cast<uint32_t>((state_ = state_ * 6364136223846793005u + 1442695040888963407u) >> 33);
  }
  double uniform() { return bits() / 2147483648.0; }  // [0, 1)
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(uniform() * static_cast<double>(count)); }

 private:
  uint64_t state_;
};

// Rounding to nearest of finite numbers in range; what is not tested here is how a model rounds.
inline void store(double value, double& to) { to = value; }
inline void store(double value, float& to) { to = static_cast<float>(value); }
inline void store(double value, bfloat16& to) {
  to.bits = static_cast<uint16_t>((bits_of(static_cast<float>(value)) + 0x8000) >> 16);
}
inline void store(double value, float16& to) {
  const double size = std::fabs(value);
  uint32_t bits = 0;
  if (size >= 0x1p-14) {
    const int exponent = std::ilogb(size);
    bits = static_cast<uint32_t>(exponent + 14) * 1024 +
           static_cast<uint32_t>(std::lround(std::ldexp(size, 10 - exponent)));
  } else {
    bits = static_cast<uint32_t>(std::lround(std::ldexp(size, 24)));
  }
  to.bits = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
}
inline double number(double value) { return value; }
template <class T>
double number(T value) {
  return to_float(value);
}

template <class T>
constexpr Dtype kDtype = Dtype::float32;
template <>
inline constexpr Dtype kDtype<double> = Dtype::float64;
template <>
inline constexpr Dtype kDtype<bfloat16> = Dtype::bfloat16;
template <>
inline constexpr Dtype kDtype<float16> = Dtype::float16;

// |result - exact| / |exact| over `count` numbers; NaN where any is.
template <class T>
double relative_error(const T* result, const double* exact, int64_t count) {
  double difference = 0, size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double d = number(result[i]) - exact[i];
    difference += d * d;
    size += exact[i] * exact[i];
  }
  return std::sqrt(difference) / (size > 0 ? std::sqrt(size) : 1);
}

// main: no argument runs all, --list prints the names, else the tests named. Exit code 1 if any failed.
inline int run_tests(int argc, char** argv) {
  if (argc == 2 && !std::strcmp(argv[1], "--list")) {
    for (const Test& test : Test::all()) std::printf("%s\n", test.name);
    return 0;
  }
  int ran = 0;
  for (const Test& test : Test::all()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted |= !std::strcmp(argv[i], test.name);
    if (!wanted) continue;
    ++ran;
    const int before = failures();
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.function();
    if (failures() > before) std::printf("  FAILED %s\n", test.name);
  }
  if (ran == 0 || (argc > 1 && ran < argc - 1)) return std::printf("no such test; --list names them\n"), 2;
  std::printf("%d tests, %d failed checks\n", ran, failures());
  return failures() ? 1 : 0;
}

}  // namespace theseus::cuda

#define TEST_MAIN \
  int main(int argc, char** argv) { return theseus::cuda::run_tests(argc, argv); }
