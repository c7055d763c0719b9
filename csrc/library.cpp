// The ops of namespace resnet_fast_native: schemas, checks, outputs, device guard, current stream, launch.
// Beside cpu/library.cpp the only file that includes torch headers, and of those only the stable ABI: with
// TORCH_TARGET_VERSION at 2.11 one binary loads on torch 2.11 and later. Users call the ops of namespace `resnet_fast`,
// which own fake and backward.
//
// Registered for every backend, and the device is checked last, so that a machine without a GPU can test the checks.
#include <torch/csrc/stable/accelerator.h>

#include <functional>
#include <tuple>

#include "checks.h"
#include "launch.h"

namespace {

// Last of all checks: everything on the GPU that `tensors[0]` is on.
void check_device(const char* op, std::initializer_list<const Tensor*> tensors) {
  const auto device = (*tensors.begin())->device();
  RF_CHECK(device.is_cuda(), op, ": got tensors on the CPU, expected CUDA tensors");
  for (const Tensor* t : tensors) RF_CHECK(t->device() == device, op, ": got tensors on two devices, expected one");
}

// launcher(args, stream) on the tensor's device and current stream; a CUDA error becomes an exception.
template <class Launcher, class Args>
void launch_on(const char* op, const Tensor& t, const Launcher& launcher, const Args& args) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  const cudaError_t error = launcher(args, static_cast<cudaStream_t>(stream));
  RF_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

using Maybe = std::optional<Tensor>;

Act act_of(bool relu) { return relu ? Act::relu : Act::none; }

Tensor add_act(const Tensor& x, const Tensor& y, const Maybe& gate, bool relu) {
  constexpr const char* op = "add_act";
  const DType dtype = float_type(op, "x", x.scalar_type());
  check_same_layout(op, "y", y, "x", x);
  if (!gate) {
    check_dense(op, "x", x);
    check_device(op, {&x, &y});
    Tensor out = empty_like(x);
    const resnet_fast::BinaryArgs args{x.const_data_ptr(), y.const_data_ptr(), out.mutable_data_ptr(), x.numel(), dtype,
                                       act_of(relu)};
    launch_on(op, x, resnet_fast::add_act, args);
    return out;
  }
  check_channels_last(op, "x", x);
  check_gate(op, *gate, x);
  check_device(op, {&x, &y, &*gate});
  Tensor out = empty_like(x);
  const resnet_fast::GateArgs args{x.const_data_ptr(), y.const_data_ptr(), gate->const_data_ptr(), out.mutable_data_ptr(),
                                   x.size(0), x.size(2) * x.size(3), x.size(1), dtype, act_of(relu)};
  launch_on(op, x, resnet_fast::add_act_gate, args);
  return out;
}

// The gradient of both addends, which are one tensor without a gate.
Tensor add_act_backward(const Tensor& dout, const Tensor& out, bool relu) {
  constexpr const char* op = "add_act_backward";
  const DType dtype = float_type(op, "dout", dout.scalar_type());
  check_same_layout(op, "out", out, "dout", dout);
  check_dense(op, "dout", dout);
  check_device(op, {&dout, &out});
  Tensor d = empty_like(dout);
  const resnet_fast::BinaryArgs args{dout.const_data_ptr(), out.const_data_ptr(), d.mutable_data_ptr(), dout.numel(), dtype,
                                     act_of(relu)};
  launch_on(op, dout, resnet_fast::add_act_backward, args);
  return d;
}

std::tuple<Tensor, Tensor, Tensor> add_act_gate_backward(const Tensor& dout, const Tensor& out, const Tensor& x,
                                                         const Tensor& gate, bool relu) {
  constexpr const char* op = "add_act_gate_backward";
  const DType dtype = float_type(op, "dout", dout.scalar_type());
  check_same_layout(op, "out", out, "dout", dout);
  check_same_layout(op, "x", x, "dout", dout);
  check_channels_last(op, "dout", dout);
  check_gate(op, gate, x);
  check_device(op, {&dout, &out, &x, &gate});
  Tensor dx = empty_like(dout), dy = empty_like(dout), dgate = empty_like(gate);
  resnet_fast::GateBackwardArgs args{dout.const_data_ptr(), out.const_data_ptr(), x.const_data_ptr(),
                                     gate.const_data_ptr(), dx.mutable_data_ptr(), dy.mutable_data_ptr(),
                                     dgate.mutable_data_ptr(), nullptr, x.size(0), x.size(2) * x.size(3), x.size(1),
                                     dtype, act_of(relu)};
  const Tensor partial =
      empty_strided({resnet_fast::add_act_gate_backward_workspace(args)}, {1}, ScalarType::Float, dout);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  launch_on(op, dout, resnet_fast::add_act_gate_backward, args);
  return {dx, dy, dgate};
}

// The four batch norm vectors of K channels as epilogues take them.
resnet_fast::AffineArgs bn_args(const char* op, int64_t k, const Tensor& gamma, const Tensor& beta, const Tensor& mean,
                                const Tensor& var, double eps) {
  RF_CHECK(gamma.dim() == 1 && gamma.size(0) == k, op, ": got gamma of shape ", shape(gamma), ", expected [", k, "]");
  check_same(op, "beta", beta, "gamma", gamma);
  check_same(op, "mean", mean, "gamma", gamma);
  check_same(op, "var", var, "gamma", gamma);
  for (const Tensor* t : {&gamma, &beta, &mean, &var}) {
    RF_CHECK(t->is_contiguous(), op, ": got a strided batch norm vector, expected contiguous ones");
  }
  resnet_fast::AffineArgs args;
  args.gamma = gamma.const_data_ptr();
  args.beta = beta.const_data_ptr();
  args.mean = mean.const_data_ptr();
  args.var = var.const_data_ptr();
  args.eps = float(eps);
  args.dtype = float_type(op, "gamma", gamma.scalar_type());
  return args;
}

// Per-channel scale and shift, or with mean and var the four batch norm vectors, as epilogues take them.
resnet_fast::AffineArgs affine_args(const char* op, int64_t k, const Tensor& scale, const Tensor& shift,
                                    const Maybe& mean, const Maybe& var, double eps) {
  if (mean) return bn_args(op, k, scale, shift, *mean, *var, eps);
  resnet_fast::AffineArgs args = bn_args(op, k, scale, shift, shift, shift, eps);
  std::swap(args.gamma, args.scale);
  std::swap(args.beta, args.shift);
  args.mean = args.var = nullptr;
  return args;
}

int64_t out_size(int64_t size, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

using Pair = std::vector<int64_t>;  // height, width
using ConvLauncher = std::function<cudaError_t(const resnet_fast::ConvArgs&, cudaStream_t)>;

Tensor run_conv(const char* op, const ConvLauncher& launcher, const Tensor& x, const Tensor& weight,
                const Tensor& scale, const Tensor& shift, const Maybe& residual, const Maybe& mean, const Maybe& var,
                double eps, const Pair& stride, const Pair& padding, const Pair& dilation, bool relu) {
  constexpr int64_t kMost = INT32_MAX - 128;  // rows and columns are 32-bit, and the last tile may reach further
  const DType dtype = float_type(op, "x", x.scalar_type());
  check_channels_last(op, "x", x);
  check_channels_last(op, "weight", weight);
  RF_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(1) == x.size(1), op, ": got weight ", shape(weight),
           " ", name(weight.scalar_type()), " for x ", shape(x), " ", name(x.scalar_type()),
           ", expected its channels and dtype (and one group)");
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  const int64_t k = weight.size(0), r = weight.size(2), s = weight.size(3);
  const int64_t out_h = out_size(h, padding[0], dilation[0], r, stride[0]);
  const int64_t out_w = out_size(w, padding[1], dilation[1], s, stride[1]);
  RF_CHECK(out_h > 0 && out_w > 0 && c > 0 && r <= 16 && s <= 16, op, ": got x ", shape(x), " for weight ",
           shape(weight), ", expected at least one output pixel and one channel, and filters of at most 16x16");
  RF_CHECK(n * h * w < kMost && n * out_h * out_w < kMost && c * r * s < kMost && k < kMost, op, ": got x ", shape(x),
           " and weight ", shape(weight), ", expected fewer than 2^31 - 128 pixels, and elements in a filter");
  const auto affine = affine_args(op, k, scale, shift, mean, var, eps);
  Tensor out = empty_strided({n, k, out_h, out_w}, {out_h * out_w * k, 1, out_w * k, k}, x.scalar_type(), x);
  if (residual) {
    check_same(op, "residual", *residual, "out", out);
    check_channels_last(op, "residual", *residual);
  }
  check_device(op, {&x, &weight, &scale, &shift, mean ? &*mean : &x, var ? &*var : &x, residual ? &*residual : &x});
  const resnet_fast::ConvArgs args{x.const_data_ptr(), weight.const_data_ptr(),
                                   residual ? residual->const_data_ptr() : nullptr, out.mutable_data_ptr(), affine,
                                   n, h, w, c, k, r, s, out_h, out_w, int(stride[0]), int(stride[1]), int(padding[0]),
                                   int(padding[1]), int(dilation[0]), int(dilation[1]), dtype, act_of(relu)};
  launch_on(op, x, launcher, args);
  return out;
}

Tensor conv(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift, const Maybe& residual,
            const Maybe& mean, const Maybe& var, double eps, Pair stride, Pair padding, Pair dilation, bool relu) {
  return run_conv("conv", resnet_fast::conv, x, weight, scale, shift, residual, mean, var, eps, stride, padding,
                  dilation, relu);
}

Tensor pointwise(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift, const Maybe& residual,
                 const Maybe& mean, const Maybe& var, double eps, Pair stride, bool relu) {
  RF_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1, "pointwise: got weight ", shape(weight),
           ", expected [K, C, 1, 1]");
  return run_conv("pointwise", resnet_fast::pointwise, x, weight, scale, shift, residual, mean, var, eps, stride,
                  {0, 0}, {1, 1}, relu);
}

// What tensor copies and warp-group products want of a convolution, with `taps` x `taps` filters or any.
void check_hopper(const char* op, const Tensor& x, const Tensor& weight, const Maybe& residual,
                  std::optional<int64_t> taps) {
  RF_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, op, ": got x of dtype ",
           name(x.scalar_type()), ", expected Half or BFloat16");
  const std::string size = taps ? std::to_string(*taps) + ", " + std::to_string(*taps) : "R, S";
  RF_CHECK(weight.dim() == 4 && (!taps || (weight.size(2) == *taps && weight.size(3) == *taps)) &&
               weight.size(0) % 8 == 0 && weight.size(1) % 8 == 0, op, ": got weight ", shape(weight), ", expected [K, C, ",
           size, "] with K and C multiples of 8");
  for (const Tensor* t : {&x, &weight, residual ? &*residual : &x})
    RF_CHECK(reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 == 0, op, ": got ", shape(*t),
             " at an address that is no multiple of 16, expected one");
}

// The steps that tensor copies can take over an image.
void check_steps(const char* op, const Pair& stride) {
  RF_CHECK(stride[0] >= 1 && stride[0] <= 8 && stride[1] >= 1 && stride[1] <= 8, op, ": got strides ", stride[0], " and ",
           stride[1], ", expected 1 to 8");
}

Tensor pointwise_hopper(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                        const Maybe& residual, const Maybe& mean, const Maybe& var, double eps, Pair stride,
                        bool relu) {
  constexpr const char* op = "pointwise_hopper";
  check_hopper(op, x, weight, residual, 1);
  check_steps(op, stride);
  return run_conv(op, resnet_fast::pointwise_hopper, x, weight, scale, shift, residual, mean, var, eps, stride, {0, 0},
                  {1, 1}, relu);
}

// relu(conv(x, weight) + conv(x2, weight2, stride2) + bias).
Tensor pointwise_pair_hopper(const Tensor& x, const Tensor& weight, const Tensor& x2, const Tensor& weight2,
                             const Tensor& bias, Pair stride2) {
  constexpr const char* op = "pointwise_pair_hopper";
  check_hopper(op, x, weight, std::nullopt, 1);
  check_steps(op, stride2);
  check_channels_last(op, "x", x);
  check_channels_last(op, "x2", x2);
  check_channels_last(op, "weight2", weight2);
  RF_CHECK(x2.scalar_type() == x.scalar_type() && weight2.scalar_type() == x.scalar_type(), op, ": got x2 of dtype ",
           name(x2.scalar_type()), " and weight2 ", name(weight2.scalar_type()), ", expected x's, ", name(x.scalar_type()));
  const auto left = [&](int dim, int64_t step) { return (x2.size(dim) + step - 1) / step; };
  RF_CHECK(x2.size(0) == x.size(0) && left(2, stride2[0]) == x.size(2) && left(3, stride2[1]) == x.size(3), op,
           ": got x2 ", shape(x2), ", expected images and pixels that strides ", stride2[0], " and ", stride2[1],
           " make those of x, ", shape(x));
  RF_CHECK(weight2.size(0) == weight.size(0) && weight2.size(1) == x2.size(1) && x2.size(1) > 0 && weight2.size(2) == 1 &&
               weight2.size(3) == 1, op, ": got weight2 ", shape(weight2), ", expected [", weight.size(0), ", ", x2.size(1),
           ", 1, 1], weight's filters and x2's channels");
  check_hopper(op, x2, weight2, std::nullopt, 1);
  RF_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), op, ": got bias of shape ", shape(bias), ", expected [",
           weight.size(0), "]");
  RF_CHECK(x2.device() == x.device() && weight2.device() == x.device(), op, ": got tensors on two devices, expected one");
  const auto launch = [&](resnet_fast::ConvArgs first, cudaStream_t stream) {
    first.affine.scale = nullptr;
    resnet_fast::ConvArgs second = first;
    second.x = x2.const_data_ptr(), second.weight = weight2.const_data_ptr();
    second.h = x2.size(2), second.w = x2.size(3), second.c = x2.size(1);
    second.stride_h = int(stride2[0]), second.stride_w = int(stride2[1]);
    return resnet_fast::pointwise_pair_hopper(first, second, stream);
  };
  return run_conv(op, launch, x, weight, bias, bias, {}, {}, {}, 0.0, {1, 1}, {0, 0}, {1, 1}, true);
}

Tensor conv_hopper(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                   const Maybe& residual, const Maybe& mean, const Maybe& var, double eps, Pair stride, bool relu) {
  constexpr const char* op = "conv_hopper";
  check_hopper(op, x, weight, residual, 3);
  RF_CHECK(stride[0] == stride[1] && (stride[0] == 1 || (stride[0] == 2 && x.size(2) > 1 && x.size(3) > 1)), op,
           ": got stride [", stride[0], ", ", stride[1], "] for x ", shape(x),
           ", expected [1, 1], or [2, 2] with two rows and two columns at least");
  return run_conv(op, resnet_fast::conv_hopper, x, weight, scale, shift, residual, mean, var, eps, stride, {1, 1}, {1, 1},
                  relu);
}

Tensor conv_cluster_hopper(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                           const Maybe& residual, const Maybe& mean, const Maybe& var, double eps, Pair stride,
                           Pair padding, Pair dilation, bool relu) {
  constexpr const char* op = "conv_cluster_hopper";
  check_hopper(op, x, weight, residual, std::nullopt);
  check_steps(op, stride);
  for (int i = 0; i < 2; ++i)
    RF_CHECK(padding[i] <= 127 && dilation[i] * (weight.size(2 + i) - 1) <= 127, op, ": got padding ", padding[i],
             " and a filter that reaches ", dilation[i] * (weight.size(2 + i) - 1), " pixels, expected up to 127");
  return run_conv(op, resnet_fast::conv_cluster_hopper, x, weight, scale, shift, residual, mean, var, eps, stride, padding,
                  dilation, relu);
}

// A folded filter of a tail, its bias, and that many channels as the kernel keeps.
void check_tail_filter(const char* op, const char* what, const Tensor& weight, const Tensor& bias, const Tensor& x,
                       int64_t channels, int64_t taps, int64_t most) {
  RF_CHECK(weight.dim() == 4 && weight.scalar_type() == x.scalar_type() && weight.size(1) == channels &&
               weight.size(2) == taps && weight.size(3) == taps && weight.size(0) > 0 && weight.size(0) <= most, op,
           ": got ", what, " ", shape(weight), " ", name(weight.scalar_type()), ", expected [K, ", channels, ", ", taps,
           ", ", taps, "] ", name(x.scalar_type()), " with K up to ", most);
  check_hopper(op, x, weight, std::nullopt, taps);
  check_channels_last(op, what, weight);
  RF_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0) && bias.scalar_type() == ScalarType::Float &&
               bias.is_contiguous() && reinterpret_cast<uintptr_t>(bias.const_data_ptr()) % 16 == 0, op, ": got ", what,
           "'s bias ", shape(bias), " ", name(bias.scalar_type()), ", expected [", weight.size(0),
           "] Float, contiguous, at a multiple of 16");
}

std::tuple<Tensor, Tensor> conv_tail_hopper(const Tensor& x, const Tensor& weight2, const Tensor& bias2,
                                            const Tensor& weight3, const Tensor& bias3, const Tensor& residual,
                                            const Maybe& projection, const Tensor& weight1, const Tensor& bias1) {
  constexpr const char* op = "conv_tail_hopper";
  const DType dtype = float_type(op, "x", x.scalar_type());
  check_channels_last(op, "x", x);
  RF_CHECK(x.size(1) <= 64, op, ": got x ", shape(x), ", expected up to 64 channels");
  check_tail_filter(op, "weight2", weight2, bias2, x, x.size(1), 3, 64);
  check_tail_filter(op, "weight3", weight3, bias3, x, weight2.size(0), 1, 256);
  check_tail_filter(op, "weight1", weight1, bias1, x, weight3.size(0), 1, projection ? 64 : 128);
  check_channels_last(op, "residual", residual);
  const int64_t n = x.size(0), h = x.size(2), w = x.size(3), added = projection ? residual.size(1) : weight3.size(0);
  RF_CHECK(residual.size(0) == n && residual.size(1) == added && residual.size(2) == h && residual.size(3) == w &&
               residual.scalar_type() == x.scalar_type(), op, ": got residual ", shape(residual), " ",
           name(residual.scalar_type()), ", expected [", n, ", ", added, ", ", h, ", ", w, "] ", name(x.scalar_type()));
  check_hopper(op, residual, weight1, std::nullopt, 1);
  if (projection) {
    RF_CHECK(added <= 64, op, ": got residual ", shape(residual), ", expected up to 64 channels to project");
    check_tail_filter(op, "projection", *projection, bias3, x, added, 1, 256);
  }
  check_device(op, {&x, &weight2, &bias2, &weight3, &bias3, &residual, projection ? &*projection : &x, &weight1, &bias1});
  const auto result = [&](const Tensor& weight) {
    const int64_t k = weight.size(0);
    return empty_strided({n, k, h, w}, {h * w * k, 1, w * k, k}, x.scalar_type(), x);
  };
  Tensor y = result(weight3), z = result(weight1);
  const resnet_fast::TailArgs args{x.const_data_ptr(), weight2.const_data_ptr(), bias2.const_data_ptr<float>(),
                                   weight3.const_data_ptr(), bias3.const_data_ptr<float>(), residual.const_data_ptr(),
                                   projection ? projection->const_data_ptr() : nullptr, weight1.const_data_ptr(),
                                   bias1.const_data_ptr<float>(), y.mutable_data_ptr(), z.mutable_data_ptr(), n, h, w,
                                   x.size(1), weight2.size(0), weight3.size(0), projection ? added : 0, weight1.size(0),
                                   dtype};
  launch_on(op, x, resnet_fast::conv_tail_hopper, args);
  return {y, z};
}

// What both directions of training batch norm get; the number of pixels.
int64_t check_bn(const char* op, const Tensor& x, const Tensor& weight) {
  check_channels_last(op, "x", x);
  RF_CHECK(x.numel() > 0, op, ": got x ", shape(x), ", expected at least one element");
  RF_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.is_contiguous(), op, ": got weight of shape ",
           shape(weight), ", expected [", x.size(1), "], contiguous");
  return x.size(0) * x.size(2) * x.size(3);
}

std::tuple<Tensor, Tensor, Tensor> bn_act(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                          const Maybe& residual, double eps, bool relu) {
  constexpr const char* op = "bn_act";
  const DType dtype = float_type(op, "x", x.scalar_type());
  const int64_t pixels = check_bn(op, x, weight), channels = x.size(1);
  check_same_layout(op, "bias", bias, "weight", weight);
  if (residual) check_same_layout(op, "residual", *residual, "x", x);
  const DType param = float_type(op, "weight", weight.scalar_type());
  check_device(op, {&x, &weight, &bias, residual ? &*residual : &x});
  Tensor y = empty_like(x), mean = empty_strided({channels}, {1}, ScalarType::Float, x), var = empty_like(mean);
  Tensor partial = empty_strided({resnet_fast::bn_act_workspace(pixels, channels)}, {1}, ScalarType::Float, x);
  const resnet_fast::BnArgs args{x.const_data_ptr(), residual ? residual->const_data_ptr() : nullptr,
                                 weight.const_data_ptr(), bias.const_data_ptr(), y.mutable_data_ptr(),
                                 mean.mutable_data_ptr<float>(), var.mutable_data_ptr<float>(),
                                 partial.mutable_data_ptr<float>(), pixels, channels, float(eps), dtype, param,
                                 act_of(relu)};
  launch_on(op, x, resnet_fast::bn_act, args);
  return {y, mean, var};
}

// dresidual is an empty tensor unless it is wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(const Tensor& dy, const Tensor& x, const Tensor& y,
                                                           const Tensor& weight, const Tensor& mean, const Tensor& var,
                                                           double eps, bool relu, bool residual) {
  constexpr const char* op = "bn_act_backward";
  const DType dtype = float_type(op, "x", x.scalar_type());
  const int64_t pixels = check_bn(op, x, weight), channels = x.size(1);
  check_same_layout(op, "dy", dy, "x", x);
  check_same_layout(op, "y", y, "x", x);
  for (const Tensor* t : {&mean, &var}) {
    RF_CHECK(t->scalar_type() == ScalarType::Float && t->dim() == 1 && t->size(0) == channels && t->is_contiguous(), op,
             ": got statistics of shape ", shape(*t), " ", name(t->scalar_type()), ", expected Float [", channels, "]");
  }
  const DType param = float_type(op, "weight", weight.scalar_type());
  check_device(op, {&x, &dy, &y, &weight, &mean, &var});
  Tensor dx = empty_like(x), dweight = empty_like(weight), dbias = empty_like(weight);
  Tensor dresidual = residual ? empty_like(y) : empty_strided({0}, {1}, x.scalar_type(), x);
  Tensor partial = empty_strided({resnet_fast::bn_act_workspace(pixels, channels)}, {1}, ScalarType::Float, x);
  const resnet_fast::BnBackwardArgs args{dy.const_data_ptr(), x.const_data_ptr(), y.const_data_ptr(),
                                         weight.const_data_ptr(), mean.const_data_ptr<float>(),
                                         var.const_data_ptr<float>(), dx.mutable_data_ptr(),
                                         residual ? dresidual.mutable_data_ptr() : nullptr, dweight.mutable_data_ptr(),
                                         dbias.mutable_data_ptr(), partial.mutable_data_ptr<float>(), pixels, channels,
                                         float(eps), dtype, param, act_of(relu)};
  launch_on(op, x, resnet_fast::bn_act_backward, args);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace

// What every convolution takes; padding, dilation and the activation come behind.
#define CONV \
  "(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? mean, Tensor? var, float eps, " \
  "int[2] stride"

STABLE_TORCH_LIBRARY(resnet_fast_native, m) {
  m.def("add_act(Tensor x, Tensor y, Tensor? gate, bool relu) -> Tensor");
  m.def("add_act_backward(Tensor dout, Tensor out, bool relu) -> Tensor");
  m.def("add_act_gate_backward(Tensor dout, Tensor out, Tensor x, Tensor gate, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("conv" CONV ", int[2] padding, int[2] dilation, bool relu) -> Tensor");
  m.def("pointwise" CONV ", bool relu) -> Tensor");
  m.def("pointwise_hopper" CONV ", bool relu) -> Tensor");
  m.def("pointwise_pair_hopper(Tensor x, Tensor weight, Tensor x2, Tensor weight2, Tensor bias, int[2] stride2) "
        "-> Tensor");
  m.def("conv_hopper" CONV ", bool relu) -> Tensor");
  m.def("conv_cluster_hopper" CONV ", int[2] padding, int[2] dilation, bool relu) -> Tensor");
  m.def("conv_tail_hopper(Tensor x, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3, Tensor residual, "
        "Tensor? projection, Tensor weight1, Tensor bias1) -> (Tensor, Tensor)");
  m.def("bn_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, bool relu) -> (Tensor, Tensor, "
        "Tensor)");
  m.def("bn_act_backward(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, float eps, bool "
        "relu, bool residual) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("add_act", TORCH_BOX(&add_act));
  m.impl("add_act_backward", TORCH_BOX(&add_act_backward));
  m.impl("add_act_gate_backward", TORCH_BOX(&add_act_gate_backward));
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("pointwise", TORCH_BOX(&pointwise));
  m.impl("pointwise_hopper", TORCH_BOX(&pointwise_hopper));
  m.impl("pointwise_pair_hopper", TORCH_BOX(&pointwise_pair_hopper));
  m.impl("conv_hopper", TORCH_BOX(&conv_hopper));
  m.impl("conv_cluster_hopper", TORCH_BOX(&conv_cluster_hopper));
  m.impl("conv_tail_hopper", TORCH_BOX(&conv_tail_hopper));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
}
