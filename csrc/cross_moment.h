// The contract between host and device for cross_moment_, cross_moments_ and effect_moment_; no torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "dtype.h"

namespace theseus {

// One side: tokens x and the row mixing P (CSR) that turns them into the rows X = P x; of a difference X = P (x -
// less).
struct Side {
  const void* tokens;  // [token_count, width], unit column stride
  Dtype dtype;
  int64_t token_count;
  int64_t width;
  int64_t stride;          // elements from one token to the next
  const int64_t* row_ptr;  // [rows + 1], or null: exactly one entry per row
  const int64_t* column;   // [entries], or null: row i is token i
  const double* weight;    // [entries], or null: ones
  int64_t entries;
  double* sum;                 // [width] += sum of X over rows
  double* energy;              // [width] += sum of X^2 over rows
  const void* less = nullptr;  // as tokens, of the same stride and dtype, or null: nothing is subtracted
};

// The side from its element `first` on.
inline void skip_elements(Side& side, int64_t first) {
  side.tokens = static_cast<const char*>(side.tokens) + first * size_of(side.dtype);
  if (side.less) side.less = static_cast<const char*>(side.less) + first * size_of(side.dtype);
}

struct CrossMomentArgs {
  Side source, target;
  int64_t rows;
  double* cross;  // [source.width, target.width], contiguous, += X^T Y
};

// One space, or `heads` spaces of equal width side by side: head h has columns [h width, (h + 1) width) of both sides'
// tokens. Widths are of one head; cross [heads, source.width, target.width], sum and energy [heads * width].
struct MomentGroup {
  CrossMomentArgs args;
  int64_t heads = 1;
};

// Head `head` as a space of its own.
inline CrossMomentArgs head_of(const MomentGroup& group, int64_t head) {
  CrossMomentArgs args = group.args;
  args.cross += head * args.source.width * args.target.width;
  for (Side* side : {&args.source, &args.target}) {
    const int64_t first = head * side->width;
    skip_elements(*side, first);
    side->sum += first, side->energy += first;
  }
  return args;
}

namespace cpu {

// Columns [first, last) of rows [begin, end): mixed and converted into out [end - begin, width], sums and energies
// added. out null: the tokens already are the rows in the compute type, only sums and energies are taken.
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
const char* cross_moment(const CrossMomentArgs& args, bool in_float64, void* source_chunk, void* target_chunk,
                         void* stream);

// Rows [begin, begin + rows) of X, all columns, into out [rows, width] unless it is null; sums and energies added.
const char* make_rows(const Side& side, int64_t begin, int64_t rows, float* out, void* stream);

// master[i] += product[i]
const char* add(const float* product, double* master, int64_t count, void* stream);

}  // namespace cuda

}  // namespace theseus
