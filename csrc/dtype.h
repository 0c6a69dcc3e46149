// The element types of tokens and matrices; no torch.
#pragma once

#include <cstdint>

namespace theseus {

enum class Dtype : int32_t { float32, float64, bfloat16, float16 };

// Bytes of one element.
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace theseus
