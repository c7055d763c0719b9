// The launchers of cuda/*.cu, one line each. A launcher picks grid and instantiation, launches on `stream`, and returns
// the launch's error; it neither allocates nor synchronises. Shapes were checked by the caller, and empty work is fine.
#pragma once

#include <cuda_runtime_api.h>

#include "args.h"

namespace resnet_fast {

cudaError_t add_act(const BinaryArgs&, cudaStream_t);
cudaError_t add_act_backward(const BinaryArgs&, cudaStream_t);
cudaError_t add_act_gate(const GateArgs&, cudaStream_t);
int64_t add_act_gate_backward_workspace(const GateBackwardArgs&);  // floats that `partial` must hold
cudaError_t add_act_gate_backward(const GateBackwardArgs&, cudaStream_t);
cudaError_t pointwise(const ConvArgs&, cudaStream_t);  // R = S = 1, no padding
cudaError_t pointwise_hopper(const ConvArgs&, cudaStream_t);  // strides to 8, 16-bit, C and K multiples of 8, sm_90a
// The sum of two such convolutions with one result: out, residual, affine and activation are the first one's.
cudaError_t pointwise_pair_hopper(const ConvArgs&, const ConvArgs&, cudaStream_t);
cudaError_t conv(const ConvArgs&, cudaStream_t);
cudaError_t conv_hopper(const ConvArgs&, cudaStream_t);  // R = S = 3, stride 1 or 2, padding, dilation 1; 16 bits; sm_90a
cudaError_t conv_cluster_hopper(const ConvArgs&, cudaStream_t);  // strides to 8, 16 bits, C and K multiples of 8; sm_90a
cudaError_t conv_tail_hopper(const TailArgs&, cudaStream_t);  // 16 bits; up to 64 -> 64 -> 256 -> 128 channels; sm_90a
int64_t bn_act_workspace(int64_t pixels, int64_t channels);  // floats that `partial` must hold, either direction
cudaError_t bn_act(const BnArgs&, cudaStream_t);
cudaError_t bn_act_backward(const BnBackwardArgs&, cudaStream_t);

}  // namespace resnet_fast
