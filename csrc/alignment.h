// Where in memory BLAS and LAPACK find what they read: their last bits depend on it.
#pragma once

#include <cstdint>

namespace theseus {

// Bytes: the same values, so aligned, give the same bytes wherever they lie. Torch's own memory is.
constexpr uintptr_t kAlignment = 64;

inline bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

}  // namespace theseus
