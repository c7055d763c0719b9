"""my_kernel.cu as a kernel: what it takes, and the call. The .cu file is built when it first runs, and again when it changed.

Check it:  python -m resnet_fast check --kernel my_kernel.py
Time it:   python -m resnet_fast bench --kernel my_kernel.py
"""

from pathlib import Path

import torch

from resnet_fast import kernel, reference
from resnet_fast.kernels import runtime

SOURCE = Path(__file__).with_suffix(".cu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def supports(problem):
    """None, or the sentence that says why this problem is not for this kernel."""
    if not problem.pointwise or problem.groups != 1 or problem.stride != (1, 1):
        return "it is a 1×1 convolution of stride 1, without padding or groups"
    if problem.device != "cuda" or problem.dtype not in DTYPES:
        return "it runs on CUDA tensors in float32, float16 and bfloat16"
    if problem.layout != "nhwc" or problem.residual not in (None, "nhwc") or 0 in problem.x:
        return "it wants NHWC tensors that are not empty"
    return None


@kernel("experimental.my_kernel", op="conv_bn_act", supports=supports, available=runtime.available, sources=(str(SOURCE),))
def my_kernel(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act):
    module = runtime.build(SOURCE)
    n, c, h, w = x.shape
    k = weight.shape[0]
    s, t = (v.contiguous() for v in reference.affine(scale, shift, mean, var, eps))
    filters = weight.reshape(k, c).contiguous()
    out = torch.empty((n, k, h, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    module.launch(str(x.dtype).removeprefix("torch."), x.data_ptr(), filters.data_ptr(), s.data_ptr(), t.data_ptr(),
                  0 if residual is None else residual.data_ptr(), out.data_ptr(), n * h * w, c, k, act == "relu",
                  torch.cuda.current_stream(x.device).cuda_stream)
    return out
