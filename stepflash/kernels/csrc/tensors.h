// What bindings.cpp makes of tensors: checked pointers, rows and packed weights.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdlib>

#include "api.h"

namespace stepflash {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

inline const Kernels& kernels() {
  static const Kernels* table = select_kernels(std::getenv("STEPFLASH_ISA"));
  TORCH_CHECK(table != nullptr, "stepflash: this processor has none of the compiled instruction sets; set STEPFLASH_NATIVE=0");
  return *table;
}

// Rows of the last dimension; every dimension before it must be evenly strided.
inline View view(const Tensor& t, const char* name) {
  TORCH_CHECK(t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kFloat, name, " must be bfloat16 or float32, got ", t.scalar_type());
  TORCH_CHECK(t.dim() >= 1 && (t.numel() == 0 || t.stride(-1) == 1), name, " must be contiguous in its last dimension");
  View v;
  v.data = t.data_ptr();
  v.stride = t.dim() == 1 ? t.size(0) : t.stride(0);
  v.is_float = t.scalar_type() == at::kFloat;
  return v;
}

inline View view(const OptTensor& t, const char* name) { return t.has_value() ? view(*t, name) : View(); }

// [num_tokens, heads, dim] whose heads follow each other; rows are tokens.
inline View head_view(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 3 && t.stride(1) == t.size(2), name, " must be [num_tokens, num_heads, head_dim] with heads side by side");
  return view(t, name);
}

inline Packed packed(const Tensor& data, int64_t format, int64_t n, int64_t k, int64_t count = 1) {
  TORCH_CHECK(format >= 0 && format < NUM_FORMATS, "unknown weight format ", format);
  Packed p(data.data_ptr(), format, n, k);
  TORCH_CHECK(data.scalar_type() == at::kByte && data.is_contiguous() && data.numel() == count * p.bytes(),
              "packed weight has ", data.numel(), " bytes; format ", format, " of [", count, ", ", n, ", ", k, "] has ", count * p.bytes());
  return p;
}

template <class T>
const T* pointer(const OptTensor& t, at::ScalarType type, const char* name) {
  if (!t.has_value()) return nullptr;
  TORCH_CHECK(t->scalar_type() == type && t->is_contiguous(), name, " must be contiguous ", type);
  return (const T*)t->data_ptr();
}

}  // namespace stepflash
