// The plain kernels against exact results, and the tensor-core kernels against them.
#include "moments.h"

namespace theseus::cuda {
namespace {

// As the op calls it: scratch in the compute type, or null where the tokens already are the rows.
template <class S, class T>
void run(Problem<S, T>& problem, bool in_float64, bool in_place) {
  const int64_t rows = problem.rows < kChunk ? problem.rows : kChunk, bytes = in_float64 ? 8 : 4;
  Buffer<char> source(in_place ? 0 : rows * problem.source.columns * bytes),
      target(in_place ? 0 : rows * problem.target.columns * bytes);
  const char* error = finish(cross_moment(problem.args(), in_float64, in_place ? nullptr : source.data(),
                                          in_place ? nullptr : target.data(), nullptr));
  CHECK(!error, "%s", error);
}

template <class S, class T = S>
void check(const char* what, int64_t rows, const SideSpec& source, const SideSpec& target, bool in_place = false) {
  constexpr bool in_float64 = sizeof(S) == 8 || sizeof(T) == 8;
  Problem<S, T> problem(rows, source, target);
  run(problem, in_float64, in_place);
  problem.check(what, in_float64);
}

TEST(plain_dtypes) {
  check<float>("float32", 37, {40}, {7});
  check<double>("float64", 37, {40}, {7});
  check<bfloat16>("bfloat16", 1, {3}, {5});
  check<float16>("float16", 20, {3}, {5});
  check<float, double>("float32 with float64", 20, {3}, {5});
}

TEST(plain_edges) {
  check<float>("two by two tiles", 17, {70}, {65});
  check<float>("in place", 17, {33}, {31}, true);
  check<float>("strides", 17, {33, Mixing::none, 0, 5}, {31, Mixing::none, 0, 1, 1});
  check<float>("no columns", 9, {0}, {8});
}

TEST(plain_mixings) {
  check<bfloat16>("selection", 21, {9, Mixing::selection, 40}, {5});
  check<float>("weights and csr", 21, {9, Mixing::weights, 40}, {5, Mixing::csr, 8});
  check<double>("csr without weights", 21, {9}, {5, Mixing::csr, 8, 0, 0, 0.3, false});
}

SideSpec difference(int64_t width, Mixing mixing = Mixing::none, int64_t tokens = 0, int64_t padding = 0) {
  return {width, mixing, tokens, padding, 0, 0.3, true, true};
}

TEST(plain_differences) {
  check<float>("of float32", 21, {9}, difference(5));
  check<bfloat16>("of bfloat16", 21, {9}, difference(40, Mixing::none, 0, 3));
  check<float, double>("of float64", 21, difference(9, Mixing::selection, 30), {5});
  check<float16>("mixed", 21, difference(9, Mixing::csr, 8), difference(5, Mixing::weights, 40));
}

TEST(differences_head_by_head) {
  Problem<float> problem(20, {8, Mixing::none, 0, 3, 0, 0.3, true, true}, {12}, 3);
  const MomentGroup group = problem.group();
  for (int64_t head = 0; head < 3; ++head) {
    Buffer<float> source(20 * 8), target(20 * 12);
    CHECK(!finish(cross_moment(head_of(group, head), false, source.data(), target.data(), nullptr)), "launch");
  }
  problem.check("three heads");
}

TEST(plain_chunks) { check<bfloat16>("more rows than a chunk", kChunk + 3, {2}, {3}); }

TEST(plain_entry_out_of_range_is_nan) {
  Problem<float> problem(10, {8, Mixing::csr, 6}, {8});
  problem.source.column[problem.source.column.size() - 1] = 6;
  run(problem, false, false);
  for (int64_t i = 0; i < 64; ++i) CHECK(std::isnan(problem.cross[i]), "cross[%d] is %f", int(i), problem.cross[i]);
}

TEST(tensor_cores_agree_with_plain) {
  const SideSpec source{40, Mixing::csr, 50}, target{24, Mixing::selection, 90};
  Problem<bfloat16> plain(80, source, target), tensor(80, source, target);
  run(plain, false, false);
  const MomentGroup group = tensor.group();
  Buffer<char> workspace(static_cast<int64_t>(grouped_moment_workspace(&group, 1, 8)));
  CHECK(!finish(grouped_moment(&group, 1, 8, workspace.data(), nullptr)), "launch");
  const double error = relative_error(tensor.cross.data(), plain.cross.data(), plain.cross.size());
  CHECK(error <= 0x1p-20, "cross differs by %.2e: both add 80 products in float32", error);
}

}  // namespace
}  // namespace theseus::cuda

TEST_MAIN
