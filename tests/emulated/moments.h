// Moment problems of every kind, with their exact results, for the tests of the cross-moment kernels.
#pragma once

#include "check.h"
#include "grouped_moment.h"

namespace theseus::cuda {

enum class Mixing { none, selection, weights, csr };

struct SideSpec {
  int64_t width;
  Mixing mixing = Mixing::none;
  int64_t tokens = 0;   // 0: as many as rows
  int64_t padding = 0;  // elements between tokens
  int offset = 0;       // elements the first token lies past a 64-byte boundary
  double mean = 0.3;
  bool weighted = true;  // csr: with weights
  bool less = false;     // something is subtracted
};

template <class T>
struct SideData {
  SideSpec spec;
  int64_t rows, heads, columns, stride, count;
  Buffer<T> tokens, less;
  Buffer<int64_t> row_ptr, column;
  Buffer<double> weight, sum, energy;
  std::vector<double> x;  // [rows, columns]: X exactly

  SideData(const SideSpec& s, int64_t rows_, int64_t heads_, Random& random)
      : spec(s),
        rows(rows_),
        heads(heads_),
        columns(s.width * heads_),
        stride(columns + s.padding),
        count(s.tokens ? s.tokens : rows),
        tokens(count ? (count - 1) * stride + columns : 0, s.offset * static_cast<int>(sizeof(T))),
        less(s.less ? tokens.size() : 0, s.offset * static_cast<int>(sizeof(T))),
        row_ptr(s.mixing == Mixing::csr ? rows + 1 : 0),
        column(entries(s, rows)),
        weight(s.mixing == Mixing::weights || (s.mixing == Mixing::csr && s.weighted) ? column.size() : 0),
        sum(columns),
        energy(columns) {
    for (int64_t i = 0; i < tokens.size(); ++i) store(random.normal() + s.mean, tokens[i]);
    for (int64_t i = 0; i < less.size(); ++i) store(number(tokens[i]) + 0.1 * random.normal(), less[i]);
    for (int64_t i = 0; i < column.size(); ++i) column[i] = random.below(count);
    for (int64_t i = 0; i < weight.size(); ++i) weight[i] = random.uniform();
    for (int64_t i = 1; i < row_ptr.size(); ++i) row_ptr[i] = row_ptr[i - 1] + entries_of(i - 1);
    for (int64_t i = 0; i < columns; ++i) sum[i] = random.normal(), energy[i] = random.normal();
    compute();
  }

  static int64_t entries_of(int64_t row) {  // empty rows occur, and a last row that is none
    constexpr int64_t counts[4] = {2, 0, 3, 1};
    return counts[row % 4];
  }
  static int64_t entries(const SideSpec& s, int64_t rows) {
    if (s.mixing != Mixing::csr) return s.mixing == Mixing::none ? 0 : rows;
    int64_t all = 0;
    for (int64_t row = 0; row < rows; ++row) all += entries_of(row);
    return all;
  }

  void compute() {
    x.assign(rows * columns, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t from = row_ptr.size() ? row_ptr[row] : row, to = row_ptr.size() ? row_ptr[row + 1] : row + 1;
      for (int64_t e = from; e < to; ++e) {
        const int64_t token = column.size() ? column[e] : e;
        for (int64_t j = 0; j < columns; ++j)
          x[row * columns + j] +=
              token < 0 || token >= count ? NAN : (weight.size() ? weight[e] : 1) * value(token * stride + j);
      }
    }
  }

  double value(int64_t i) const { return number(tokens[i]) - (less.size() ? number(less[i]) : 0); }

  Side side() {
    return {tokens.data(),
            kDtype<T>,
            count,
            spec.width,
            stride,
            row_ptr.size() ? row_ptr.data() : nullptr,
            spec.mixing != Mixing::none ? column.data() : nullptr,
            weight.size() ? weight.data() : nullptr,
            column.size(),
            sum.data(),
            energy.data(),
            less.size() ? less.data() : nullptr};
  }
};

// A problem, what it had in its masters before, and the exact result.
template <class S, class T = S>
struct Problem {
  int64_t rows, heads;
  Random random;
  SideData<S> source;
  SideData<T> target;
  Buffer<double> cross;
  std::vector<double> before;

  Problem(int64_t rows_, const SideSpec& s, const SideSpec& t, int64_t heads_ = 1, uint64_t seed = 1)
      : rows(rows_),
        heads(heads_),
        random(seed),
        source(s, rows, heads, random),
        target(t, rows, heads, random),
        cross(heads * s.width * t.width) {
    for (int64_t i = 0; i < cross.size(); ++i) cross[i] = random.normal();
    remember();
  }

  void remember() {
    before.assign(cross.data(), cross.data() + cross.size());
    for (const Buffer<double>* b : {&source.sum, &source.energy, &target.sum, &target.energy})
      before.insert(before.end(), b->data(), b->data() + b->size());
  }

  CrossMomentArgs args() { return {source.side(), target.side(), rows, cross.data()}; }
  MomentGroup group() { return {args(), heads}; }

  // cross as exact (in float64) or as float32 sums over at most 1024 rows, added in float64: what plain torch would do.
  std::vector<double> product(bool exact) const {
    const int64_t s = source.spec.width, t = target.spec.width;
    std::vector<double> out(heads * s * t);
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t i = 0; i < s; ++i)
        for (int64_t j = 0; j < t; ++j) {
          double total = 0;
          float partial = 0;
          for (int64_t row = 0; row < rows; ++row) {
            const double x = source.x[row * source.columns + head * s + i],
                         y = target.x[row * target.columns + head * t + j];
            if (exact)
              total += x * y;
            else
              partial += static_cast<float>(x) * static_cast<float>(y);
            if (!exact && (row % 1024 == 1023 || row + 1 == rows)) total += partial, partial = 0;
          }
          out[(head * s + i) * t + j] = total;
        }
    return out;
  }

  // Checks all masters. cross: at most twice the error of the same in plain float32, and two roundings to float32 (of a
  // part of the sum and of a mixed row). Sums of rows that are mixed in float64 and kept in float32: one such rounding;
  // else float64.
  void check(const char* what, bool in_float64 = false) {
    const std::vector<double> exact = product(true), plain = product(false);
    std::vector<double> added(cross.size());
    for (int64_t i = 0; i < cross.size(); ++i) added[i] = cross[i] - before[i];
    const double error = relative_error(added.data(), exact.data(), cross.size());
    const double bound = in_float64 ? 1e-14 : 2 * relative_error(plain.data(), exact.data(), cross.size()) + 0x1p-23;
    CHECK(error <= bound, "%s: cross is off by %.2e, bound %.2e", what, error, bound);
    const double* expected = before.data() + cross.size();
    expected = check_side(source, "source", what, expected, in_float64);
    check_side(target, "target", what, expected, in_float64);
  }

  template <class D>
  static const double* check_side(const D& side, const char* name, const char* what, const double* had,
                                  bool in_float64) {
    const int64_t n = side.columns;
    const bool rounded = !in_float64 && (side.weight.size() || side.row_ptr.size() || side.less.size());
    for (const int power : {1, 2}) {
      const Buffer<double>& master = power == 1 ? side.sum : side.energy;
      double difference = 0, size = 0;
      for (int64_t j = 0; j < n; ++j, ++had) {
        double exact = 0, absolute = 0;
        for (int64_t row = 0; row < side.rows; ++row) {
          const double x = side.x[row * n + j], term = power == 1 ? x : x * x;
          exact += term, absolute += std::fabs(term);
        }
        difference += (master[j] - *had - exact) * (master[j] - *had - exact), size += absolute * absolute;
      }
      const double error = std::sqrt(difference / (size > 0 ? size : 1));
      CHECK(error <= (rounded ? 0x1p-23 : 1e-13), "%s: %s of %s is off by %.2e", what, power == 1 ? "sum" : "energy",
            name, error);
    }
    return had;
  }
};

}  // namespace theseus::cuda
