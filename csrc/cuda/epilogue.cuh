// The shared epilogue: y = act(acc * s + t + residual), in float32, rounded once by the caller on store.
// s and t are given, or formed from the batch norm vectors: s = gamma / sqrt(var + eps), t = beta - mean * s.
// Forming them costs five loads and a square root per channel of a tile; as separate ops it would cost four launches
// per batch norm. A plain g++ compiles this header too (host tests).
#pragma once

#include <cmath>

#include "../args.h"
#include "index.h"
#include "vec.cuh"

namespace resnet_fast {

struct Affine {
  float scale, shift;
};

RF_HD Affine affine_from_bn(float gamma, float beta, float mean, float var, float eps) {
  const float scale = gamma / sqrtf(var + eps);
  return {scale, beta - mean * scale};
}

// Channel i of whichever form the caller handed over.
RF_HD Affine load_affine(const AffineArgs& a, int64_t i) {
  if (a.shift != nullptr) return {a.scale == nullptr ? 1.f : load_as_float(a.scale, a.dtype, i), load_as_float(a.shift, a.dtype, i)};
  return affine_from_bn(load_as_float(a.gamma, a.dtype, i), load_as_float(a.beta, a.dtype, i),
                        load_as_float(a.mean, a.dtype, i), load_as_float(a.var, a.dtype, i), a.eps);
}

// ReLU as PyTorch has it: NaN stays NaN (so never fmaxf, which drops it), -0 becomes +0.
RF_HD float activate(float v, Act act) { return act == Act::relu && v <= 0.f ? 0.f : v; }

// Its gradient, from the output as PyTorch has it: zero where out <= 0, so a NaN lets the gradient through.
RF_HD float activate_grad(float dout, float out, Act act) { return act == Act::relu && out <= 0.f ? 0.f : dout; }

RF_HD float epilogue(float acc, const Affine& a, float residual, Act act) {
  return activate(acc * a.scale + a.shift + residual, act);
}

}  // namespace resnet_fast
