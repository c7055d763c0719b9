// my_kernel: a 1x1 convolution as a matrix product over pixels, one thread an output, the simplest form that is right.
// Make it fast from here.
//
//   out[m, k] = act(scale[k] * sum_c x[m, c] * filter[k, c] + shift[k] + residual[m, k])      m: pixels of an NHWC tensor
//
// Floor: (M C + K C + M K (1 + residual)) * itemsize bytes, 2 M K C FLOP.
// Check it:  python -m resnet_fast check --kernel my_kernel.cu     (without a GPU: it is built, and cannot run)
// Time it:   python -m resnet_fast bench --kernel my_kernel.cu
#include <resnet_fast_kernel.h>

namespace {

using resnet_fast::Conv;

template <class T>
__global__ void my_kernel(const T* x, const T* filter, const float* scale, const float* shift, const T* residual, T* out,
                          int64_t m_end, int c_end, int k_end, bool relu) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m_end * k_end) return;
  const int64_t m = i / k_end;
  const int k = int(i % k_end);
  float acc = 0;
  for (int c = 0; c < c_end; ++c) {
    acc += resnet_fast::to_float(x[m * c_end + c]) * resnet_fast::to_float(filter[int64_t(k) * c_end + c]);
  }
  float z = acc * scale[k] + shift[k];
  if (residual) z += resnet_fast::to_float(residual[i]);
  if (relu && z < 0) z = 0;  // a NaN stays a NaN, as in torch
  resnet_fast::round_to(out[i], z);
}

const char* supports(const Conv& conv) {
  if (!conv.pointwise() || conv.stride_h != 1 || conv.stride_w != 1) return "it takes only 1×1 convolutions of stride 1, without padding or groups";
  if (conv.pixels() == 0) return "the input is empty";
  return nullptr;
}

cudaError_t launch(const Conv& conv) {
  return with_dtype(conv, [&](auto zero) {
    using T = decltype(zero);
    const int64_t outputs = conv.pixels() * conv.k;
    return resnet_fast::run(my_kernel<T>, dim3(unsigned((outputs + 255) / 256)), dim3(256), 0, conv.stream, static_cast<const T*>(conv.x),
                            static_cast<const T*>(conv.filter), conv.scale, conv.shift, static_cast<const T*>(conv.residual),
                            static_cast<T*>(conv.out), conv.pixels(), int(conv.c), int(conv.k), conv.relu);
  });
}

}  // namespace

RESNET_FAST_KERNEL("experimental.my_kernel", supports, launch)
