"""A model of ours beside torchvision's with the same state, and what it means that they agree."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, nn

import resnet_fast
from resnet_fast.testing import assert_rule


def shake(model: nn.Module, seed: int = 1) -> nn.Module:
    """Batch norms as training leaves them: statistics away from 0 and 1, some scales negative, zero and tiny."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if getattr(m, "running_mean", None) is not None:
            m.running_mean.copy_(torch.randn(m.running_mean.shape, generator=generator) * 0.3)
            m.running_var.copy_(torch.rand(m.running_var.shape, generator=generator) + 0.5)
            if m.weight is not None:
                with torch.no_grad():
                    m.weight.copy_(torch.randn(m.weight.shape, generator=generator) * 0.3 + 0.9)
                    m.weight[::7], m.weight[3::11] = 0.0, 1e-3
                    m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.2)
    return model


def twins(name: str = "resnet18", num_classes: int = 10, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's), in eval, with equal state; the default is small enough to be run often."""
    torch.manual_seed(0)
    ours = shake(getattr(resnet_fast, name)(num_classes=num_classes, **kwargs))
    theirs = getattr(torchvision.models, name)(num_classes=num_classes, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


def images(n: int = 2, size: int | tuple[int, int] = 32, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(model: nn.Module) -> nn.Module:
    """A float64 copy: the oracle."""
    return copy.deepcopy(model).double()


def assert_agree(ours: nn.Module, theirs: nn.Module, x: Tensor, what: str = "") -> None:
    """The same answer by the error rule, with the same strides, without gradients."""
    with torch.no_grad():
        oracle, eager, got = wide(theirs)(x.double()), theirs(x), ours(x)
    assert got.stride() == eager.stride() and got.dtype == eager.dtype
    assert_rule(got, eager, oracle, what=what or "answer")


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """One forward and backward against a random cotangent: output, every gradient by name, every buffer afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    wanted = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y, list(wanted.values()), cotangent)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return {"answer": y.detach(), **dict(zip(wanted, found, strict=True)), **buffers}


def assert_train_alike(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """One training step's answer, gradients (values and strides) and buffers, by the error rule."""
    exact = gradients(wide(theirs), x.double())
    eager, got = gradients(theirs, x), gradients(ours, x)
    assert list(got) == list(eager)
    for name, value in got.items():
        assert value.stride() == eager[name].stride(), f"{name}: strides {value.stride()}, expected {eager[name].stride()}"
        if value.is_floating_point():
            assert_rule(value, eager[name], exact[name], gradient=name not in ("answer", *dict(ours.named_buffers())), what=name)
        else:
            assert torch.equal(value, eager[name]), name
