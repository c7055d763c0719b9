// What the host hands to a kernel: plain structs, no torch, no CUDA. library.cpp fills them, cuda/*.cu read them.
//
// To add one kernel file (say cuda/pool.cu):
//   1. here      a struct with its pointers, sizes and strides;
//   2. launch.h  one line: its launcher;
//   3. cuda/pool.cu   the kernel, its launcher and its `Registration`s (setup.py finds the file by itself);
//   4. library.cpp    schema, checks, output allocation, launch.
#pragma once

#include <cstdint>

namespace resnet_fast {

enum class DType : int { f32, f16, bf16 };
enum class Act : int { none, relu };

// Per-channel affine of an epilogue, y = act(acc * s + t + residual): either s and t themselves (a null scale is 1), or
// the four batch norm vectors they are formed from (then gamma, beta, mean and var are set, scale and shift are null).
struct AffineArgs {
  const void* scale = nullptr;
  const void* shift = nullptr;
  const void* gamma = nullptr;
  const void* beta = nullptr;
  const void* mean = nullptr;
  const void* var = nullptr;
  float eps = 0.f;
  DType dtype = DType::f32;  // of whichever vectors are set
};

// Ungated add_act and its backward: both read two tensors of one dense layout and write a third in the same layout.
// Forward: a = x, b = y. Backward: a = dout, b = out.
struct BinaryArgs {
  const void* a;
  const void* b;
  void* out;
  int64_t count;
  DType dtype;
  Act act;
};

// Gated add_act over NHWC-dense tensors [images, pixels, channels]; gate is [images, channels], dense.
struct GateArgs {
  const void* x;
  const void* y;
  const void* gate;
  void* out;
  int64_t images, pixels, channels;
  DType dtype;
  Act act;
};

struct GateBackwardArgs {
  const void* dout;
  const void* out;
  const void* x;
  const void* gate;
  void* dx;
  void* dy;
  void* dgate;     // [images, channels]
  float* partial;  // workspace of add_act_gate_backward_workspace floats, fully overwritten
  int64_t images, pixels, channels;
  DType dtype;
  Act act;
};

// conv and pointwise: everything dense, activations NHWC, weight KRSC (channels_last). Pixels of x and of out each
// fewer than 2^31 - 128, elements any number.
struct ConvArgs {
  const void* x;
  const void* weight;
  const void* residual;  // null: none
  void* out;
  AffineArgs affine;
  int64_t n, h, w, c, k, r, s, out_h, out_w;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  DType dtype;
  Act act;
};

// A bottleneck's tail and the next one's first 1x1: 3x3, 1x1 + residual, 1x1, folded and with ReLU. Everything dense,
// activations NHWC, weights KRSC, biases float32.
struct TailArgs {
  const void* x;            // [n, h, w, channels]
  const void* weight2;      // [middle, 3, 3, channels]
  const float* bias2;
  const void* weight3;      // [wide, middle]
  const float* bias3;       // the projection's too
  const void* residual;     // [n, h, w, wide], or [n, h, w, projected] with a projection
  const void* projection;   // [wide, projected]; null: none
  const void* weight1;      // [next, wide]
  const float* bias1;
  void* y;                  // [n, h, w, wide]
  void* z;                  // [n, h, w, next]
  int64_t n, h, w, channels, middle, wide, projected, next;
  DType dtype;
};

// Training batch norm over [pixels, channels], dense (NHWC). partial: bn_act_workspace(pixels, channels) floats.
struct BnArgs {
  const void* x;
  const void* residual;  // null: none
  const void* gamma;
  const void* beta;
  void* y;
  float* mean;
  float* var;  // biased
  float* partial;
  int64_t pixels, channels;
  float eps;
  DType dtype, param_dtype;
  Act act;
};

struct BnBackwardArgs {
  const void* dy;
  const void* x;
  const void* y;
  const void* gamma;
  const float* mean;
  const float* var;
  void* dx;
  void* dresidual;  // null: not wanted
  void* dgamma;     // param_dtype
  void* dbeta;
  float* partial;
  int64_t pixels, channels;
  float eps;
  DType dtype, param_dtype;
  Act act;
};

}  // namespace resnet_fast
