// The ops of namespace resnet_fast_cpu: schemas, checks, how a kernel's work is shared out among torch's threads.
// Beside csrc/library.cpp the only file that includes torch headers; of the stable ABI too, so one binary loads on torch 2.11 and later.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../checks.h"
#include "amx.h"
#include "cut.h"
#include "kernels.h"

namespace {

using resnet_fast::cpu::ceil_div;
using resnet_fast::cpu::Cut;
using resnet_fast::cpu::Isa;

// The best of this processor that torch's own ATEN_CPU_CAPABILITY ("avx512", "avx2" or "default") lets through; else null.
const Isa* isa() {
  static const Isa* const best = []() -> const Isa* {
    const char* set = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string most = set ? set : "avx512";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!avx2 || most == "default") return nullptr;
    if (!avx512 || most == "avx2") return &resnet_fast::cpu::avx2;
    return __builtin_cpu_supports("avx512bf16") ? &resnet_fast::cpu::avx512_bf16 : &resnet_fast::cpu::avx512;
  }();
  return best;
}

const Isa& needed_isa(const char* op) {
  RF_CHECK(isa(), op, ": got a processor without AVX2, expected one with AVX2 or AVX-512");
  return *isa();
}

int64_t panel() { return isa() ? isa()->panel : 0; }

bool takes_bf16() { return isa() && isa()->bf16; }

bool onednn_has_amx() {
  static const bool has = resnet_fast::cpu::onednn_has_amx();  // oneDNN too reads its variable once
  return has;
}

std::string instructions() { return isa() ? isa()->name : "none"; }

// Each thread's own, and kept: of this size it stays in the thread's L2 from one convolution to the next.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  if (size < floats) memory.reset(new float[floats]), size = floats;
  return memory.get();
}

// Whether the bytes at two addresses are the same, for each row (address, address, bytes) of `places`. Threads take equal shares of all
// bytes; the C library's memcmp is at the speed of memory (measured: wider loads, with prefetches or without, are 4 to 10 % slower).
bool same_bytes(const Tensor& places) {
  RF_CHECK(places.dim() == 2 && places.size(1) == 3 && places.scalar_type() == ScalarType::Long && places.is_contiguous() &&
               places.device().is_cpu(),
           "same_bytes: got places of dtype ", name(places.scalar_type()), " and shape ", shape(places), ", expected Long [N, 3] on the CPU");
  const int64_t number = places.size(0), *const place = places.const_data_ptr<int64_t>();
  int64_t all = 0;
  for (int64_t i = 0; i < number; ++i) all += place[3 * i + 2];
  constexpr int64_t piece = 256 << 10, least = 1 << 20;  // bytes between two looks at what others found; and for a thread
  std::atomic<bool> same{true};
  torch::stable::parallel_for(0, all, least, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0, at = 0; i < number && at < end; at += place[3 * i++ + 2]) {
      const char *const left = reinterpret_cast<const char*>(place[3 * i]), *const right = reinterpret_cast<const char*>(place[3 * i + 1]);
      const int64_t last = std::min(end - at, place[3 * i + 2]);
      for (int64_t k = std::max<int64_t>(begin - at, 0); k < last && same.load(std::memory_order_relaxed); k += piece)
        if (std::memcmp(left + k, right + k, std::min(piece, last - k))) same.store(false, std::memory_order_relaxed);
    }
  });
  return same;
}

void check_cpu(const char* op, const char* what, const Tensor& t) {
  RF_CHECK(t.device().is_cpu(), op, ": got ", what, " on another device, expected CPU tensors");
}

void check_bias(const char* op, const Tensor& bias, int64_t k) {
  RF_CHECK(bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && bias.numel() == k, op, ": got bias of dtype ",
           name(bias.scalar_type()), " and shape ", shape(bias), ", expected Float [", k, "]");
  check_cpu(op, "bias", bias);
}

void check_dense_nhwc(const char* op, const char* what, const Tensor& t, ScalarType dtype) {
  RF_CHECK(t.scalar_type() == dtype, op, ": got ", what, " of dtype ", name(t.scalar_type()), ", expected ", name(dtype));
  check_channels_last(op, what, t);
  check_cpu(op, what, t);
}

// What winograd and conv check of their result.
void check_out(const char* op, const Tensor& out, const std::optional<Tensor>& residual, const Tensor& x, int64_t k, int64_t h,
               int64_t w) {
  check_dense_nhwc(op, "out", out, x.scalar_type());
  RF_CHECK(out.size(0) == x.size(0) && out.size(1) == k && out.size(2) == h && out.size(3) == w, op, ": got out of shape ",
           shape(out), ", expected [", x.size(0), ", ", k, ", ", h, ", ", w, "]");
  RF_CHECK(!out.numel() || out.const_data_ptr() != x.const_data_ptr(), op, ": got x as out, expected memory of its own");
  if (!residual) return;
  check_same_layout(op, "residual", *residual, "out", out);
  check_cpu(op, "residual", *residual);
}

// Filters of [k, c, 3, 3] as winograd takes them.
Tensor winograd_filters(const Tensor& weight) {
  constexpr const char* op = "winograd_filters";
  const Isa& best = needed_isa(op);
  RF_CHECK(weight.dim() == 4 && weight.size(0) % best.panel == 0 && weight.size(2) == 3 && weight.size(3) == 3 &&
               weight.scalar_type() == ScalarType::Float && weight.numel() > 0,
           op, ": got ", name(weight.scalar_type()), " ", shape(weight), ", expected Float [multiple of ", best.panel, ", C, 3, 3]");
  check_cpu(op, "weight", weight);
  const int64_t panels = weight.size(0) / best.panel, c = weight.size(1);
  Tensor filters = empty_strided({panels, 24, c, best.panel}, {24 * c * best.panel, c * best.panel, best.panel, 1},
                                 ScalarType::Float, weight);
  const int64_t stride[4]{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const float* from = weight.const_data_ptr<float>();
  float* to = filters.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    best.winograd_filters(from, stride, c, to, first, last);
  });
  return filters;
}

// Whether `out` is right: where x holds a NaN, an infinity or more than 2^64, it is not, and the caller computes otherwise.
bool winograd(const Tensor& x, const Tensor& filters, const Tensor& bias, const std::optional<Tensor>& residual, Tensor out,
              bool relu) {
  constexpr const char* op = "winograd";
  const Isa& best = needed_isa(op);
  const ScalarType dtype = x.scalar_type();
  RF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": got x of dtype ", name(dtype),
           ", expected Float or BFloat16");
  check_dense_nhwc(op, "x", x, dtype);
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  RF_CHECK(filters.dim() == 4 && filters.size(1) == 24 && filters.size(2) == c && filters.size(3) == best.panel &&
               filters.is_contiguous() && filters.scalar_type() == ScalarType::Float && c % 16 == 0,
           op, ": got filters of shape ", shape(filters), " for x of shape ", shape(x), ", expected those of winograd_filters");
  const int64_t k = filters.size(0) * best.panel;
  check_bias(op, bias, k);
  check_cpu(op, "filters", filters);
  check_out(op, out, residual, x, k, h, w);
  if (!out.numel()) return true;
  const resnet_fast::cpu::WinogradArgs args{x.const_data_ptr(), filters.const_data_ptr<float>(), bias.const_data_ptr<float>(),
                                            residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr(), n, h, w, c,
                                            k, dtype == ScalarType::BFloat16, relu};
  const int64_t tiles = resnet_fast::cpu::tiles_of(n, h, w), panels = filters.size(0);
  constexpr int64_t cache = 1 << 20;  // bytes for the transformed inputs: an L2 of today's servers (measured: 768 KB and 1.75 MB 3–5 % slower)
  const Cut cut(tiles, panels, std::max<int64_t>(1, cache / (resnet_fast::cpu::winograd_scratch(1, c) * 4)),
                torch::stable::get_num_threads());
  std::atomic<int32_t> largest{0};
  torch::stable::parallel_for(0, cut.down * cut.across, 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch(resnet_fast::cpu::winograd_scratch(cut.rows, c));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / cut.across * cut.rows, p = i % cut.across * cut.panels;
      const int32_t met = best.winograd(args, row, std::min(tiles, row + cut.rows), p * best.panel,
                                        std::min(panels, p + cut.panels) * best.panel, memory);
      for (int32_t seen = largest; seen < met && !largest.compare_exchange_weak(seen, met);) {
      }
    }
  });
  return largest < 0x5f800000;  // 2^64
}

void check_conv_dtype(const char* op, const char* what, ScalarType dtype, const Isa& best) {
  RF_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && best.bf16), op, ": got ", what, " of dtype ",
           name(dtype), ", expected Float", best.bf16 ? " or BFloat16" : " (this processor does not multiply BFloat16)");
}

// Panels [first, last) of filters [k, c, r, s]: elements in the order r, s, c, `per` of them side by side for each output
// channel, the last of an odd number beside a zero.
template <class T>
void pack(const void* weight, const int64_t size[4], const int64_t stride[4], int64_t panel, int64_t per, void* filters,
          int64_t first, int64_t last) {
  const int64_t c = size[1], s = size[3], depth = c * size[2] * s, whole = ceil_div(depth, per) * per;
  for (int64_t p = first; p < last; ++p) {
    T* to = static_cast<T*>(filters) + p * whole * panel;
    for (int64_t i = 0; i < whole; ++i) {
      const T* from = static_cast<const T*>(weight) + p * panel * stride[0] + i % c * stride[1] + i / c / s * stride[2] + i / c % s * stride[3];
      for (int64_t k = 0; k < panel; ++k) to[(i - i % per) * panel + k * per + i % per] = i < depth ? from[k * stride[0]] : T(0);
    }
  }
}

// Filters of [k, c, r, s] as conv takes them.
Tensor conv_filters(const Tensor& weight) {
  constexpr const char* op = "conv_filters";
  const Isa& best = needed_isa(op);
  const ScalarType dtype = weight.scalar_type();
  check_conv_dtype(op, "weight", dtype, best);
  RF_CHECK(weight.dim() == 4 && weight.size(0) % best.panel == 0 && weight.numel() > 0, op, ": got weight of shape ",
           shape(weight), ", expected [multiple of ", best.panel, ", C, R, S]");
  check_cpu(op, "weight", weight);
  const int64_t panel = best.panel, panels = weight.size(0) / panel, per = dtype == ScalarType::Float ? 1 : 2;
  const int64_t steps = ceil_div(weight.numel() / weight.size(0), per);
  Tensor filters = empty_strided({panels, steps, panel, per}, {steps * per * panel, per * panel, per, 1}, dtype, weight);
  const int64_t size[4]{weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  const int64_t stride[4]{weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
  const void* from = weight.const_data_ptr();
  void* to = filters.mutable_data_ptr();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t first, int64_t last) {
    (per == 1 ? pack<float> : pack<uint16_t>)(from, size, stride, panel, per, to, first, last);
  });
  return filters;
}

void conv(const Tensor& x, const Tensor& filters, const Tensor& bias, const std::optional<Tensor>& residual, Tensor out,
          std::vector<int64_t> size, int64_t stride, int64_t padding, bool relu) {
  constexpr const char* op = "conv";
  const Isa& best = needed_isa(op);
  const ScalarType dtype = x.scalar_type();
  check_conv_dtype(op, "x", dtype, best);
  check_dense_nhwc(op, "x", x, dtype);
  RF_CHECK(size.size() == 2 && size[0] > 0 && size[1] > 0 && stride > 0 && padding >= 0, op, ": got filters of ", size[0], "x",
           size[1], " with stride ", stride, " and padding ", padding, ", expected sizes and stride of 1 or more, padding of 0 or more");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3), per = dtype == ScalarType::Float ? 1 : 2;
  const int64_t depth = size[0] * size[1] * c;
  RF_CHECK(filters.dim() == 4 && filters.size(1) == ceil_div(depth, per) && filters.size(2) == best.panel &&
               filters.size(3) == per && filters.is_contiguous() && filters.scalar_type() == dtype,
           op, ": got filters of dtype ", name(filters.scalar_type()), " and shape ", shape(filters), " for ", size[0], "x", size[1],
           " on x of dtype ", name(dtype), " and shape ", shape(x), ", expected those of conv_filters");
  const int64_t k = filters.size(0) * best.panel;
  check_bias(op, bias, k);
  check_cpu(op, "filters", filters);
  RF_CHECK(h + 2 * padding >= size[0] && w + 2 * padding >= size[1], op, ": got x of shape ", shape(x), " with padding ", padding,
           ", expected one no smaller than the filters, ", size[0], "x", size[1]);
  const int64_t height = (h + 2 * padding - size[0]) / stride + 1, width = (w + 2 * padding - size[1]) / stride + 1;
  check_out(op, out, residual, x, k, height, width);
  if (!out.numel()) return;
  const resnet_fast::cpu::ConvArgs args{x.const_data_ptr(), filters.const_data_ptr(), bias.const_data_ptr<float>(),
                                        residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr(), n, h, w, c, k,
                                        size[0], size[1], stride, padding, height, width, per == 2, relu};
  const int64_t rows = n * height * width, panels = filters.size(0);
  constexpr int64_t cache = 512 << 10;  // bytes of L2 for a block's rows (measured: 256 KB and 1 MB up to 10 % slower)
  const Cut cut(rows, panels, std::max<int64_t>(14, cache / (depth * 4 / per)), torch::stable::get_num_threads());
  torch::stable::parallel_for(0, cut.down * cut.across, 1, [&](int64_t begin, int64_t end) {
    float* memory = scratch(resnet_fast::cpu::conv_scratch(args, cut.rows));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / cut.across * cut.rows, p = i % cut.across * cut.panels;
      best.conv(args, row, std::min(rows, row + cut.rows), p * best.panel, std::min(panels, p + cut.panels) * best.panel, memory);
    }
  });
}

// ---------------------------------------------------------------- batch norm: chunks of pixels, cut by their number alone

struct Chunks {
  int64_t pixels, of_each, number;

  explicit Chunks(int64_t all) : pixels(all), of_each(std::min<int64_t>(512, std::max<int64_t>(32, ceil_div(all, 64)))) {
    number = ceil_div(all, of_each);
  }

  // run(index, first pixel, last pixel), each thread's last chunk first if `backwards`: it still lies in the cache.
  template <class Run>
  void each(bool backwards, const Run& run) const {
    torch::stable::parallel_for(0, number, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = backwards ? begin + end - 1 - i : i;
        run(k, k * of_each, std::min(pixels, (k + 1) * of_each));
      }
    });
  }
};

template <class Run>
void each_channel(int64_t c, const Run& run) {
  torch::stable::parallel_for(0, c, 64, run);
}

const float* check_channels(const char* op, const char* what, const Tensor& v, int64_t c) {
  RF_CHECK(v.scalar_type() == ScalarType::Float && v.is_contiguous() && v.numel() == c, op, ": got ", what, " of dtype ",
           name(v.scalar_type()), " and shape ", shape(v), ", expected Float [", c, "]");
  check_cpu(op, what, v);
  return v.const_data_ptr<float>();
}

void check_pixels(const char* op, const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  RF_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": got x of dtype ", name(dtype), ", expected Float or BFloat16");
  check_dense_nhwc(op, "x", x, dtype);
  RF_CHECK(x.numel() > 0, op, ": got x of shape ", shape(x), ", expected at least one pixel");
}

void check_like(const char* op, const char* what, const Tensor& t, const Tensor& x) {
  check_same(op, what, t, "x", x);
  check_dense_nhwc(op, what, t, x.scalar_type());
}

void bn_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& residual, Tensor y, Tensor mean,
            Tensor var, double eps, bool relu) {
  constexpr const char* op = "bn_act";
  const Isa& best = needed_isa(op);
  check_pixels(op, x);
  check_like(op, "y", y, x);
  if (residual) check_like(op, "residual", *residual, x);
  const int64_t c = x.size(1), pixels = x.numel() / c;
  const float *gamma = check_channels(op, "weight", weight, c), *beta = check_channels(op, "bias", bias, c);
  check_channels(op, "mean", mean, c), check_channels(op, "var", var, c);
  float *const mu = mean.mutable_data_ptr<float>(), *const variance = var.mutable_data_ptr<float>();
  const Chunks chunks(pixels);
  const std::unique_ptr<float[]> parts(new float[3 * c * chunks.number]), scale(new float[c]);
  const resnet_fast::cpu::BnArgs args{x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr, nullptr, nullptr, mu, scale.get(),
                                      beta, nullptr, nullptr, y.mutable_data_ptr(), nullptr, c, x.scalar_type() == ScalarType::BFloat16, relu};
  chunks.each(false, [&](int64_t k, int64_t first, int64_t last) { best.moments(args, first, last, &parts[3 * c * k]); });
  each_channel(c, [&](int64_t c0, int64_t c1) {
    best.merge_moments(parts.get(), pixels, chunks.of_each, c, c0, c1, mu, variance);
    for (int64_t i = c0; i < c1; ++i) scale[i] = float(gamma[i] / std::sqrt(variance[i] + eps));
  });
  chunks.each(true, [&](int64_t, int64_t first, int64_t last) { best.normalise(args, first, last); });
}

void bn_act_backward(const Tensor& dy, const Tensor& x, const Tensor& y, const Tensor& weight, const Tensor& mean, const Tensor& var, Tensor dx,
                     Tensor dweight, Tensor dbias, const std::optional<Tensor>& dresidual, double eps, bool relu) {
  constexpr const char* op = "bn_act_backward";
  const Isa& best = needed_isa(op);
  check_pixels(op, x);
  check_like(op, "dy", dy, x), check_like(op, "y", y, x), check_like(op, "dx", dx, x);
  if (dresidual) check_like(op, "dresidual", *dresidual, x);
  const int64_t c = x.size(1), pixels = x.numel() / c;
  const float *gamma = check_channels(op, "weight", weight, c), *mu = check_channels(op, "mean", mean, c);
  const float* variance = check_channels(op, "var", var, c);
  check_channels(op, "dweight", dweight, c), check_channels(op, "dbias", dbias, c);
  float *const dgamma = dweight.mutable_data_ptr<float>(), *const dbeta = dbias.mutable_data_ptr<float>();
  const Chunks chunks(pixels);
  const std::unique_ptr<float[]> parts(new float[2 * c * chunks.number]), vectors(new float[3 * c]);
  const std::unique_ptr<double[]> sums(new double[2 * c]);
  float *const scale = vectors.get(), *const level = scale + c, *const slope = level + c;
  const resnet_fast::cpu::BnArgs args{x.const_data_ptr(), nullptr, y.const_data_ptr(), dy.const_data_ptr(), mu, scale, nullptr, level, slope,
                                      dx.mutable_data_ptr(), dresidual ? dresidual->mutable_data_ptr() : nullptr, c,
                                      x.scalar_type() == ScalarType::BFloat16, relu};
  chunks.each(false, [&](int64_t k, int64_t first, int64_t last) { best.sums(args, first, last, &parts[2 * c * k]); });
  each_channel(c, [&](int64_t c0, int64_t c1) {
    double *const sum = sums.get(), *const product = sum + c;
    best.merge_sums(parts.get(), chunks.number, c, c0, c1, sum, product);
    for (int64_t i = c0; i < c1; ++i) {
      const double inverse = 1. / std::sqrt(variance[i] + eps);
      dgamma[i] = float(product[i] * inverse), dbeta[i] = float(sum[i]);
      scale[i] = float(gamma[i] * inverse), level[i] = float(sum[i] / double(pixels));
      slope[i] = float(product[i] * inverse * inverse / double(pixels));
    }
  });
  chunks.each(true, [&](int64_t, int64_t first, int64_t last) { best.gradient(args, first, last); });
}

}  // namespace

STABLE_TORCH_LIBRARY(resnet_fast_cpu, m) {
  m.def("panel() -> int");
  m.def("takes_bf16() -> bool");
  m.def("onednn_has_amx() -> bool");
  m.def("instructions() -> str");
  m.def("same_bytes(Tensor places) -> bool");
  m.def("winograd_filters(Tensor weight) -> Tensor");
  m.def("winograd(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, bool relu) -> bool");
  m.def("conv_filters(Tensor weight) -> Tensor");
  m.def(
      "conv(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, int[2] size, int stride, int padding, bool relu) -> ()");
  m.def(
      "bn_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, float eps, bool relu) -> ()");
  m.def(
      "bn_act_backward(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias, Tensor(d!)? dresidual, float eps, bool relu) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("panel", TORCH_BOX(&panel));
  m.impl("takes_bf16", TORCH_BOX(&takes_bf16));
  m.impl("onednn_has_amx", TORCH_BOX(&onednn_has_amx));
  m.impl("instructions", TORCH_BOX(&instructions));
  m.impl("same_bytes", TORCH_BOX(&same_bytes));
  m.impl("winograd_filters", TORCH_BOX(&winograd_filters));
  m.impl("winograd", TORCH_BOX(&winograd));
  m.impl("conv_filters", TORCH_BOX(&conv_filters));
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
}
