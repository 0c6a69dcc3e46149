// Every op's schema.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(theseus_ext, m) {
  m.def(
      "cross_moment_(Tensor source, Tensor target, "
      "Tensor? source_row_ptr, Tensor? source_column, Tensor? source_weight, "
      "Tensor? target_row_ptr, Tensor? target_column, Tensor? target_weight, "
      "Tensor(a!) cross, Tensor(b!) source_sum, Tensor(c!) target_sum, "
      "Tensor(d!) source_energy, Tensor(e!) target_energy) -> ()");
  m.def(
      "cross_moments_(Tensor[] source, Tensor[] target, "
      "Tensor? source_row_ptr, Tensor? source_column, Tensor? source_weight, "
      "Tensor? target_row_ptr, Tensor? target_column, Tensor? target_weight, "
      "Tensor(a!)[] cross, Tensor(b!)[] source_sum, Tensor(c!)[] target_sum, "
      "Tensor(d!)[] source_energy, Tensor(e!)[] target_energy) -> ()");
  m.def(
      "effect_moment_(Tensor inputs, Tensor source_after, Tensor source_before, "
      "Tensor target_after, Tensor target_before, "
      "Tensor? source_row_ptr, Tensor? source_column, Tensor? source_weight, "
      "Tensor? target_row_ptr, Tensor? target_column, Tensor? target_weight, "
      "Tensor(a!) gram, Tensor(b!) source_cross, Tensor(c!) target_cross, "
      "Tensor(d!) input_sum, Tensor(e!) source_sum, Tensor(f!) target_sum, "
      "Tensor(g!) input_energy, Tensor(h!) source_energy, Tensor(i!) target_energy) -> ()");
  m.def("svd(Tensor matrices) -> (Tensor, Tensor, Tensor)");
  m.def("svdvals(Tensor matrices) -> Tensor");
  m.def("polar(Tensor matrices, float floor) -> (Tensor, Tensor)");
}
