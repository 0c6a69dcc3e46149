// The tensor-core cross-moments against exact results: every dtype, mixing, edge, split and group.
#include "moments.h"

namespace theseus::cuda {
namespace {

constexpr int kOne = 1;    // multiprocessors: nothing is split
constexpr int kMany = 64;  // the rows are split

const char* run(const std::vector<MomentGroup>& groups, int processors) {
  const int count = static_cast<int>(groups.size());
  Buffer<unsigned char> workspace(static_cast<int64_t>(grouped_moment_workspace(groups.data(), count, processors)));
  for (int64_t i = 0; i < workspace.size(); ++i) workspace[i] = 0xff;
  return finish(grouped_moment(groups.data(), count, processors, workspace.data(), nullptr));
}

template <class S, class T = S>
void check(const char* what, int64_t rows, const SideSpec& source, const SideSpec& target, int64_t heads = 1,
           int processors = kOne) {
  Problem<S, T> problem(rows, source, target, heads);
  const char* error = run({problem.group()}, processors);
  CHECK(!error, "%s: %s", what, error);
  problem.check(what);
}

template <class T>
void check_shapes(const char* what) {
  check<T>(what, 1, {1}, {1});
  check<T>(what, 33, {8}, {24});
  check<T>(what, 15, {40}, {72});
  check<T>(what, 70, {136}, {264});  // two by three tiles, the last ones narrow
}

TEST(bfloat16_shapes) { check_shapes<bfloat16>("bfloat16"); }
TEST(float16_shapes) { check_shapes<float16>("float16"); }
TEST(float32_shapes) { check_shapes<float>("float32"); }

TEST(odd_widths) {
  check<bfloat16>("odd width", 37, {131}, {7});
  check<float16>("odd width", 37, {3}, {129});
  check<float>("odd width", 37, {131}, {5});
}

TEST(more_tiles_than_a_band) { check<bfloat16>("nine by two tiles", 5, {1030}, {130}); }

TEST(unaligned) {
  check<bfloat16>("padding of 8", 40, {100, Mixing::none, 0, 4}, {24, Mixing::none, 0, 8});  // copied by 16 bytes, a
                                                                                             // narrow last vector
  check<bfloat16>("offset", 40, {24, Mixing::none, 0, 0, 1}, {24, Mixing::none, 0, 5});
  check<float>("padding of 2", 40, {26, Mixing::none, 0, 2}, {24, Mixing::none, 0, 3});
  check<float>("offset", 40, {24, Mixing::none, 0, 0, 3}, {24, Mixing::none, 0, 0, 1});
}

TEST(last_row_and_column_count) {  // an error of one row or column is larger than any bound
  for (const int64_t rows : {31, 32, 33}) check<bfloat16>("rows around a stage", rows, {127}, {129});
  for (const int64_t rows : {15, 16, 17}) check<float>("rows around a stage", rows, {127}, {129});
}

template <class T>
void check_mixings(const char* what) {
  check<T>(what, 45, {40, Mixing::selection, 60}, {24});
  check<T>(what, 45, {24}, {40, Mixing::selection, 7});
  check<T>(what, 45, {40, Mixing::weights, 60}, {24, Mixing::selection, 50});
  check<T>(what, 45, {40, Mixing::csr, 30}, {24, Mixing::csr, 50, 0, 0, 0.3, false});
}

TEST(bfloat16_mixings) { check_mixings<bfloat16>("bfloat16"); }
TEST(float16_mixings) { check_mixings<float16>("float16"); }
TEST(float32_mixings) { check_mixings<float>("float32"); }

TEST(unequal_dtypes) {
  check<bfloat16, float>("bfloat16 with float32", 40, {24}, {40});
  check<float, float16>("float32 with float16", 40, {24}, {40, Mixing::csr, 20});
  check<float16, bfloat16>("float16 with bfloat16", 40, {24}, {40});
}

// Row r is one number in one column: an output or a column taken for another is off by all of it.
TEST(every_output_is_where_it_belongs) {
  Problem<bfloat16> problem(32, {128}, {128});
  for (int64_t row = 0; row < 32; ++row)
    for (int64_t j = 0; j < 128; ++j) {
      store(j == 4 * row + row % 4 ? 1 + row : 0, problem.source.tokens[row * 128 + j]);
      store(j == 127 - 4 * row ? 1 + 2 * row : 0, problem.target.tokens[row * 128 + j]);
    }
  problem.source.compute(), problem.target.compute();
  CHECK(!run({problem.group()}, kOne), "launch");
  problem.check("single entries");
}

// Whole tiles are added by 16 bytes where the master allows it, else number by number.
TEST(masters_of_any_alignment) {
  for (const int64_t width : {64, 63}) {
    Problem<bfloat16> problem(20, {128}, {width});
    Buffer<double> master(128 * width, 8);
    for (int64_t i = 0; i < master.size(); ++i) master[i] = problem.cross[i];
    MomentGroup group = problem.group();
    group.args.cross = master.data();
    CHECK(!run({problem.group()}, kOne) && !run({group}, kOne), "launch");
    CHECK(!std::memcmp(master.data(), problem.cross.data(), master.size() * sizeof(double)), "width %d", int(width));
  }
}

TEST(float32_is_as_accurate_as_float32) {
  Problem<float> problem(64, {16, Mixing::none, 0, 0, 0, 0}, {16, Mixing::none, 0, 0, 0, 0});
  for (int64_t i = 0; i < problem.source.tokens.size(); ++i)
    problem.source.tokens[i] *= std::ldexp(1.f, static_cast<int>(i % 61) - 30);
  problem.source.compute();
  CHECK(!run({problem.group()}, kOne), "launch");
  problem.check("graded columns");
  // One row: every output is one product, exact up to the parts left out (2^-26) and the roundings of float32.
  Problem<float> row(1, {64}, {64});
  CHECK(!run({row.group()}, kOne), "launch");
  for (int64_t i = 0; i < 64; ++i)
    for (int64_t j = 0; j < 64; ++j) {
      const double exact = row.source.x[i] * row.target.x[j], added = row.cross[i * 64 + j] - row.before[i * 64 + j];
      CHECK(std::fabs(added - exact) <= 0x1p-22 * std::fabs(exact) + 1e-15, "product [%d, %d] is off by %.2e", int(i),
            int(j), added - exact);
    }
}

// Where the sum stands at 2^24, a float32 accumulator loses addends of 1/2: it must have been flushed.
template <class T>
void check_flush(const char* what) {
  Problem<T> problem(2048, {8}, {8});
  for (int64_t i = 0; i < problem.source.tokens.size(); ++i) {
    store(i < 1024 * 8 ? 128 : 0.03125, problem.source.tokens[i]);
    store(i < 1024 * 8 ? 128 : 1, problem.target.tokens[i]);
  }
  problem.source.compute(), problem.target.compute();
  CHECK(!run({problem.group()}, kOne), "launch");
  for (int64_t i = 0; i < 64; ++i) {
    const double added = problem.cross[i] - problem.before[i];
    CHECK(std::fabs(added - (16777216 + 32)) <= 1e-6, "%s: %.1f instead of 16777248", what, added);
  }
}

TEST(accumulators_are_flushed) {
  check_flush<bfloat16>("bfloat16");
  check_flush<float>("float32");
}

// Long sums: tensor cores cut every addition, and what is cut adds up.
TEST(many_rows_are_as_accurate_as_plain) {
  check<bfloat16>("bfloat16", 4096, {8}, {8});
  check<float16>("float16", 2048, {8}, {8});
  check<float>("float32", 2048, {8}, {8});
}

// More rows than a launch takes, of every kind of mixing, and beside a group that has fewer.
TEST(more_rows_than_a_launch_takes) {
  Problem<float> tokens(110, {8}, {8, Mixing::none, 0, 4}), mixed(110, {3, Mixing::csr, 30}, {5, Mixing::weights, 40});
  Problem<bfloat16> gathered(110, {4}, {4, Mixing::selection, 30}, 2), shorter(20, {4, Mixing::csr, 30}, {8});
  const std::vector<MomentGroup> groups = {tokens.group(), mixed.group(), gathered.group(), shorter.group()};
  for (const int processors : {kOne, kMany}) {
    Buffer<char> workspace(static_cast<int64_t>(grouped_moment_workspace(groups.data(), 4, processors, 48)));
    CHECK(!finish(grouped_moment(groups.data(), 4, processors, workspace.data(), nullptr, 48)), "launch");
    tokens.check("tokens"), mixed.check("mixed"), gathered.check("gathered"), shorter.check("shorter");
    tokens.remember(), mixed.remember(), gathered.remember(), shorter.remember();
  }
}

TEST(split_over_rows) {
  check<bfloat16>("bfloat16", 300, {24}, {40}, 1, kMany);
  check<float>("float32", 170, {24}, {136, Mixing::selection, 200}, 1, kMany);
  check<bfloat16>("outputs that are no multiple of four", 300, {7}, {129}, 1, kMany);
}

TEST(heads) {
  check<bfloat16>("heads", 50, {16}, {24}, 3);
  check<bfloat16>("heads whose columns are not aligned", 50, {12}, {7}, 3);
  check<float>("heads, split", 100, {16}, {24, Mixing::csr, 30}, 2, 8);
}

TEST(heads_that_share_a_tile) {
  check<bfloat16>("three of 64", 40, {64}, {64}, 3);
  check<float>("four of 64, split", 100, {64}, {64, Mixing::selection, 120}, 4, 8);
  check<float16>("one of 64", 20, {64}, {64});
}

TEST(groups_share_a_launch) {
  Problem<bfloat16> wide(40, {136}, {24}), narrow(70, {16}, {16}, 2, 2),
      gathered(33, {8, Mixing::selection, 50}, {40}, 1, 3);
  Problem<float> mixed(20, {8, Mixing::csr, 30}, {40}, 1, 4);
  const char* error = run({wide.group(), mixed.group(), narrow.group(), gathered.group()}, kOne);
  CHECK(!error, "%s", error);
  wide.check("wide"), narrow.check("narrow"), gathered.check("gathered"), mixed.check("mixed");
}

TEST(more_groups_than_a_launch_holds) {
  std::vector<std::unique_ptr<Problem<bfloat16>>> problems;
  std::vector<MomentGroup> groups;
  for (int i = 0; i < 17; ++i) {
    problems.push_back(std::make_unique<Problem<bfloat16>>(5, SideSpec{8}, SideSpec{8}, 1, i));
    groups.push_back(problems.back()->group());
  }
  CHECK(!run(groups, kOne), "launch");
  for (const auto& problem : problems) problem->check("one of seventeen");
}

TEST(nothing_to_add) {
  check<bfloat16>("no rows", 0, {8}, {8});
  check<bfloat16>("no columns", 9, {0}, {8});
  check<float>("no columns", 9, {8}, {0});
  check<float>("no tokens, empty rows", 1, {8, Mixing::selection, 3}, {8});
  CHECK(!grouped_moment(nullptr, 0, kOne, nullptr, nullptr), "no groups");
}

TEST(an_entry_out_of_range_is_nan) {
  for (const int64_t bad : {-1, 60}) {
    Problem<bfloat16> problem(45, {40, Mixing::selection, 60}, {24}), other(45, {8}, {8});
    problem.source.column[44] = bad;
    CHECK(!run({problem.group(), other.group()}, kOne), "launch");
    for (int64_t i = 0; i < problem.cross.size(); ++i)
      CHECK(std::isnan(problem.cross[i]), "cross[%d] is %f", int(i), problem.cross[i]);
    for (int64_t i = 0; i < 40; ++i)
      CHECK(std::isnan(problem.source.sum[i]), "sum[%d] is %f", int(i), problem.source.sum[i]);
    for (int64_t i = 0; i < 24; ++i)
      CHECK(std::isfinite(problem.target.sum[i]), "sum[%d] of the target is not finite", int(i));
    other.check("beside a broken group");
  }
  Problem<float> problem(10, {8, Mixing::csr, 6}, {8});
  problem.source.row_ptr[10] += 1;
  CHECK(!run({problem.group()}, kOne), "launch");
  for (int64_t i = 0; i < 64; ++i) CHECK(std::isnan(problem.cross[i]), "cross[%d] is %f", int(i), problem.cross[i]);
}

// The largest numbers would round to Inf in bfloat16.
TEST(large_float32_stays_finite) {
  Problem<float> problem(1, {8}, {8});
  for (int64_t i = 0; i < 8; ++i) problem.source.tokens[i] = i % 2 ? 0x1.fffffep127f : -0x1.ff8p127f;
  for (int64_t i = 0; i < 8; ++i) problem.target.tokens[i] = static_cast<float>(std::ldexp(1.0, -static_cast<int>(i)));
  problem.source.compute(), problem.target.compute();
  CHECK(!run({problem.group()}, kOne), "launch");
  for (int64_t i = 0; i < 64; ++i) {
    const double exact = problem.source.x[i / 8] * problem.target.x[i % 8];
    CHECK(std::fabs(problem.cross[i] - exact) <= 0x1p-22 * std::fabs(exact), "cross[%d] is %g, not %g", int(i),
          problem.cross[i], exact);
  }
}

TEST(who_takes_tensor_cores) {
  Problem<bfloat16> half(4, {8}, {8}), mixed(4, {8, Mixing::weights}, {8});
  Problem<float> whole(4, {8}, {8});
  Problem<bfloat16, double> wide(4, {8}, {8});
  Device device{};
  CHECK(!find_device(0, device) && device.processors > 0 && device.shared_limit >= 99 * 1024 && device.major >= 8,
        "%d processors, %d bytes, %d.%d", device.processors, device.shared_limit, device.major, device.minor);
  constexpr int data_centre[][2] = {{8, 0}, {9, 0}, {10, 0}, {10, 3}}, others[][2] = {{8, 6}, {8, 9}, {12, 0}, {12, 1}};
  for (const bool strong : {true, false})
    for (const auto& capability : strong ? data_centre : others) {
      const Device asked{132, 99 * 1024, capability[0], capability[1]};
      CHECK(takes_tensor_cores(half.group(), asked) && !takes_tensor_cores(wide.group(), asked), "half or float64");
      CHECK(takes_tensor_cores(whole.group(), asked) == strong && takes_tensor_cores(mixed.group(), asked) == strong,
            "float32 on %d.%d", capability[0], capability[1]);
    }
}

// A head of a group is a space: what the plain kernels and the CPU run of it.
TEST(heads_one_by_one) {
  Problem<bfloat16> problem(20, {12}, {7}, 3);
  for (int64_t head = 0; head < 3; ++head) CHECK(!run({{head_of(problem.group(), head)}}, kOne), "launch");
  problem.check("heads");
}

TEST(nan_and_inf_come_through) {
  Problem<float> problem(20, {8}, {8});
  problem.source.tokens[3] = NAN, problem.source.tokens[8 + 5] = INFINITY,
  problem.source.tokens[16 + 6] = float_of(~0u);
  CHECK(!run({problem.group()}, kOne), "launch");
  for (int64_t i = 0; i < 8; ++i)
    for (int64_t j = 0; j < 8; ++j)
      CHECK(std::isfinite(problem.cross[i * 8 + j]) == (i != 3 && i != 5 && i != 6), "cross[%d, %d] is %f", int(i),
            int(j), problem.cross[i * 8 + j]);
  CHECK(std::isinf(problem.source.sum[5]) && std::isnan(problem.source.sum[3]), "sums");
}

TEST(same_bytes_every_time) {
  Problem<bfloat16> one(300, {24}, {40}), two(300, {24}, {40});
  CHECK(!run({one.group()}, kMany) && !run({two.group()}, kMany), "launch");
  CHECK(!std::memcmp(one.cross.data(), two.cross.data(), 24 * 40 * sizeof(double)), "cross differs");
}

TEST(float64_is_refused) {
  Problem<double> problem(3, {8}, {8});
  const char* error = run({problem.group()}, kOne);
  CHECK(error && std::strstr(error, "float64"), "%s", error ? error : "no error");
}

}  // namespace
}  // namespace theseus::cuda

TEST_MAIN
