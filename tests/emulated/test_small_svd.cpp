// Batched Jacobi under LAPACK's test ratios: residual, orthogonality, order; every one below 30.
#include <algorithm>

#include "check.h"
#include "small_svd.h"

namespace theseus::cuda {
namespace {

constexpr double kRatio = 30;            // what LAPACK's own tests allow
constexpr int kSmallestGpu = 99 * 1024;  // bytes of shared memory a block may have on sm_120

template <class T>
constexpr double kEpsilon = sizeof(T) == 4 ? 0x1p-23 : 0x1p-52;

template <class T>
struct Batch {
  int64_t count;
  int rows, columns, k;
  int64_t row_stride, matrix_stride;
  Buffer<T> a, s, u, vh, polar;
  Buffer<int32_t> sweeps;
  double floor = 1e-6;

  Batch(int64_t count_, int rows_, int columns_, int padding = 0)
      : count(count_),
        rows(rows_),
        columns(columns_),
        k(std::min(rows, columns)),
        row_stride(columns + padding),
        matrix_stride(rows * row_stride + 3 * padding),
        a((count - 1) * matrix_stride + (rows - 1) * row_stride + columns),
        s(count * k),
        u(count * rows * k),
        vh(count * columns * k),
        polar(count * rows * columns),
        sweeps(count) {}

  T& at(int64_t matrix, int i, int j) { return a[matrix * matrix_stride + i * row_stride + j]; }

  void fill(uint64_t seed) {
    Random random(seed);
    for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<T>(random.normal());
  }

  const char* run(int shared_limit = kSmallestGpu, int64_t at_once = kMostSvdsAtOnce) {
    const SmallSvdArgs args{a.data(), kDtype<T>, count,    rows,      columns,      matrix_stride, row_stride,
                            floor,    s.data(),  u.data(), vh.data(), polar.data(), sweeps.data()};
    Buffer<char> workspace(static_cast<int64_t>(small_svd_workspace(args, shared_limit, at_once)));
    return finish(small_svd(args, shared_limit, workspace.data(), nullptr, at_once));
  }

  const char* run_for_values() {
    const SmallSvdArgs args{a.data(), kDtype<T>, count,   rows,    columns, matrix_stride, row_stride,
                            floor,    s.data(),  nullptr, nullptr, nullptr, nullptr};
    return finish(small_svd(args, kSmallestGpu, nullptr, nullptr));
  }

  // Vectors p = 0..k-1, whose i-th number is x[i * step + p * apart], orthonormal; in units of size * epsilon.
  double orthogonality(const T* x, int size, int step, int apart) const {
    double worst = 0;
    for (int p = 0; p < k; ++p)
      for (int q = 0; q < k; ++q) {
        double dot = 0;
        for (int i = 0; i < size; ++i) dot += number(x[i * step + p * apart]) * number(x[i * step + q * apart]);
        const double error = std::fabs(dot - (p == q));
        worst = error <= worst ? worst : error;
      }
    return worst / (size * kEpsilon<T>);
  }

  void check(const char* what) {
    for (int64_t m = 0; m < count; ++m) {
      const T *values = &s[m * k], *left = &u[m * rows * k], *right = &vh[m * columns * k],
              *t = &polar[m * rows * columns];
      const int largest = std::max(rows, columns);
      CHECK(sweeps[m] <= kMostSweeps, "%s: matrix %d did not converge", what, int(m));
      double residual = 0, size = 0, polar_error = 0;
      for (int i = 0; i < rows; ++i)
        for (int j = 0; j < columns; ++j) {
          double product = 0, direction = 0;
          for (int p = 0; p < k; ++p) {
            product += number(left[i * k + p]) * number(values[p]) * number(right[p * columns + j]);
            if (values[p] > floor * values[0]) direction += number(left[i * k + p]) * number(right[p * columns + j]);
          }
          residual = std::max(residual, std::fabs(product - number(at(m, i, j))));
          size = std::max(size, std::fabs(number(at(m, i, j))));
          const double error = std::fabs(direction - number(t[i * columns + j]));
          polar_error = error <= polar_error ? polar_error : error;
          if (std::isnan(product)) residual = product;
        }
      const double ratio = residual / ((size > 0 ? size : 1) * largest * kEpsilon<T>);
      CHECK(ratio < kRatio, "%s: |A - U S V^T| is %.1f units", what, ratio);
      CHECK(polar_error / (largest * kEpsilon<T>) < kRatio, "%s: the polar factor is off by %.1e", what, polar_error);
      const double u_ratio = orthogonality(left, rows, k, 1), v_ratio = orthogonality(right, columns, 1, columns);
      CHECK(u_ratio < kRatio, "%s: |U^T U - 1| is %.1f units", what, u_ratio);
      CHECK(v_ratio < kRatio, "%s: |Vh Vh^T - 1| is %.1f units", what, v_ratio);
      for (int p = 0; p < k; ++p)
        CHECK(values[p] >= 0 && (p == 0 || values[p - 1] >= values[p]), "%s: s[%d] is %g after %g", what, p,
              double(values[p]), double(values[p ? p - 1 : 0]));
    }
  }
};

template <class T>
void check_random(const char* what, int64_t count, int rows, int columns, int padding = 0) {
  Batch<T> batch(count, rows, columns, padding);
  batch.fill(rows * 131 + columns);
  const char* error = batch.run();
  CHECK(!error, "%s", error);
  batch.check(what);
}

TEST(svd_shapes_float32) {
  check_random<float>("one element", 2, 1, 1);
  check_random<float>("a column", 2, 5, 1);
  check_random<float>("a row", 2, 1, 5);
  check_random<float>("square", 2, 16, 16);
  check_random<float>("tall, odd", 2, 35, 7);
  check_random<float>("wide, odd", 2, 7, 35);
  check_random<float>("strides", 3, 6, 9, 5);
}

TEST(svd_shapes_float64) {
  check_random<double>("square", 2, 12, 12);
  check_random<double>("tall", 2, 40, 5);
  check_random<double>("wide", 2, 5, 33);
}

TEST(svd_of_128) {  // nearly orthogonal columns, so that few sweeps are enough; does not fit in shared memory on every
                    // GPU
  Batch<float> batch(1, 128, 128);
  for (int i = 0; i < 128; ++i) batch.at(0, i, (37 * i + 5) % 128) = static_cast<float>(1 + i % 7);
  batch.at(0, 3, 9) = batch.at(0, 100, 1) = 0.5f;
  CHECK(!batch.run(), "launch");
  batch.check("128 x 128");
}

TEST(svd_in_a_workspace) {
  Batch<float> inside(2, 20, 12), outside(2, 20, 12);
  inside.fill(1), outside.fill(1);
  CHECK(!inside.run() && !outside.run(1024), "launch");
  outside.check("in a workspace");
  CHECK(!std::memcmp(inside.polar.data(), outside.polar.data(), inside.polar.size() * 4),
        "bytes depend on where the work is done");
}

// The workspace holds as many matrices as are worked on at once, and every result is where it belongs.
TEST(svds_in_several_launches) {
  Batch<double> whole(5, 6, 9), parts(5, 6, 9);
  whole.fill(11), parts.fill(11);
  CHECK(!whole.run() && !parts.run(1024, 2), "launch");
  parts.check("two at once");
  for (const auto& [one, other] : {std::pair{&whole.s, &parts.s}, {&whole.polar, &parts.polar}})
    CHECK(!std::memcmp(one->data(), other->data(), one->size() * 8), "bytes depend on how many are worked on at once");
}

// Known singular values: A = H1 D H2 with reflections H = 1 - 2 w w^T.
template <class T>
void check_spectrum(const char* what, const std::vector<double>& spectrum, int rows, double scale, double accuracy) {
  const int n = static_cast<int>(spectrum.size());
  Batch<T> batch(1, rows, n);
  Random random(n);
  std::vector<double> w(rows), z(n);
  double ww = 0, zz = 0;
  for (double& x : w) x = random.normal(), ww += x * x;
  for (double& x : z) x = random.normal(), zz += x * x;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int p = 0; p < n; ++p)
        sum += ((i == p) - 2 * w[i] * w[p] / ww) * spectrum[p] * ((p == j) - 2 * z[p] * z[j] / zz);
      batch.at(0, i, j) = static_cast<T>(scale * sum);
    }
  CHECK(!batch.run(), "launch");
  batch.check(what);
  std::vector<double> sorted = spectrum;
  std::sort(sorted.rbegin(), sorted.rend());
  for (int p = 0; p < n; ++p) {
    const double error = std::fabs(batch.s[p] / scale - sorted[p]);
    CHECK(error <= accuracy * sorted[0], "%s: s[%d] is off by %.1e of the largest", what, p, error / sorted[0]);
  }
}

TEST(svd_spectra) {
  const std::vector<double> graded = {1, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 1e-14},
                            clustered = {2, 2, 2, 1, 1, 1, 1 + 1e-7, 0.5};
  const std::vector<double> deficient = {3, 2, 1, 0, 0, 0, 0};
  for (const double scale : {1.0, 1e-30, 1e30}) {
    check_spectrum<float>("graded", graded, 9, scale, 1e-5);  // kRatio * 9 rows * 2^-23, rounded down
    check_spectrum<float>("clustered", clustered, 8, scale, 1e-5);
    check_spectrum<float>("deficient", deficient, 12, scale, 1e-5);
  }
  for (const double scale : {1.0, 1e-290, 1e290}) {
    check_spectrum<double>("graded", graded, 9, scale, 1e-14);
    check_spectrum<double>("deficient", deficient, 7, scale, 1e-14);
  }
}

// Columns of very different length: the small singular values come out with small relative errors.
TEST(svd_of_scaled_columns) {
  Batch<float> batch(1, 8, 4);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 4; ++j) batch.at(0, i, j) = (i == j ? 1.f : i == j + 4 ? 1.f : 0.f) * std::ldexp(1.f, -12 * j);
  batch.at(0, 0, 3) = std::ldexp(1.f, -40);
  CHECK(!batch.run(), "launch");
  batch.check("scaled columns");
  for (int j = 0; j < 4; ++j) {
    const double exact = std::sqrt(2.0) * std::ldexp(1.0, -12 * j);
    CHECK(std::fabs(batch.s[j] - exact) <= 1e-3 * exact, "s[%d] is %g, not %g", j, double(batch.s[j]), exact);
  }
}

TEST(svd_of_nothing) {
  for (const int rows : {6, 3}) {
    Batch<float> zero(2, rows, 4);
    CHECK(!zero.run(), "launch");
    zero.check("zero");
    for (int64_t i = 0; i < zero.polar.size(); ++i) CHECK(zero.polar[i] == 0, "polar[%d] of zero", int(i));
  }
  Batch<double> none(1, 3, 3);
  none.count = 0;
  CHECK(!none.run(), "no matrices");
}

// Columns that are exactly zero, or become so, beside others: the vectors are completed, also where few rows are left.
TEST(vectors_of_what_is_rank_deficient) {
  for (const bool wide : {false, true}) {
    Batch<double> batch(1, wide ? 9 : 40, wide ? 40 : 9), square(1, 10, 10), diagonal(1, 4, 4);
    for (int i = 0; i < 40; ++i)
      for (int j = 0; j < 9; ++j) batch.at(0, wide ? j : i, wide ? i : j) = j % 3 == 1 ? 0 : (i + 1) * (j % 2 + 1) % 7;
    square.fill(5);
    for (int i = 0; i < 10; ++i) square.at(0, i, 3) = square.at(0, 6, i) = 0, square.at(0, i, 8) = square.at(0, i, 2);
    for (const int i : {0, 1, 3}) diagonal.at(0, i, i) = 1 + wide;
    CHECK(!batch.run() && !square.run() && !diagonal.run(), "launch");
    batch.check("few columns"), square.check("square"), diagonal.check("diagonal");
  }
}

// What is not asked for is not touched, and values are the same bytes without vectors.
TEST(values_alone) {
  Batch<float> whole(2, 9, 14), values(2, 9, 14);
  whole.fill(3), values.fill(3);
  CHECK(!whole.run() && !values.run_for_values(), "launch");
  CHECK(!std::memcmp(whole.s.data(), values.s.data(), values.s.size() * 4), "s differs");
}

TEST(polar_leaves_out_what_is_below_the_floor) {
  Batch<double> batch(1, 3, 3);
  batch.at(0, 0, 1) = 2, batch.at(0, 1, 0) = -1, batch.at(0, 2, 2) = 1e-7;
  CHECK(!batch.run(), "launch");
  for (int i = 0; i < 9; ++i) CHECK(batch.polar[i] == (i == 1) - (i == 3), "polar[%d] is %g", i, batch.polar[i]);
}

TEST(nan_stays_in_its_matrix) {
  for (const float bad : {NAN, INFINITY}) {
    Batch<float> batch(3, 6, 5);
    batch.fill(7);
    batch.at(1, 2, 3) = bad;
    CHECK(!batch.run(), "launch");
    for (int64_t m = 0; m < 3; ++m) CHECK(std::isnan(batch.polar[m * 30]) == (m == 1), "polar of matrix %d", int(m));
    CHECK(std::isnan(batch.s[5]), "s is %g", double(batch.s[5]));
  }
}

TEST(svd_refuses) {
  SmallSvdArgs args{};
  args.rows = 129, args.columns = 3;
  CHECK(std::strstr(small_svd(args, kSmallestGpu, nullptr, nullptr), "1 to 128"), "129 rows");
  args.rows = 3, args.dtype = Dtype::float16;
  CHECK(std::strstr(small_svd(args, kSmallestGpu, nullptr, nullptr), "float32 and float64"), "float16");
}

}  // namespace
}  // namespace theseus::cuda

TEST_MAIN
