// Every primitive, on a GPU or on its twin, against what its comment in primitives.cuh says; and what the twin says to
// misuse.
#ifndef __CUDACC__
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#endif

#include "check.h"
#include "primitive_kernels.cuh"

namespace theseus::cuda {
namespace {

TEST(shared_memory_and_sync_block) {
  constexpr int n = kRotateThreads;
  Buffer<int> out(3 * n);
  run_kernel(rotate_kernel, 3, n, 16 + n * 4, out.data());
  for (int i = 0; i < 3 * n; ++i) {
    const int block = i / n, from = (i % n + n - 1) % n;
    CHECK(out[i] == block * n + n - 1 - from, "out[%d] is %d", i, out[i]);
  }
}

template <class T>
void check_shuffle() {
  Buffer<T> in(64), out(64), far(64);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<T>(i * i + 0.5);
  run_kernel(shuffle_kernel<T>, 1, 64, 0, in.data(), out.data(), far.data());
  for (int i = 0; i < 64; ++i) {
    T sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += in[i / 32 * 32 + lane];
    CHECK(out[i] == sum, "the sum at %d is %f, not %f", i, double(out[i]), double(sum));
    CHECK(far[i] == in[i ^ 5], "the value of lane %d ^ 5 came as %f", i, double(far[i]));
  }
}
TEST(shuffles) { check_shuffle<float>(), check_shuffle<double>(), check_shuffle<int>(); }

TEST(sync_warp_orders_memory) {
  Buffer<int> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = 7 * i;
  run_kernel(sync_warp_kernel, 1, 64, 256, in.data(), out.data());
  for (int i = 0; i < 64; ++i) CHECK(out[i] == in[i ^ 1], "out[%d] is %d", i, out[i]);
}

TEST(matrices_are_transposed) {
  Buffer<uint16_t> in(32 * 8);
  Buffer<uint32_t> out(32 * 4);
  for (int i = 0; i < 32 * 8; ++i) in[i] = static_cast<uint16_t>(1000 + i);
  run_kernel(load_matrices_kernel, 1, 32, 512, in.data(), out.data());
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int half = 0; half < 2; ++half) {
        const unsigned expected = 1000 + 64 * matrix + 8 * (2 * (lane % 4) + half) + lane / 4;
        const unsigned found = out[4 * lane + matrix] >> 16 * half & 0xffff;
        CHECK(found == expected, "lane %d, matrix %d, half %d holds %u, not %u", lane, matrix, half, found, expected);
      }
}

template <class T>
void check_mma() {
  Random random(3);
  Buffer<T> a(16 * 16), b(16 * 8);
  Buffer<float> c(16 * 8);
  std::vector<double> exact(16 * 8);
  for (int i = 0; i < a.size(); ++i) store(random.normal(), a[i]);
  for (int i = 0; i < b.size(); ++i) store(random.normal(), b[i]);
  for (int i = 0; i < c.size(); ++i) {
    c[i] = static_cast<float>(exact[i] = random.bits() % 100);
    for (int k = 0; k < 16; ++k) exact[i] += number(a[i / 8 * 16 + k]) * number(b[k * 8 + i % 8]);
  }
  run_kernel(mma_kernel<T>, 1, 32, 0, a.data(), b.data(), c.data());
  const double error = relative_error(c.data(), exact.data(), c.size());
  CHECK(error <= 0x1p-22, "off by %.2e: 17 terms added in float32", error);
}
// What primitives.cuh says of rounding: (1 + 2^-23) + 1.5 2^-24 is nearer to 1 + 2^-22, and comes as 1 + 2^-23; so does
// what is negative.
template <class T>
void check_truncation() {
  Buffer<T> a(16 * 16), b(16 * 8);
  Buffer<float> c(16 * 8);
  for (int row = 0; row < 16; ++row) store(row % 2 ? -1.5 : 1.5, a[row * 16 + row]);
  for (int i = 0; i < b.size(); ++i) store(0x1p-24, b[i]);
  const auto before = [](int i) { return i / 8 % 2 ? -1 - 0x1p-23f : 1 + 0x1p-23f; };
  for (int i = 0; i < c.size(); ++i) c[i] = before(i);
  run_kernel(mma_kernel<T>, 1, 32, 0, a.data(), b.data(), c.data());
  for (int i = 0; i < c.size(); ++i) CHECK(c[i] == before(i), "c[%d] grew by %.2e", i, double(c[i]) - before(i));
}
TEST(mma_cuts_toward_zero) { check_truncation<bfloat16>(), check_truncation<float16>(); }

TEST(mma_bfloat16) { check_mma<bfloat16>(); }
TEST(mma_float16) { check_mma<float16>(); }

TEST(wide_accesses) {
  Buffer<uint32_t> words(128, 16), words_out(128);
  Buffer<double> pairs(64, 16), pairs_out(64);
  for (int i = 0; i < 128; ++i) words[i] = 3000 + i;
  for (int i = 0; i < 64; ++i) pairs[i] = i + 0.25;
  run_kernel(wide_access_kernel, 1, 32, 0, words.data(), words_out.data(), pairs.data(), pairs_out.data());
  for (int i = 0; i < 128; ++i) CHECK(words_out[i] == words[i ^ 1], "word %d is %u", i, words_out[i]);
  for (int i = 0; i < 64; ++i) CHECK(pairs_out[i] == pairs[i ^ 1], "number %d is %f", i, pairs_out[i]);
}

TEST(copies) {
  for (const int last : {0, 1, 8, 15, 16})
    for (const int stages : {1, 2, 3, 7}) {
      const int vectors = stages * 32;
      Buffer<unsigned char> in(16 * vectors - 16 + last);
      Buffer<Vector> out(vectors);
      for (int i = 0; i < in.size(); ++i) in[i] = static_cast<unsigned char>(i * 7 + i / 256);
      run_kernel(copy_kernel, 1, 32, kCopyShared, in.data(), stages, last, out.data());
      for (int i = 0; i < 16 * vectors; ++i) {
        const int from = (i / 16 ^ 7) * 16 + i % 16;
        const int expected = from < in.size() ? in[from] : 0;
        const int found = out[i / 16].word[i % 16 / 4] >> 8 * (i % 4) & 255;
        CHECK(found == expected, "byte %d of %d stages with a last vector of %d bytes is %d, not %d", i, stages, last,
              found, expected);
      }
    }
}

TEST(conversions) {
  Buffer<float> brain(65536), half(65536);
  run_kernel(widen_kernel<bfloat16>, 4, 256, 0, brain.data());
  run_kernel(widen_kernel<float16>, 4, 256, 0, half.data());
  const auto check = [](int i, float found, int exponent_bits, int fraction_bits) {
    const int exponent = i >> fraction_bits & ((1 << exponent_bits) - 1), fraction = i & ((1 << fraction_bits) - 1);
    const int bias = (1 << (exponent_bits - 1)) - 1;
    double size = std::ldexp(fraction, (exponent ? exponent : 1) - bias - fraction_bits);
    if (exponent) size += std::ldexp(1, exponent - bias);
    const double expected = i >> 15 ? -size : size;
    if (exponent == (1 << exponent_bits) - 1)
      CHECK(fraction ? std::isnan(found) : std::isinf(found) && (found < 0) == (i >> 15), "pattern %x is %f",
            unsigned(i), found);
    else
      CHECK(found == expected, "pattern %x is %g, not %g", unsigned(i), found, expected);
  };
  for (int i = 0; i < 65536; ++i) check(i, brain[i], 8, 7), check(i, half[i], 5, 10);
}

TEST(bit_patterns) {
  constexpr uint32_t patterns[8] = {0, 0x80000000, 0x3f800000, 0xc0400000, 1, 0x807fffff, 0x7f7fffff, 0xff800000};
  const float expected[8] = {0, -0.f, 1, -3, 0x1p-149f, -0x1.fffffcp-127f, 0x1.fffffep127f, -INFINITY};
  Buffer<uint32_t> in(32), out(32);
  Buffer<float> values(32);
  for (int i = 0; i < 32; ++i) in[i] = patterns[i % 8];
  run_kernel(bits_kernel, 1, 32, 0, in.data(), values.data(), out.data());
  for (int i = 0; i < 32; ++i)
    CHECK(out[i] == in[i] && values[i] == expected[i % 8], "%x came as %x, %g", in[i], out[i], double(values[i]));
}

template <class T>
void check_arithmetic(double tiny) {
  Buffer<T> x(32), y(32), z(32), out(128);
  for (int i = 0; i < 32; ++i) {
    x[i] = static_cast<T>(1 + tiny * i);
    y[i] = static_cast<T>(1 - tiny);
    z[i] = static_cast<T>(-1 - tiny * i);
  }
  x[31] = static_cast<T>(0x1.8p-20);
  run_kernel(arithmetic_kernel<T>, 1, 32, 0, x.data(), y.data(), z.data(), out.data());
  for (int i = 0; i < 32; ++i) {
    const double exact = static_cast<double>(x[i]);
    CHECK(out[4 * i] == std::sqrt(x[i]), "sqrt(%g) is %g", exact, double(out[4 * i]));
    CHECK(out[4 * i + 2] == (i == 31 ? -20 : 0), "the exponent of %g is %g", exact, double(out[4 * i + 2]));
    CHECK(out[4 * i + 3] == 8 * exact, "8 times %g is %g", exact, double(out[4 * i + 3]));
    if (i == 31) continue;
    const T expected = static_cast<T>(-tiny * (1 + tiny * i));  // a product that is rounded first gives another value
    CHECK(out[4 * i + 1] == expected, "x y + z is %g, not %g", double(out[4 * i + 1]), double(expected));
  }
}
TEST(arithmetic) { check_arithmetic<float>(0x1p-20), check_arithmetic<double>(0x1p-45); }

#ifndef __CUDACC__
// --- misuse: the twin ends the process and says where
// ------------------------------------------------------------------------

std::string last_words(const std::function<void()>& misuse) {
  int pipe_ends[2];
  if (pipe(pipe_ends)) return "no pipe";
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    dup2(pipe_ends[1], 2);
    misuse();
    std::_Exit(0);
  }
  close(pipe_ends[1]);
  std::string text;
  char buffer[256];
  for (ssize_t n; (n = read(pipe_ends[0], buffer, sizeof(buffer))) > 0;) text.append(buffer, n);
  close(pipe_ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 3 ? text : "ended otherwise: " + text;
}

#define SAYS(words, ...)                                                                                           \
  do {                                                                                                             \
    const std::string said = last_words([] { __VA_ARGS__; });                                                      \
    CHECK(said.find("emulated kernel: ") == 0 && said.find(words) != std::string::npos, "said: %s", said.c_str()); \
  } while (0)

void early_return() {
  if (thread_index() != 5) sync_block();
}
void two_barriers() {
  if (thread_index() < 32)
    sync_block();
  else
    sync_block();
}
void divergent_shuffle() {
  if (thread_index() < 3)
    shuffle(1, 1);
  else
    shuffle(2, 1);
}
void half_warp() {
  if (thread_index() % 32 < 16) shuffle(1, 1);
}
void forgotten_copy(const Vector* from) { copy_async(shared<Vector>(0, 1), from, 16), copy_commit(); }
void uncommitted_copy(const Vector* from) { copy_async(shared<Vector>(0, 1), from, 16), copy_wait<0>(); }
void outside() { shared<float>(0, 33); }
void misaligned() { shared<double>(4, 1); }
void unaligned_pair() {
  double pair[2];
  load_pair(shared<double>(0, 4) + 1, pair);
}
void unaligned_vector() { load_vector(shared<char>(0, 32) + 4); }

TEST(misuse_is_said) {
  static Vector vector = {};
  SAYS("stands still: thread 0 waits at test_primitives.cpp", launch(early_return, 1, 64, 0, nullptr));
  SAYS("meet at different barriers", launch(two_barriers, 1, 64, 0, nullptr));
  SAYS("divergent warp", launch(divergent_shuffle, 1, 32, 0, nullptr));
  SAYS("16 of 32 threads have ended", launch(half_warp, 1, 32, 0, nullptr));
  SAYS("copy_wait<0> is missing", launch(forgotten_copy, 1, 32, 16, nullptr, static_cast<const Vector*>(&vector)));
  SAYS("copy_wait<0> is missing", launch(uncommitted_copy, 1, 32, 16, nullptr, static_cast<const Vector*>(&vector)));
  SAYS("the launch gave 128 bytes", launch(outside, 1, 32, 128, nullptr));
  SAYS("not aligned to 8", launch(misaligned, 1, 32, 128, nullptr));
  SAYS("not aligned", launch(unaligned_vector, 1, 32, 128, nullptr));
  SAYS("not aligned", launch(unaligned_pair, 1, 32, 128, nullptr));
  SAYS("multiple of 32", launch(outside, 1, 33, 128, nullptr));
  SAYS("sm_120 has", launch(outside, 1, 32, 128 * 1024, nullptr));
}

void early_read(const Vector* from, float* out) {
  Vector* place = shared<Vector>(0, 32);
  copy_async(place + thread_index(), from, 16);
  copy_commit();
  copy_wait<1>();  // lax: the group may still be under way
  out[thread_index()] = float_of(load_vector(place + thread_index()).word[0]);
  copy_wait<0>();
}

TEST(an_early_read_is_nan) {
  Buffer<Vector> from(1);
  Buffer<float> out(32);
  launch(early_read, 1, 32, 512, nullptr, static_cast<const Vector*>(from.data()), out.data());
  for (int i = 0; i < 32; ++i) CHECK(std::isnan(out[i]), "out[%d] is %f", i, out[i]);
}

#endif  // __CUDACC__

}  // namespace
}  // namespace theseus::cuda

TEST_MAIN
