// Singular values, vectors and polar factors of many small matrices; no torch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"
#include "device.h"

namespace theseus::cuda {

constexpr int kLargestSvd = 128;  // rows and columns
constexpr int kMostSweeps = 30;
constexpr int64_t kMostSvdsAtOnce = 4096;  // of a launch, and so of a workspace: 1 GiB of 128 x 128 in float64

struct SmallSvdArgs {
  const void* a;  // [count, rows, columns], unit column stride
  Dtype dtype;    // float32 or float64, of a and of all results
  int64_t count;
  int rows, columns;                  // 1 to kLargestSvd
  int64_t matrix_stride, row_stride;  // elements from one matrix and from one row to the next
  double floor;                       // polar: singular values up to floor times the largest count as zero
  void* s;                            // [count, k], k = min(rows, columns), descending; NaN where not converged
  void* u;                            // [count, rows, k], or null; columns orthonormal, whatever the rank
  void* vh;                           // [count, k, columns], or null; rows orthonormal
  void* polar;                        // [count, rows, columns], or null: u vh, a partial isometry
  int32_t* sweeps;                    // [count], or null: sweeps taken, kMostSweeps + 1 where they were not enough
};

// One-sided Jacobi, a block per matrix. Every result comes with small relative residuals
// (tests/emulated/test_small_svd.cpp); NaN or Inf in a matrix makes its values and polar factor NaN. `shared_limit`:
// bytes of shared memory a block may have on this device; what does not fit is worked on in `workspace`. More than
// `at_once` matrices take several launches. Returns null or what is wrong.
const char* small_svd(const SmallSvdArgs& args, int shared_limit, void* workspace, void* stream,
                      int64_t at_once = kMostSvdsAtOnce);

// Bytes of device memory `workspace` must have, aligned to 16.
size_t small_svd_workspace(const SmallSvdArgs& args, int shared_limit, int64_t at_once = kMostSvdsAtOnce);

}  // namespace theseus::cuda
