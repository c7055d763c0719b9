// What the tests call: csrc's launchers with flat arguments, guarded memory and the settings of the pretended GPU.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>

#include "launch.h"

using namespace resnet_fast;

// A Hopper as a thread finds it that has launched nothing yet.
static void fresh_hopper() {
  host_cuda::settings.shared_limit = host_cuda::kHopperShared;
  host_cuda::context = false;
}

extern "C" {

const char* host_message() { return host_cuda::message; }

void host_settings(unsigned seed, int processors, int late_copies, unsigned first_block) {
  host_cuda::settings = {seed, processors, late_copies != 0, first_block, host_cuda::kSharedLimit};
}

// `bytes` that end where an unreadable page begins; NaN inside, or zeros that take no memory until written.
void* host_guarded(size_t bytes, int poison) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (bytes + page - 1) / page * page;
  auto* base = static_cast<unsigned char*>(
      mmap(nullptr, body + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(base, page, PROT_NONE);
  mprotect(base + page + body, page, PROT_NONE);
  if (poison) std::memset(base + page, 0xff, body);
  host_cuda::guarded[base + page] = body;
  return base + page + body - bytes;
}

void host_release(void* p, size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), body = (bytes + page - 1) / page * page;
  auto* const first = static_cast<unsigned char*>(p) + bytes - body;
  host_cuda::guarded.erase(first);
  munmap(first - page, body + 2 * page);
}

int host_conv(int kernel, const void* x, const void* weight, const void* residual, void* out,
              const void* const* affine, float eps, int affine_dtype, const int64_t* sizes, const int* geometry,
              int dtype, int relu) {
  AffineArgs a;
  a.scale = affine[0], a.shift = affine[1];
  a.gamma = affine[2], a.beta = affine[3], a.mean = affine[4], a.var = affine[5];
  a.eps = eps, a.dtype = DType(affine_dtype);
  const ConvArgs p{x, weight, residual, out, a, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                   sizes[7], sizes[8], geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5],
                   DType(dtype), Act(relu)};
  const auto launch = std::array{conv, pointwise, pointwise_hopper, conv_hopper, conv_cluster_hopper}.at(size_t(kernel));
  if (kernel < 2) {
    host_cuda::settings.shared_limit = host_cuda::kSharedLimit;
  } else {
    fresh_hopper();
  }
  return launch(p, nullptr);
}

int host_tail(const void* x, const void* weight2, const float* bias2, const void* weight3, const float* bias3,
              const void* residual, const void* projection, const void* weight1, const float* bias1, void* y, void* z,
              const int64_t* sizes, int dtype) {
  fresh_hopper();
  return conv_tail_hopper({x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1, y, z, sizes[0],
                           sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], DType(dtype)}, nullptr);
}

// Sizes: n, h, w (of x and out), c, k, h2, w2, c2.
int host_pair(const void* x, const void* weight, const void* x2, const void* weight2, const void* bias, void* out,
              const int64_t* sizes, int stride_h, int stride_w, int dtype) {
  AffineArgs a;
  a.shift = bias;
  const auto [n, h, w, c, k, h2, w2, c2] = std::array{sizes[0], sizes[1], sizes[2], sizes[3],
                                                      sizes[4], sizes[5], sizes[6], sizes[7]};
  const ConvArgs first{x, weight, nullptr, out, a, n, h, w, c, k, 1, 1, h, w, 1, 1, 0, 0, 1, 1, DType(dtype), Act::relu};
  ConvArgs second = first;
  second.x = x2, second.weight = weight2, second.h = h2, second.w = w2, second.c = c2;
  second.stride_h = stride_h, second.stride_w = stride_w;
  fresh_hopper();
  return pointwise_pair_hopper(first, second, nullptr);
}

int64_t host_bn_workspace(int64_t pixels, int64_t channels) { return bn_act_workspace(pixels, channels); }

int host_bn(const void* x, const void* residual, const void* gamma, const void* beta, void* y, float* mean, float* var,
            float* partial, int64_t pixels, int64_t channels, float eps, int dtype, int param_dtype, int relu) {
  return bn_act({x, residual, gamma, beta, y, mean, var, partial, pixels, channels, eps, DType(dtype),
                 DType(param_dtype), Act(relu)}, nullptr);
}

int host_bn_backward(const void* dy, const void* x, const void* y, const void* gamma, const float* mean,
                     const float* var, void* dx, void* dresidual, void* dgamma, void* dbeta, float* partial,
                     int64_t pixels, int64_t channels, float eps, int dtype, int param_dtype, int relu) {
  return bn_act_backward({dy, x, y, gamma, mean, var, dx, dresidual, dgamma, dbeta, partial, pixels, channels, eps,
                          DType(dtype), DType(param_dtype), Act(relu)}, nullptr);
}

int host_add(int backward, const void* a, const void* b, void* out, int64_t count, int dtype, int relu) {
  const BinaryArgs p{a, b, out, count, DType(dtype), Act(relu)};
  return backward ? add_act_backward(p, nullptr) : add_act(p, nullptr);
}

int host_gate(const void* x, const void* y, const void* gate, void* out, int64_t images, int64_t pixels,
              int64_t channels, int dtype, int relu) {
  return add_act_gate({x, y, gate, out, images, pixels, channels, DType(dtype), Act(relu)}, nullptr);
}

int64_t host_gate_workspace(int64_t images, int64_t pixels, int64_t channels, int dtype) {
  GateBackwardArgs p{};
  p.images = images, p.pixels = pixels, p.channels = channels, p.dtype = DType(dtype);
  return add_act_gate_backward_workspace(p);
}

int host_gate_backward(const void* dout, const void* out, const void* x, const void* gate, void* dx, void* dy,
                       void* dgate, float* partial, int64_t images, int64_t pixels, int64_t channels, int dtype,
                       int relu) {
  return add_act_gate_backward({dout, out, x, gate, dx, dy, dgate, partial, images, pixels, channels, DType(dtype),
                                Act(relu)}, nullptr);
}
}
