// Batch norm folded into a convolution's weight and bias, in one launch.
//
//   folded[k, c, r, s] = weight[k, c, r, s] * scale[k],   bias[k] = beta[k] - mean[k] * scale[k],
//   scale[k] = gamma[k] / sqrt(var[k] + eps)
//
// Layout: weight [K, C, R, S] with any strides; folded is dense channels_last, the layout every convolution here reads.
// weight float32, float16 or bfloat16; folded and bias in weight's dtype, or any of the three from a float32 weight.
// Arithmetic in float32, one rounding on store. C is the channels per group: groups need nothing else.
// Floor: K*C*R*S * (bytes in + bytes out), 25.5M weights = 153 MB for a float32 ResNet-50 folded to bfloat16; one
// multiplication an element, so DRAM is the bound. One block a filter: a filter is at most a few kB, so the strided
// reads of an NCHW weight hit in L1 after the first tap.
#include "epilogue.cuh"
#include "launch.cuh"

namespace resnet_fast {
namespace {

template <class T, class O, int V>
__global__ void __launch_bounds__(kThreads)
    fold_bn_kernel(const T* __restrict__ weight, O* __restrict__ folded, O* __restrict__ bias, FoldArgs p) {
  const int64_t k = blockIdx.x;
  const Affine bn = load_affine(p.bn, k);
  if (threadIdx.x == 0) bias[k] = from_float<O>(bn.shift);
  const uint32_t count = uint32_t(p.c * p.r * p.s);
  for (uint32_t i = threadIdx.x * V; i < count; i += kThreads * V) {
    const FilterIndex at = filter_index(i, uint32_t(p.c), uint32_t(p.s));
    float v[V];
    load(weight + k * p.stride_k + at.c * p.stride_c + at.r * p.stride_r + at.s * p.stride_s, v);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= bn.scale;
    store(folded + k * count + i, v);
  }
}

template <class T, class O>
cudaError_t run_fold(const FoldArgs& p, cudaStream_t stream) {
  constexpr int V = kVector<T> < kVector<O> ? kVector<T> : kVector<O>;
  const bool wide = p.c % V == 0 && p.stride_c == 1 && p.stride_k % V == 0 && p.stride_r % V == 0 &&
                    p.stride_s % V == 0 && aligned16(p.weight, p.folded);
  return launch(wide ? fold_bn_kernel<T, O, V> : fold_bn_kernel<T, O, 1>, dim3(unsigned(p.k)), dim3(kThreads), stream,
                static_cast<const T*>(p.weight), static_cast<O*>(p.folded), static_cast<O*>(p.bias), p);
}

}  // namespace

cudaError_t fold_bn(const FoldArgs& p, cudaStream_t stream) {
  if (p.k == 0) return cudaSuccess;
  if (p.weight_dtype == DType::f16) return run_fold<__half, __half>(p, stream);
  if (p.weight_dtype == DType::bf16) return run_fold<__nv_bfloat16, __nv_bfloat16>(p, stream);
  return dispatch(p.out_dtype, [&](auto type) { return run_fold<float, typename decltype(type)::type>(p, stream); });
}

namespace {

const Registration registered[] = {
    {"fold_bn<f32,f32,4>", fold_bn_kernel<float, float, 4>, kThreads},
    {"fold_bn<f32,f16,4>", fold_bn_kernel<float, __half, 4>, kThreads},
    {"fold_bn<f32,bf16,4>", fold_bn_kernel<float, __nv_bfloat16, 4>, kThreads},
    {"fold_bn<f16,f16,8>", fold_bn_kernel<__half, __half, 8>, kThreads},
    {"fold_bn<bf16,bf16,8>", fold_bn_kernel<__nv_bfloat16, __nv_bfloat16, 8>, kThreads},
};

}  // namespace
}  // namespace resnet_fast
