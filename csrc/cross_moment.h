// The contract between host and device for cross_moment_; no torch.
#pragma once

#include <cstdint>

namespace theseus {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// One side: tokens x and the row mixing P (CSR) that turns them into the rows X = P x.
struct Side {
  const void* tokens;      // [token_count, width], unit column stride
  Dtype dtype;
  int64_t token_count;
  int64_t width;
  int64_t stride;          // elements from one token to the next
  const int64_t* row_ptr;  // [rows + 1], or null: exactly one entry per row
  const int64_t* column;   // [entries], or null: row i is token i
  const double* weight;    // [entries], or null: ones
  int64_t entries;
  double* sum;             // [width] += sum of X over rows
  double* energy;          // [width] += sum of X^2 over rows
};

struct CrossMomentArgs {
  Side source, target;
  int64_t rows;
  double* cross;  // [source.width, target.width], contiguous, += X^T Y
};

namespace cpu {

// Columns [first, last) of rows [begin, end): mixed and converted into out [end - begin, width], sums and energies added.
// out null: the tokens already are the rows in the compute type, only sums and energies are taken.
constexpr int64_t kColumns = 256;  // most columns per call: two accumulators of 1 KiB stay in L1
void prepare(const Side& side, int64_t begin, int64_t end, int64_t first, int64_t last, float* out);
void prepare(const Side& side, int64_t begin, int64_t end, int64_t first, int64_t last, double* out);

// master[i] += product[i]
void add(const float* product, double* master, int64_t count);
void add(const double* product, double* master, int64_t count);

}  // namespace cpu

namespace cuda {

constexpr int64_t kChunk = 4096;  // rows prepared per launch

// *_chunk: [min(rows, kChunk), width] scratch of float (double when in_float64), or null as for cpu::prepare's out.
// An entry outside its range becomes NaN: the host cannot look at it without waiting. Returns null or CUDA's message.
const char* cross_moment(const CrossMomentArgs& args, bool in_float64, void* source_chunk, void* target_chunk, void* stream);

}  // namespace cuda

}  // namespace theseus
