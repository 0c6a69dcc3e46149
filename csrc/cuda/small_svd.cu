// One-sided Jacobi: columns of A are rotated in pairs until all are orthogonal, and the rotations are gathered in V.
// Then A V = U S. A block owns a matrix; a warp owns a pair; the pairs of a round touch different columns, and a
// barrier parts the rounds. (Demmel and Veselic 1992: small singular values come out with small relative errors where
// the columns are only badly scaled.)
#include "small_svd.h"

#include <algorithm>

#include "small_svd.cuh"

namespace theseus::cuda {
namespace {

template <class T>
THESEUS_KERNEL(kThreads, sizeof(T) == 4 ? 5 : 3)
jacobi_kernel(const THESEUS_GRID_CONSTANT SmallSvdArgs args, T* workspace) {
  const Layout layout(args);
  const int rows = layout.rows, columns = layout.columns, stride = layout.stride;
  T* value = shared<T>(0, kLargestSvd);                    // singular values, in the order of the columns
  int* order = shared<int>(kLargestSvd * 8, kLargestSvd);  // order[i]: the column of the i-th largest
  T* slots = shared<T>(kLargestSvd * 12, kWarps);
  // The columns of A, those of V below them: in shared memory, or in the workspace where they do not fit there.
  T* column = workspace ? workspace + static_cast<int64_t>(block_index()) * layout.elements()
                        : shared<T>(kFixedBytes, layout.elements());
  const int64_t matrix = block_index();
  const T* a = static_cast<const T*>(args.a) + matrix * args.matrix_stride;
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;

  // A scaled by a power of two so that squares neither overflow nor vanish; V = 1.
  T largest = 0;
  for (int i = thread_index(); i < args.rows * args.columns; i += kThreads) {
    const T size = absolute(a[i / args.columns * args.row_stride + i % args.columns]);
    largest = largest >= size || largest != largest ? largest : size;
  }
  largest = block_max(largest, slots);
  const bool finite = largest - largest == 0;
  const int exponent = finite && largest > 0 ? exponent_of(largest) : 0;
  for (int i = thread_index(); i < args.rows * args.columns; i += kThreads) {
    const int row = i / args.columns, col = i % args.columns;
    const T x = finite ? scale_by(a[row * args.row_stride + col], -exponent) : static_cast<T>(not_a_number());
    column[layout.transposed ? row * stride + col : col * stride + row] = x;
  }
  const int turned = layout.vectors ? columns : 0;  // numbers of V in a column
  for (int i = thread_index(); i < columns * turned; i += kThreads)
    column[i / columns * stride + rows + i % columns] = i / columns == i % columns;
  sync_block();

  const T tolerance = Limits<T>::kEpsilon * square_root(static_cast<T>(rows));
  // Sweeps, in which every pair of columns meets once; the pairs of a round share no column, as in a tournament. When a
  // sweep rotates nothing all columns are orthogonal, to the tolerance.
  const int players = columns + columns % 2;  // one rests if there is an odd number
  bool busy = columns > 1;
  int sweeps = 0;
  for (; busy && sweeps < kMostSweeps; ++sweeps) {
    bool rotated = false;
    for (int round = 0; round < players - 1; ++round) {
      for (int pair = warp; pair < players / 2; pair += kWarps) {
        int p, q;
        find_pair(round, pair, players, p, q);
        if (p < columns && q < columns)
          rotated |= rotate(column + p * stride, column + q * stride, rows, turned, tolerance);
      }
      sync_block();
    }
    busy = block_max(T(rotated), slots) > 0;  // one answer for the block, or its warps would part at the barriers
  }

  // The columns of A V = U S are orthogonal now: their norms are the singular values.
  for (int j = warp; j < columns; j += kWarps) {
    T square = 0;
    for (int i = lane; i < rows; i += kWarp)
      square = multiply_add(column[j * stride + i], column[j * stride + i], square);
    square = warp_sum(square);
    if (lane == 0) value[j] = square < Limits<T>::kNull ? T(0) : square_root(square);
  }
  sync_block();
  // Largest first: a column's place is the count of those before it, and equal ones keep their order (same bytes).
  for (int j = thread_index(); j < columns; j += kThreads) {
    int place = 0;  // NaN stands before all numbers
    const T mine = value[j];
    for (int i = 0; i < columns; ++i) {
      const T other = value[i];
      const bool before =
          mine != mine ? other != other && i < j : other != other || other > mine || (other == mine && i < j);
      place += before;
    }
    order[place] = j;
  }
  sync_block();

  // Values go back to the scale of A. The host asks nothing meanwhile: NaN tells it of what did not converge.
  T *s = static_cast<T*>(args.s) + matrix * columns, *polar = static_cast<T*>(args.polar);
  T *u = static_cast<T*>(args.u), *vh = static_cast<T*>(args.vh);
  const bool converged = !busy;
  for (int j = thread_index(); j < columns; j += kThreads)
    s[j] = converged ? scale_by(value[order[j]], exponent) : static_cast<T>(not_a_number());
  if (args.sweeps && thread_index() == 0) args.sweeps[matrix] = converged ? sweeps : kMostSweeps + 1;

  // U = A V / S in place; a column of value zero has no direction, and complete_kernel finds one.
  for (int j = warp; j < columns; j += kWarps)
    for (int i = lane; i < rows && value[j] != 0; i += kWarp) column[j * stride + i] /= value[j];
  sync_block();
  // Row i of the j-th left and right vector of A as it was given.
  const auto vector = [&](bool left, int i, int j) {
    return column[order[j] * stride + (left == layout.transposed ? rows : 0) + i];
  };
  if (u)
    for (int i = thread_index(); i < args.rows * columns; i += kThreads)
      u[matrix * args.rows * columns + i] = vector(true, i / columns, i % columns);
  if (vh)
    for (int i = thread_index(); i < columns * args.columns; i += kThreads)
      vh[matrix * columns * args.columns + i] = vector(false, i % args.columns, i / args.columns);
  // U Vh over the values above the floor: summed here, vectors need not be written.
  if (polar)
    for (int i = thread_index(); i < rows * columns; i += kThreads) {
      const T least = static_cast<T>(args.floor) * value[order[0]];
      T sum = 0;
      for (int j = 0; j < columns; ++j)
        if (!(value[order[j]] <= least))
          sum = multiply_add(vector(true, i / args.columns, j), vector(false, i % args.columns, j), sum);
      polar[matrix * rows * columns + i] = sum;
    }
}

// Left vectors of A as it was worked on whose singular value is zero, the last ones, become orthogonal to all others:
// of the unit vectors the one that the others span least, of which at least 1 / rows (squared) is left, made orthogonal
// to them twice (Gram-Schmidt). A block owns a matrix.
template <class T>
THESEUS_KERNEL(kThreads, 2)
complete_kernel(const THESEUS_GRID_CONSTANT SmallSvdArgs args) {
  const Layout layout(args);
  const int rows = layout.rows, columns = layout.columns;
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const int64_t matrix = block_index();
  const T* s = static_cast<const T*>(args.s) + matrix * columns;
  T* vectors = static_cast<T*>(layout.transposed ? args.vh : args.u) + matrix * rows * columns;
  const auto at = [&](int i, int j) -> T& { return vectors[layout.transposed ? j * rows + i : i * columns + j]; };
  T* projection = shared<T>(0, kLargestSvd);
  int rank = columns;
  while (rank > 0 && s[rank - 1] == 0) --rank;
  for (; rank < columns; ++rank) {  // the same in every thread
    for (int i = thread_index(); i < rows; i += kThreads) {
      T spanned = 0;
      for (int j = 0; j < rank; ++j) spanned = multiply_add(at(i, j), at(i, j), spanned);
      at(i, rank) = spanned;
    }
    sync_block();
    int least = 0;
    for (int i = 1; i < rows; ++i) least = at(i, rank) < at(least, rank) ? i : least;
    sync_block();
    for (int i = thread_index(); i < rows; i += kThreads) {
      T rest = i == least;
      for (int j = 0; j < rank; ++j) rest -= at(least, j) * at(i, j);
      at(i, rank) = rest;
    }
    sync_block();
    for (int j = warp; j < rank; j += kWarps) {
      T product = 0;
      for (int i = lane; i < rows; i += kWarp) product = multiply_add(at(i, j), at(i, rank), product);
      product = warp_sum(product);
      if (lane == 0) projection[j] = product;
    }
    sync_block();
    for (int i = thread_index(); i < rows; i += kThreads) {
      T rest = at(i, rank);
      for (int j = 0; j < rank; ++j) rest -= projection[j] * at(i, j);
      at(i, rank) = rest;
    }
    sync_block();
    T square = 0;
    for (int i = lane; i < rows; i += kWarp) square = multiply_add(at(i, rank), at(i, rank), square);
    const T size = square_root(warp_sum(square));  // the same in every warp
    sync_block();
    for (int i = thread_index(); i < rows; i += kThreads) at(i, rank) /= size;  // read next by the same threads
  }
}

template <class T>
int shared_bytes(const SmallSvdArgs& args) {
  return kFixedBytes + Layout(args).elements() * static_cast<int>(sizeof(T));
}

// Matrices [first, first + count) of args.
template <class T>
SmallSvdArgs part_of(SmallSvdArgs args, int64_t first, int64_t count) {
  const int k = std::min(args.rows, args.columns);
  const auto skip = [first](void*& results, int64_t each) {
    if (results) results = static_cast<T*>(results) + first * each;
  };
  args.a = static_cast<const T*>(args.a) + first * args.matrix_stride;
  args.count = count;
  skip(args.s, k), skip(args.u, args.rows * k), skip(args.vh, k * args.columns);
  skip(args.polar, args.rows * args.columns);
  if (args.sweeps) args.sweeps += first;
  return args;
}

template <class T>
const char* launch_svd(const SmallSvdArgs& args, int shared_limit, void* workspace, void* stream, int64_t at_once) {
  const bool fits = shared_bytes<T>(args) <= shared_limit;
  const char* error = nullptr;
  for (int64_t first = 0; first < args.count && !error; first += at_once) {
    const SmallSvdArgs part = part_of<T>(args, first, std::min(at_once, args.count - first));
    error = launch(jacobi_kernel<T>, part.count, kThreads, fits ? shared_bytes<T>(args) : kFixedBytes, stream, part,
                   fits ? nullptr : static_cast<T*>(workspace));
    if (error || !(Layout(args).transposed ? part.vh : part.u)) continue;
    error = launch(complete_kernel<T>, part.count, kThreads, kLargestSvd * static_cast<int>(sizeof(T)), stream, part);
  }
  return error;
}

}  // namespace

size_t small_svd_workspace(const SmallSvdArgs& args, int shared_limit, int64_t at_once) {
  const int bytes = args.dtype == Dtype::float64 ? shared_bytes<double>(args) : shared_bytes<float>(args);
  return bytes <= shared_limit
             ? 0
             : static_cast<size_t>(std::min(args.count, at_once)) * Layout(args).elements() * size_of(args.dtype);
}

const char* small_svd(const SmallSvdArgs& args, int shared_limit, void* workspace, void* stream, int64_t at_once) {
  if (args.rows < 1 || args.columns < 1 || args.rows > kLargestSvd || args.columns > kLargestSvd)
    return "small_svd takes matrices of 1 to 128 rows and columns";
  if (args.dtype == Dtype::float64) return launch_svd<double>(args, shared_limit, workspace, stream, at_once);
  if (args.dtype == Dtype::float32) return launch_svd<float>(args, shared_limit, workspace, stream, at_once);
  return "small_svd works in float32 and float64";
}

}  // namespace theseus::cuda
