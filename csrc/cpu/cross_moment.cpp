// One pass over the rows: mix, convert, sum, energy. A call owns its columns, so results do not depend on the thread
// count.
#include "../cross_moment.h"

#include <cstring>

// One object file serves every x86-64: the loader picks the widest variant the processor has.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__)
#define THESEUS_CLONES __attribute__((target_clones("default", "arch=haswell", "arch=skylake-avx512")))
#define THESEUS_INLINE inline __attribute__((always_inline))
#else
#define THESEUS_CLONES
#define THESEUS_INLINE inline
#endif

namespace theseus::cpu {
namespace {

template <class To, class From>
THESEUS_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same bits, another type");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct BFloat16 {
  uint16_t bits;
  THESEUS_INLINE operator float() const { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;
  THESEUS_INLINE operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    const float value =
        bits_as<float>(static_cast<uint32_t>(bits & 0x7fff) << 13) * 0x1p112f;  // exponent bias 127 - 15
    const uint32_t special = value >= 65536 ? 0x7f800000 : 0;                   // Inf and NaN had the largest exponent
    return bits_as<float>(bits_as<uint32_t>(value) | special | sign);
  }
};

constexpr int kGroup = 8;  // rows per pass over the accumulators

template <int rows, class T>
THESEUS_INLINE void accumulate(const T* const* x, int64_t count, double* sum, double* energy) {
  for (int64_t j = 0; j < count; ++j) {
    double s = sum[j], e = energy[j];
    for (int row = 0; row < rows; ++row) {
      const double value = x[row][j];
      s += value;
      e += value * value;
    }
    sum[j] = s;
    energy[j] = e;
  }
}

// Row `row` of X: in `out`, or where the token lies when it can be read there.
template <class In, class Out>
THESEUS_INLINE const Out* row_of(const Side& side, int64_t row, int64_t first, int64_t count, Out* out) {
  const In* tokens = static_cast<const In*>(side.tokens) + first;
  const In* less = side.less ? static_cast<const In*>(side.less) + first : nullptr;
  if (!side.row_ptr && !side.weight) {
    const int64_t at = (side.column ? side.column[row] : row) * side.stride;
    const In* token = tokens + at;
    if (!out) return reinterpret_cast<const Out*>(token);
    for (int64_t j = 0; j < count; ++j) out[j] = static_cast<Out>(token[j]);
    for (int64_t j = 0; less && j < count; ++j) out[j] -= static_cast<Out>(less[at + j]);
    return out;
  }
  double mixed[kColumns] = {};
  const int64_t from = side.row_ptr ? side.row_ptr[row] : row, to = side.row_ptr ? side.row_ptr[row + 1] : row + 1;
  for (int64_t entry = from; entry < to; ++entry) {
    const In* token = tokens + side.column[entry] * side.stride;
    const double weight = side.weight ? side.weight[entry] : 1;
    for (int64_t j = 0; j < count; ++j) mixed[j] += weight * static_cast<Out>(token[j]);
    const In* subtracted = less ? less + side.column[entry] * side.stride : nullptr;
    for (int64_t j = 0; subtracted && j < count; ++j) mixed[j] -= weight * static_cast<Out>(subtracted[j]);
  }
  for (int64_t j = 0; j < count; ++j) out[j] = static_cast<Out>(mixed[j]);
  return out;
}

template <class In, class Out>
THESEUS_INLINE void prepare_as(const Side& side, int64_t begin, int64_t end, int64_t first, int64_t last, Out* out) {
  const int64_t count = last - first;
  double sum[kColumns] = {}, energy[kColumns] = {};
  const auto row = [&](int64_t i) {
    return row_of<In>(side, i, first, count, out ? out + (i - begin) * side.width + first : nullptr);
  };
  int64_t i = begin;
  for (; i + kGroup <= end; i += kGroup) {
    const Out* x[kGroup];
    for (int k = 0; k < kGroup; ++k) x[k] = row(i + k);
    accumulate<kGroup>(x, count, sum, energy);
  }
  for (; i < end; ++i) {
    const Out* x = row(i);
    accumulate<1>(&x, count, sum, energy);
  }
  for (int64_t j = 0; j < count; ++j) side.sum[first + j] += sum[j];
  for (int64_t j = 0; j < count; ++j) side.energy[first + j] += energy[j];
}

}  // namespace

THESEUS_CLONES void prepare(const Side& side, int64_t begin, int64_t end, int64_t first, int64_t last, float* out) {
  switch (side.dtype) {
    case Dtype::bfloat16: return prepare_as<BFloat16>(side, begin, end, first, last, out);
    case Dtype::float16: return prepare_as<Half>(side, begin, end, first, last, out);
    default: return prepare_as<float>(side, begin, end, first, last, out);
  }
}

THESEUS_CLONES void prepare(const Side& side, int64_t begin, int64_t end, int64_t first, int64_t last, double* out) {
  switch (side.dtype) {
    case Dtype::bfloat16: return prepare_as<BFloat16>(side, begin, end, first, last, out);
    case Dtype::float16: return prepare_as<Half>(side, begin, end, first, last, out);
    case Dtype::float32: return prepare_as<float>(side, begin, end, first, last, out);
    default: return prepare_as<double>(side, begin, end, first, last, out);
  }
}

THESEUS_CLONES void add(const float* product, double* master, int64_t count) {
  for (int64_t i = 0; i < count; ++i) master[i] += product[i];
}

THESEUS_CLONES void add(const double* product, double* master, int64_t count) {
  for (int64_t i = 0; i < count; ++i) master[i] += product[i];
}

}  // namespace theseus::cpu
