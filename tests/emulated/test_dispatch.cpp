// Which way a space goes on a GPU, and that rows made ahead of a launch change no result.
#include "dispatch.h"

#include "moments.h"

namespace theseus::cuda {
namespace {

// A space without data: the rules look at shapes, dtypes and addresses alone.
MomentGroup shaped(int64_t rows, int64_t source, int64_t target, Dtype dtype, int64_t heads = 1) {
  static double master;
  const auto side = [&](int64_t width) {
    return Side{nullptr, dtype, rows, width, width * heads, nullptr, nullptr, nullptr, 0, &master, &master};
  };
  return {{side(source), side(target), rows, &master}, heads};
}

const int64_t kEntry = 0;
const double kWeight = 1;

TEST(who_goes_to_the_library) {
  const MomentGroup large = shaped(kLibraryRows, kLibraryFrom, kLibraryFrom + 64, Dtype::bfloat16);
  CHECK(dispatches(large), "a large plain product");
  CHECK(dispatches(shaped(1, kLibraryFrom, kLibraryFrom, Dtype::float16)), "the smallest");
  CHECK(!dispatches(shaped(kLibraryRows + 1, kLibraryFrom, kLibraryFrom, Dtype::bfloat16)), "a row too many");
  CHECK(!dispatches(shaped(9, kLibraryFrom - 8, kLibraryFrom, Dtype::bfloat16)), "a narrow source");
  CHECK(!dispatches(shaped(9, kLibraryFrom, kLibraryFrom - 8, Dtype::bfloat16)), "a narrow target");
  CHECK(!dispatches(shaped(9, kLibraryFrom, kLibraryFrom, Dtype::float32)), "float32");
  CHECK(!dispatches(shaped(9, kLibraryFrom, kLibraryFrom, Dtype::float64)), "float64");
  CHECK(!dispatches(shaped(9, kLibraryFrom, kLibraryFrom, Dtype::bfloat16, 2)), "heads");
  for (int s = 0; s < 2; ++s) {
    MomentGroup other = large;
    side_of(other, s).column = &kEntry;
    CHECK(!dispatches(other), "side %d selected", s);
    other = large, side_of(other, s).dtype = Dtype::float16;
    CHECK(!dispatches(other), "side %d of another dtype", s);
    other = large, side_of(other, s).stride += 1;
    CHECK(!dispatches(other), "side %d of odd stride", s);
    other = large, side_of(other, s).column = &kEntry, side_of(other, s).weight = &kWeight;
    CHECK(!dispatches(other), "side %d weighted", s);
  }
}

TEST(whose_rows_are_made_ahead) {
  constexpr int64_t kWide = kFewTiles * kPanel + 8;
  for (int s = 0; s < 2; ++s) {
    MomentGroup group = shaped(9, kWide, kWide, Dtype::bfloat16);
    CHECK(!made_ahead(group, s), "tokens as they lie");
    side_of(group, s).column = &kEntry, side_of(group, s).weight = &kWeight;
    CHECK(made_ahead(group, s), "side %d is mixed", s);
    CHECK(made_ahead(group, 1 - s), "side %d is converted to float32, as the other is mixed", 1 - s);
    side_of(group, 1 - s).width = kFewTiles * kPanel;
    CHECK(!made_ahead(group, s), "few tiles read side %d", s);
    CHECK(made_ahead(group, 1 - s), "many read side %d", 1 - s);
    group = shaped(9, kWide, kWide, Dtype::float32);
    side_of(group, s).row_ptr = side_of(group, s).column = &kEntry;
    CHECK(made_ahead(group, s) && !made_ahead(group, 1 - s), "float32 is copied where it lies beside side %d", s);
    side_of(group, 1 - s).column = &kEntry;
    CHECK(!made_ahead(group, 1 - s), "a selection is gathered");
    static const float kLess = 0;
    for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
      group = shaped(9, 8, 8, dtype);
      side_of(group, s).less = &kLess;
      CHECK(made_ahead(group, s) && !dispatches(group), "a difference on side %d, however few tiles read it", s);
      CHECK(grouped_moment(&group, 1, 1, nullptr, nullptr), "a launch does not subtract on side %d", s);
    }
  }
}

// As the op does it, in chunks of `chunk` rows.
template <class S, class T>
void run_ahead(Problem<S, T>& problem, int64_t chunk) {
  const MomentGroup group = problem.group();
  Buffer<float> rows[2] = {Buffer<float>(chunk * problem.source.columns),
                           Buffer<float>(chunk * problem.target.columns)};
  Buffer<double> unused[2] = {Buffer<double>(2 * problem.source.columns), Buffer<double>(2 * problem.target.columns)};
  for (int64_t begin = 0; begin < problem.rows; begin += chunk) {
    const int64_t count = std::min(chunk, problem.rows - begin);
    MomentGroup part = rows_of(group, begin, count);
    for (int s = 0; s < 2; ++s) {
      CHECK(!finish(make_rows(all_heads(group, s), begin, count, rows[s].data(), nullptr)), "make_rows");
      part = reading(part, s, rows[s].data(), unused[s].data());
    }
    Buffer<char> workspace(static_cast<int64_t>(grouped_moment_workspace(&part, 1, 8)));
    CHECK(!finish(grouped_moment(&part, 1, 8, workspace.data(), nullptr)), "launch");
  }
}

TEST(rows_made_ahead) {
  Problem<bfloat16> mixed(40, {24, Mixing::csr, 50}, {17, Mixing::weights, 90});
  run_ahead(mixed, 16);
  mixed.check("csr and weights, three chunks");
  Problem<float16, float> heads(33, {8, Mixing::csr, 20, 3}, {12, Mixing::selection, 7}, 3);
  run_ahead(heads, 33);
  heads.check("heads of unequal dtypes");
  Problem<bfloat16> differences(37, {24, Mixing::none, 0, 5, 0, 0.3, true, true},
                                {17, Mixing::csr, 30, 0, 0, 0.3, true, true});
  run_ahead(differences, 16);
  differences.check("differences, three chunks");
  Problem<float> of_heads(20, {8}, {12, Mixing::none, 0, 3, 0, 0.3, true, true}, 3);
  run_ahead(of_heads, 16);
  of_heads.check("differences by heads");
}

TEST(adds_into_masters) {
  for (const int64_t count : {1, 1024, 2311}) {
    Buffer<float> product(count);
    Buffer<double> master(count);
    for (int64_t i = 0; i < count; ++i)
      product[i] = static_cast<float>(i) + 0.5f, master[i] = 1e9 * static_cast<double>(i);
    CHECK(!finish(add(product.data(), master.data(), count, nullptr)), "launch");
    for (int64_t i = 0; i < count; ++i)
      CHECK(master[i] == 1e9 * static_cast<double>(i) + static_cast<double>(i) + 0.5, "master[%d]", int(i));
  }
}

TEST(sums_without_rows) {
  Problem<bfloat16> problem(21, {40}, {40});
  const MomentGroup group = problem.group();
  for (int s = 0; s < 2; ++s) CHECK(!finish(make_rows(side_of(group, s), 0, 21, nullptr, nullptr)), "launch");
  const std::vector<double> product = problem.product(true);  // the library's part
  for (int64_t i = 0; i < problem.cross.size(); ++i) problem.cross[i] += product[i];
  problem.check("sums and energies alone");
}

}  // namespace
}  // namespace theseus::cuda

TEST_MAIN
