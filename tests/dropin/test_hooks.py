"""Hooks and pieces of the model see what they see in torchvision's: values, strides, order and count."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.testing import assert_close
from torchvision.models._utils import IntermediateLayerGetter
from twins import CL, both, images, twins, wide_twins

X = images(2, 40)
X64 = X.double()


def seen_by_hooks(model: nn.Module, attach, modules=None) -> list:
    """(module, shape, strides, values) of everything that hooks on ``modules`` see in a forward and a backward."""
    seen: list = []

    def note(name: str):
        def hook(module, *values):
            for value in values:
                for t in value if isinstance(value, tuple) else (value,):
                    if isinstance(t, torch.Tensor):
                        seen.append((name, tuple(t.shape), t.stride(), t.detach().clone()))

        return hook

    handles = [
        attach(m, note(name))
        for name, m in model.named_modules()
        if modules is None or name in modules
    ]
    x = X64.clone().requires_grad_()
    model(x).square().sum().backward()
    for handle in handles:
        handle.remove()
    return seen


ATTACH = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "pre": lambda m, f: m.register_forward_pre_hook(f),
    "backward": lambda m, f: m.register_full_backward_hook(f),
    "backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}
# Modules that torchvision calls several times with one ReLU in place cannot carry a full backward hook in eager either.
PLACES = {
    "all": None,
    "stages": {"layer1", "layer2", "layer3"},
    "one inside": {"layer2.1.conv2"},
    "projection": {"layer3.0.downsample.1"},
    "stem": {"bn1"},
    "relu": {"layer1.0.relu"},
    "outer": {""},
}


@pytest.mark.parametrize("kind", ATTACH)
@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("train", (False, True))
def test_hooks(kind, where, train) -> None:
    """Values, strides and count, on outer and inner modules; and afterwards the model is as before."""
    modules = PLACES[where]
    models = wide_twins()
    for m in (m for model in models for m in model.modules() if isinstance(m, nn.ReLU)):
        m.inplace = "backward" not in kind
    if (
        where == "all" and "backward" in kind
    ):  # eager adds the residual in place, which a hooked batch norm's output refuses
        modules = {
            n
            for n, m in models[0].named_modules()
            if isinstance(m, (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d))
        }
    if where == "projection" and kind == "backward pre":
        return
    ours, theirs = (seen_by_hooks(model.train(train), ATTACH[kind], modules) for model in models)
    assert [s[:3] for s in ours] == [s[:3] for s in theirs] and ours
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine[3], other[3], rtol=1e-8, atol=1e-8)
    both(models, lambda m: m.eval()(X64))


def test_hooks_in_float32_see_torchvisions_strides() -> None:
    """In float32 the fused path is oneDNN's, which returns NHWC of its own accord."""
    for where in ({"layer1", "layer4"}, {"maxpool"}, {"layer2.0"}, {"avgpool"}, {"fc"}):
        strides = []
        for model in twins():
            seen = []
            for name in where:
                model.get_submodule(name).register_forward_hook(
                    lambda m, i, o, seen=seen: seen.append((i[0].stride(), o.stride()))
                )
            model(X)
            strides.append(seen)
        assert strides[0] == strides[1]


def test_hooks_that_change_values() -> None:
    def double(m, args, out):
        return out * 2

    for name in (
        "layer1.0.conv2",
        "layer2.1.relu",
        "layer3",
        "layer4.0",
        "bn1",
        "layer2.0.downsample",
    ):
        models = wide_twins()
        for model in models:
            model.get_submodule(name).register_forward_hook(double)
            model.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] + 0.1,))
        both(models, lambda m: m(X64))


def test_global_hooks() -> None:
    counts = []
    for model in wide_twins():
        seen: list[str] = []
        handles = [
            register_module_forward_hook(lambda m, i, o, seen=seen: seen.append(type(m).__name__))
        ]
        model(X64)
        for m in (m for m in model.modules() if isinstance(m, nn.ReLU)):
            m.inplace = False
        handles.append(
            register_module_full_backward_hook(
                lambda m, i, o, seen=seen: seen.append(type(m).__name__)
            )
        )
        try:
            model.fc(torch.randn(1, 2048).double()).sum().backward()
        finally:
            for handle in handles:
                handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and len(counts[0]) > 50


def test_gradcam() -> None:
    """Activations and gradients of the last stage, the way the common recipes take them (``view`` included)."""

    def cam(model: nn.Module) -> torch.Tensor:
        kept: dict = {}
        model.layer4.register_forward_hook(lambda m, i, o: kept.update(activation=o))
        model.layer4.register_full_backward_hook(lambda m, i, o: kept.update(gradient=o[0]))
        model(X64)[:, 3].sum().backward()
        n, c = kept["activation"].shape[:2]
        weights = kept["gradient"].view(n, c, -1).mean(2)
        return torch.relu((weights[:, :, None] * kept["activation"].view(n, c, -1)).sum(1)).detach()

    models = wide_twins()
    for m in (m for model in models for m in model.modules() if isinstance(m, nn.ReLU)):
        m.inplace = False
    both(models, cam)


def test_intermediate_layer_getter() -> None:
    ours, theirs = twins()
    layers = {"layer1": "low", "layer4": "high"}
    with torch.no_grad():
        found = [IntermediateLayerGetter(m, layers)(X) for m in (ours, theirs)]
    for name in ("low", "high"):
        assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-4)
        assert found[0][name].stride() == found[1][name].stride()


def test_children_one_by_one() -> None:
    """``nn.Sequential(*children)`` and calls by hand keep torchvision's strides: someone calls ``view`` on them."""
    for layout in (torch.contiguous_format, CL):
        outs = []
        for model in twins("resnet18"):
            body = nn.Sequential(*list(model.children())[:-2])
            with torch.no_grad():
                outs.append(
                    [
                        body(X.contiguous(memory_format=layout)),
                        model.layer2[0](torch.ones(2, 64, 8, 8)),
                        model.layer1[1].conv1(torch.ones(1, 64, 5, 5)),
                    ]
                )
        for mine, other in zip(*outs, strict=True):
            assert mine.stride() == other.stride()
            assert_close(mine, other, rtol=1e-4, atol=1e-4)
