// What the host side of every op shares, on a GPU and on a CPU: checks that end in one sentence, and outputs.
// Part of library.cpp and cpu/library.cpp, which alone include it (torch's headers cost seconds a file).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "args.h"

namespace {

using resnet_fast::Act;
using resnet_fast::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws one sentence, "op: got X, expected Y". A macro, so that the sentence is built only when it is needed.
#define RF_CHECK(condition, ...) \
  if (!(condition)) throw std::runtime_error(sentence(__VA_ARGS__))

template <class... Part>
inline std::string sentence(const Part&... part) {
  std::ostringstream out;
  (out << ... << part);
  return out.str();
}

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "[") << t.size(i);
  out << (t.dim() ? "]" : "[]");
  return out.str();
}

inline const char* name(ScalarType dtype) { return torch::headeronly::toString(dtype); }

inline DType float_type(const char* op, const char* what, ScalarType dtype) {
  if (dtype == ScalarType::Float) return DType::f32;
  if (dtype == ScalarType::Half) return DType::f16;
  if (dtype == ScalarType::BFloat16) return DType::bf16;
  throw std::runtime_error(
      sentence(op, ": got ", what, " of dtype ", name(dtype), ", expected Float, Half or BFloat16"));
}

inline void check_same(const char* op, const char* what, const Tensor& t, const char* model_name, const Tensor& model) {
  RF_CHECK(t.scalar_type() == model.scalar_type(), op, ": got ", what, " of dtype ", name(t.scalar_type()), " and ",
           model_name, " of dtype ", name(model.scalar_type()), ", expected the same");
  bool same = t.dim() == model.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == model.size(i);
  RF_CHECK(same, op, ": got ", what, " of shape ", shape(t), ", expected ", model_name, "'s shape ", shape(model));
}

// Equal strides wherever they matter (a dimension of one element has none).
inline void check_same_layout(const char* op, const char* what, const Tensor& t, const char* model_name, const Tensor& model) {
  check_same(op, what, t, model_name, model);
  bool same = true;
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == 1 || t.stride(i) == model.stride(i);
  RF_CHECK(same || t.numel() == 0, op, ": got ", what, " with other strides than ", model_name,
           ", expected one memory layout");
}

// Dense: the elements fill their memory without gap or overlap, in any order of dimensions.
inline void check_dense(const char* op, const char* what, const Tensor& t) {
  int64_t filled = 1;
  for (bool grown = true; grown;) {
    grown = false;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) == 1 || t.stride(i) != filled) continue;
      filled *= t.size(i);
      grown = true;
    }
  }
  RF_CHECK(filled == t.numel() || t.numel() == 0, op, ": got ", what,
           " with gaps or overlaps in memory, expected a dense tensor");
}

inline void check_channels_last(const char* op, const char* what, const Tensor& t) {
  RF_CHECK(t.dim() == 4, op, ": got ", what, " of shape ", shape(t), ", expected [N, C, H, W]");
  int64_t expected = 1;
  bool good = true;
  for (int64_t i : {1, 3, 2, 0}) {
    good = good && (t.size(i) == 1 || t.stride(i) == expected);
    expected *= t.size(i);
  }
  RF_CHECK(good || t.numel() == 0, op, ": got ", what, " that is not dense in channels_last, expected channels_last");
}

inline void check_gate(const char* op, const Tensor& gate, const Tensor& x) {
  RF_CHECK(gate.scalar_type() == x.scalar_type(), op, ": got gate of dtype ", name(gate.scalar_type()),
           " and x of dtype ", name(x.scalar_type()), ", expected the same");
  RF_CHECK(gate.dim() == 4 && gate.size(0) == x.size(0) && gate.size(1) == x.size(1) && gate.size(2) == 1 &&
               gate.size(3) == 1,
           op, ": got gate of shape ", shape(gate), ", expected [", x.size(0), ", ", x.size(1), ", 1, 1]");
  check_channels_last(op, "gate", gate);
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                     const Tensor& beside) {
  AtenTensorHandle handle = nullptr;
  const auto device = beside.device();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), int32_t(device.type()), device.index(),
      &handle));
  return Tensor(handle);
}

inline Tensor empty_like(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  return empty_strided({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, t.scalar_type(), t);
}

}  // namespace
