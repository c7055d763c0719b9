"""Epilogue of every convolution, act(acc·s + t + residual) in float32, rounded once; and the activation's rules.

The per-channel affine is formed here from batch norm's four vectors, so that 53 batch norms cost no launches of their
own and an edited weight or statistic is never missed.
"""

import triton
import triton.language as tl


@triton.jit
def affine(scale, shift, mean, var, eps, k, in_k):
    """Per-channel (s, t), float32 in registers.

    Given as (scale, shift) if ``mean`` is None, else s = γ/√(σ²+ε), t = β − μ·s. Where ``scale`` is None, folded
    weights contain it and s is 1.
    """
    if scale is None:
        s = tl.full(k.shape, 1.0, tl.float32)
    else:
        s = tl.load(scale + k, mask=in_k, other=0.0).to(tl.float32)
    t = tl.load(shift + k, mask=in_k, other=0.0).to(tl.float32)
    if mean is not None:
        s = s * tl.rsqrt(tl.load(var + k, mask=in_k, other=1.0).to(tl.float32) + eps)
        t = t - tl.load(mean + k, mask=in_k, other=0.0).to(tl.float32) * s
    return s, t


@triton.jit
def activate(z, RELU: tl.constexpr):
    """max(z, 0) that keeps NaN, as torch.relu does."""
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def masked(dout, out, at, inside, RELU: tl.constexpr):
    """The gradient before the activation, dout · [out > 0], in float32; a NaN in out lets it through, as in torch."""
    g = tl.load(dout + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        result = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(result <= 0.0, 0.0, g)
    return g


@triton.jit
def finish(
    acc, scale, shift, mean, var, eps, residual, out, m, k, M, K: tl.constexpr, RELU: tl.constexpr
):
    """Store act(acc·s + t + residual) at rows ``m``, channels ``k``, those inside an NHWC result [M, K]."""
    in_k = k < K
    s, t = affine(scale, shift, mean, var, eps, k, in_k)
    inside = (m < M)[:, None] & in_k[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    z = acc * s[None, :] + t[None, :]
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, activate(z, RELU).to(out.dtype.element_ty), mask=inside)
