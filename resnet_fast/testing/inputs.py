"""Where an op's sample arguments come from: random tensors, or meta tensors without data."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..dispatch.problem import Problem


class Inputs(Protocol):
    """Makes the tensors of one call."""

    def normal(
        self, *shape: int, layout: str = "nhwc", dtype: torch.dtype | None = None, std: float = 1.0
    ) -> Tensor:
        """A normally distributed tensor, in the problem's dtype unless another is given."""

    def vectors(self, channels: int) -> list[Tensor]:
        """Scale, shift, mean and variance of a batch norm, at least float32."""

    def restarted(self) -> Inputs:
        """Inputs that give again what these gave from their start."""


class RandomInputs:
    """Random tensors on a device; the affine has negative, zero and tiny scales among others."""

    def __init__(self, problem: Problem, seed: int, device: str | torch.device) -> None:
        self.problem = problem
        self.seed = seed
        self.device = device
        self.wide = torch.promote_types(problem.dtype, torch.float32)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(
        self, *shape: int, layout: str = "nhwc", dtype: torch.dtype | None = None, std: float = 1.0
    ) -> Tensor:
        dtype = dtype or self.problem.dtype
        values = torch.randn(shape, generator=self.generator).mul_(std)
        return lay(values.to(self.device, dtype), layout)

    def vectors(self, channels: int) -> list[Tensor]:
        scale = self.normal(channels, dtype=self.wide)
        shift = self.normal(channels, dtype=self.wide)
        mean = self.normal(channels, dtype=self.wide)
        scale[::5] = 0.0
        scale[1::7] = 1e-3
        var = torch.rand(channels, generator=self.generator).add_(0.1)
        return [scale, shift, mean * 0.5, var.to(self.device, self.wide)]

    def restarted(self) -> RandomInputs:
        return RandomInputs(self.problem, self.seed, self.device)


class MetaInputs:
    """Tensors with shapes, strides and dtypes only."""

    def __init__(self, problem: Problem) -> None:
        self.dtype = problem.dtype
        self.wide = torch.promote_types(problem.dtype, torch.float32)

    def normal(
        self, *shape: int, layout: str = "nhwc", dtype: torch.dtype | None = None, std: float = 1.0
    ) -> Tensor:
        dtype = dtype or self.dtype
        if layout == "nhwc":
            # contiguous() would leave a 1×1 filter's strides as they are, and Triton specialises for strides of 1.
            return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
        return lay(torch.empty(shape, dtype=dtype, device="meta"), layout)

    def vectors(self, channels: int) -> list[Tensor]:
        return [torch.empty(channels, dtype=self.wide, device="meta") for _ in range(4)]

    def restarted(self) -> MetaInputs:
        return self


def lay(t: Tensor, layout: str) -> Tensor:
    """The same values in the named layout; "strided" is a slice of something wider."""
    if t.dim() != 4:
        return t
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        return t.contiguous()
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]
