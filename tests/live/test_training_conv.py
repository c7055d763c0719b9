"""The convolution of a training step on a CPU: values, gradients, torch's cases, NaN, second derivatives, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast.dispatch import use
from resnet_fast.kernels import cpu_library
from resnet_fast.live import training_conv
from resnet_fast.testing.rule import assert_rule, same_nonfinite

pytestmark = pytest.mark.skipif(
    cpu_library.available() is not None, reason=str(cpu_library.available())
)
NHWC = torch.channels_last


def made(
    n: int = 2, c: int = 64, h: int = 25, w: int = 23, k: int = 32, **changed
) -> tuple[nn.Conv2d, Tensor]:
    conv = nn.Conv2d(c, k, **{"kernel_size": 3, "padding": 1, "bias": False} | changed)
    return conv, torch.randn(n, c, h, w).contiguous(memory_format=NHWC).requires_grad_()


def run(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return training_conv.convolve(conv, x, conv.weight)


def ours(z: Tensor) -> bool:
    return type(z.grad_fn).__name__ == "_WinogradBackward"


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, 1, 1)


@pytest.mark.parametrize(
    "shape",
    [(2, 64, 25, 23, 32), (8, 64, 12, 11, 96), (1, 128, 33, 32, 64), (33, 32, 6, 6, 256)],
    ids=str,
)
def test_values_and_gradients_by_the_rule(shape) -> None:
    conv, x = made(*shape)
    z = run(conv, x)
    assert ours(z)
    dz = torch.randn_like(z)
    found, bar, exact = [], [], []
    for results, live, weight, out in (
        (found, x, conv.weight, z),
        (bar, x, conv.weight, plain(x, conv.weight)),
        (exact, *(t.detach().double().requires_grad_() for t in (x, conv.weight)), None),
    ):
        out = plain(live, weight) if out is None else out
        results += [out.detach(), *torch.autograd.grad(out, (live, weight), dz.to(out.dtype))]
    assert_rule(found[0], bar[0], exact[0])
    for i in (1, 2):
        assert_rule(found[i], bar[i], exact[i], gradient=True)
    assert [t.stride() for t in found] == [t.stride() for t in bar]


@pytest.mark.parametrize(
    "wanted", [(True, False), (False, True), (False, False)], ids=["x", "weight", "neither"]
)
def test_one_gradient_alone(wanted) -> None:
    conv, x = made()
    x.requires_grad_(wanted[0]), conv.weight.requires_grad_(wanted[1])
    z, bar = run(conv, x), plain(x, conv.weight)
    assert z.requires_grad == any(wanted)
    if any(wanted):
        live = x if wanted[0] else conv.weight
        torch.testing.assert_close(
            *(torch.autograd.grad(out, live, torch.ones_like(out)) for out in (z, bar)),
            rtol=1e-3,
            atol=1e-3,
        )


LEFT = {
    "stride": {"stride": 2},
    "no padding": {"padding": 0},
    "size": {"kernel_size": 1, "padding": 0},
    "bias": {"bias": True},
    "few pixels": {"h": 9},
    "groups": {"groups": 2},
    "dilation": {"dilation": 2, "padding": 2},
    "channels": {"c": 24},
    "filters": {"k": 40},
    "many": {"c": 512},
}


@pytest.mark.parametrize("change", LEFT.values(), ids=LEFT)
def test_what_is_left_to_torch(change) -> None:
    conv, x = made(**change)
    z = run(conv, x)
    assert not ours(z) and torch.equal(z, conv(x))


def test_other_layouts_and_dtypes_and_forced_kernels_are_left_to_torch() -> None:
    conv, x = made()
    assert ours(run(conv, x)) and not ours(run(conv, x.contiguous()))
    with use("aten.conv_bn_act"):
        assert not ours(run(conv, x))
        # or use() would say that its kernel was not used
        resnet_fast.ops.conv_bn_act(x, conv.weight, *torch.ones(2, 32))
    conv, x = conv.bfloat16(), x.bfloat16()
    assert not ours(run(conv, x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
@pytest.mark.parametrize("where", ["x", "weight", "dz"])
def test_what_would_spread_over_a_tile_is_computed_as_eager_does(value, where) -> None:
    conv, x = made()
    dz = torch.randn(2, 32, 25, 23).contiguous(memory_format=NHWC)
    with torch.no_grad():
        {"x": x, "weight": conv.weight, "dz": dz}[where][1, 7, 1, 2] = value
    mine, bar = (
        [z, *torch.autograd.grad(z, (x, conv.weight), dz)]
        for z in (run(conv, x), plain(x, conv.weight))
    )
    for got, want in zip(mine, bar, strict=True):
        assert same_nonfinite(got, want)
        # 1e25 drowns no neighbour
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_gradients_of_any_strides() -> None:
    """That of a sum has none, that of a view in NCHW others."""
    conv, x = made()
    for end in (
        torch.sum,
        lambda z: (z.contiguous() * z.detach().contiguous()).sum(),
        lambda z: z[:, :, ::2].pow(2).sum(),
    ):
        mine, bar = (
            torch.autograd.grad(end(z), x)[0] for z in (run(conv, x), plain(x, conv.weight))
        )
        torch.testing.assert_close(mine, bar, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("of", [0, 1], ids=["x", "weight"])
def test_second_derivatives_are_torchs(of) -> None:
    conv, x = made()
    found = []
    for f in (lambda: run(conv, x), lambda: plain(x, conv.weight)):
        first = torch.autograd.grad(f().pow(2).sum(), (x, conv.weight), create_graph=True)
        found.append(torch.autograd.grad(first[of].pow(2).mean(), (x, conv.weight)))
    for mine, bar in zip(*found, strict=True):
        torch.testing.assert_close(mine, bar, rtol=1e-3, atol=1e-3 * float(bar.abs().max()))


def test_an_edit_between_forward_and_backward_is_refused() -> None:
    conv, x = made()
    z = run(conv, x)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_blocks_train_with_it_also_checkpointed(monkeypatch) -> None:
    block, x = (
        resnet_fast.resnet18().train().layer1[0],
        torch.randn(4, 64, 17, 16).contiguous(memory_format=NHWC).requires_grad_(),
    )
    seen, filtered = [], training_conv._filtered
    monkeypatch.setattr(
        training_conv, "_filtered", lambda *args: seen.append(args) or filtered(*args)
    )
    mine = torch.autograd.grad(block(x).sum(), (x, *block.parameters()))
    assert len(seen) == 4  # two convolutions, forward and backward
    again = torch.autograd.grad(
        checkpoint(block, x, use_reentrant=False).sum(), (x, *block.parameters())
    )
    assert len(seen) == 10 and all(torch.equal(*pair) for pair in zip(mine, again, strict=True))
