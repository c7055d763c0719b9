"""A model of ours beside torchvision's with the same state, and what it means that they agree."""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import Tensor, nn

import resnet_fast
from resnet_fast.testing.rule import assert_rule, same_nonfinite

CL = torch.channels_last


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


def twins(name: str = "small", num_classes: int = 10, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) in eval with equal state; "small" has Bottlenecks of a quarter of the width."""
    torch.manual_seed(0)
    pair = []
    for module in (resnet_fast, torchvision.models.resnet):
        if name == "small":
            pair.append(
                module.ResNet(
                    module.Bottleneck,
                    [1, 2, 1, 1],
                    num_classes,
                    **{"width_per_group": 16, **kwargs},
                )
            )
        else:
            pair.append(getattr(module, name)(num_classes=num_classes, **kwargs))
    shake(pair[0])
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0].eval(), pair[1].eval()


def images(
    n: int = 2, size: int | tuple[int, int] = 32, dtype: torch.dtype = torch.float32, seed: int = 2
) -> Tensor:
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(model: nn.Module) -> nn.Module:
    """A float64 copy: the oracle."""
    return copy.deepcopy(model).double()


def wide_twins(name: str = "small", **kwargs) -> list[nn.Module]:
    """The twins in float64."""
    return [wide(model) for model in twins(name, **kwargs)]


def both(models, run) -> None:
    """``run`` of ours and of torchvision's is the same structure with the same values; the models are in float64."""
    found = [run(model) for model in models]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def assert_agree(ours: nn.Module, theirs: nn.Module, x: Tensor, what: str = "answer") -> None:
    """The same answer by the error rule, with the same strides, without gradients."""
    with torch.no_grad():
        oracle, eager, got = wide(theirs)(x.double()), theirs(x), ours(x)
    assert got.stride() == eager.stride() and got.dtype == eager.dtype
    assert_rule(got, eager, oracle, what=what)


def gradients(model: nn.Module, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """One forward and backward against a random cotangent: answer, every gradient by name, every buffer afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = model(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    wanted = {"x": x, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(y, list(wanted.values()), cotangent)
    buffers = {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
    return {"answer": y.detach(), **dict(zip(wanted, found, strict=True)), **buffers}


def assert_train_alike(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """One step's answer, gradients (values, and strides: eager's or the parameter's own) and buffers.

    Gradients are compared in float64: in float32 a rounding that crosses ReLU's kink anywhere in the network makes a
    whole gradient jump, in eager too. Answer and statistics also in float32 by the error rule. The bar is eager in
    NHWC, as our inside is: there torch's batch norm is ten times less exact than in NCHW.
    """
    exact, mine = gradients(wide(theirs), x.double()), gradients(wide(ours), x.double())
    assert list(mine) == list(exact)
    own = {name: p.stride() for name, p in ours.named_parameters()}
    for name, value in mine.items():
        strides = exact[name].stride(), own.get(name)
        assert value.stride() in strides, f"{name}: strides {value.stride()}, expected {strides}"
        torch.testing.assert_close(
            value, exact[name], rtol=1e-8, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )
    bar = gradients(copy.deepcopy(theirs).to(memory_format=CL), x.contiguous(memory_format=CL))
    for name, value in gradients(copy.deepcopy(ours), x).items():
        if name == "answer" or name.startswith("buffer") and value.is_floating_point():
            assert_rule(value, bar[name], exact[name], what=name)
        else:
            assert value.stride() in (exact[name].stride(), own.get(name)) and same_nonfinite(
                value, bar[name]
            ), name
