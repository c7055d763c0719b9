"""The schedule: what is traced, what is fused, and above all what must not be."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from eager import outcome
from torch import Tensor, nn
from twins import shake

from resnet_fast.graph.fuse import schedule
from resnet_fast.graph.trace import Untraceable, trace
from resnet_fast.live.accelerate import accelerate, accelerated
from resnet_fast.testing.rule import assert_rule


def layers(path: str, m: nn.Module) -> bool:
    return type(m).__module__.startswith("torch.nn.modules") and type(m) is not nn.Sequential


class Net(nn.Module):
    """Two convolutions, two batch norms and a ReLU under short names; each test gives the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)


def net(forward) -> Net:
    torch.manual_seed(0)
    return shake(type("Case", (Net,), {"forward": forward})())


def ops(m: nn.Module, **options) -> list[tuple[str, str]]:
    return [(s.op, s.act) for s in schedule(m, layers, training=False, **options).steps]


def differentiable(m: nn.Module, x: Tensor, training: bool) -> bool:
    """Whether eager can: some in-place forwards have no backward."""
    try:
        outcome(m, x, training, True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return False
    return True


def assert_like_eager(m: nn.Module, x: Tensor | None = None) -> nn.Module:
    """Eval and training: the answer, what became of the input, every gradient and statistic, as without accelerate."""
    x = torch.randn(3, 4, 6, 5) if x is None else x
    fast = accelerate(copy.deepcopy(m))
    for training in (False, True):
        for backward in (False, True) if differentiable(m, x, training) else (False,):
            results = (
                outcome(fast, x, training, backward),
                outcome(m, x, training, backward),
                outcome(copy.deepcopy(m).double(), x.double(), training, backward),
            )
            for got, eager, exact in zip(*results, strict=True):
                assert (got is None) == (eager is None)
                if got is not None and got.is_floating_point():
                    assert_rule(got, eager, exact, gradient=True)
    return fast


# ---------------------------------------------------------------- what fuses


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda self, x: self.relu(self.bn(self.conv(x))), [("conv_bn_act", "relu")]),
        (lambda self, x: self.bn(self.conv(x)), [("conv_bn_act", "none")]),
        (lambda self, x: F.relu(self.bn(self.conv(x)) + x), [("conv_bn_act", "relu")]),
        (lambda self, x: (x + self.bn(self.conv(x))).relu_(), [("conv_bn_act", "relu")]),
        (lambda self, x: torch.add(self.bn2(self.conv2(x)), x), [("conv_bn_act", "none")]),
        (
            lambda self, x: self.relu(self.bn2(self.conv2(self.relu(self.bn(self.conv(x))))) + x),
            [("conv_bn_act", "relu")] * 2,
        ),
        (
            lambda self, x: torch.relu(self.conv(x) * x.mean((2, 3), keepdim=True) + x),
            [("module", "none"), ("function", "none"), ("add_act", "relu")],
        ),
        (lambda self, x: torch.relu(x + self.conv(x)), [("module", "none"), ("add_act", "relu")]),
    ],
    ids=range(8),
)
def test_fuses(forward, expected) -> None:
    m = net(forward)
    assert ops(m) == expected
    assert_like_eager(m)


def test_the_shortcut_may_be_computed_after_the_chain_began() -> None:
    def forward(self, x):
        out = self.bn(self.conv(x))
        identity = self.bn2(self.conv2(x))
        out += identity
        return self.relu(out)

    steps = schedule(net(forward), layers, training=False).steps
    assert [(s.target, s.act) for s in steps] == [("conv2", "none"), ("conv", "relu")]
    assert steps[1].residual.name == steps[0].output
    assert_like_eager(net(forward))


def test_identities_are_passed_and_a_lone_convolution_fuses_if_wanted() -> None:
    def forward(self, x):
        return self.relu(self.drop(self.bn(self.conv(x)))) + self.conv2(x)

    m = net(forward)
    m.drop = nn.Identity()
    assert ops(m) == [("conv_bn_act", "relu"), ("module", "none"), ("function", "none")]
    assert ops(m, lone=True) == [("conv_bn_act", "relu"), ("conv_bn_act", "none")]
    assert_like_eager(m)


# ---------------------------------------------------------------- what must not


def written_input(self, x):  # the convolution must read x before it is written to
    out = self.conv(x)
    x.relu_()
    return self.bn(out) + x


def written_residual(self, x):  # the sum must read the shortcut before it is written to
    y = self.conv2(x)
    out = self.bn(self.conv(x)) + y
    y.mul_(2)
    return self.relu(out) * y


def written_through_a_view(self, x):
    out = self.conv(x)
    x.flatten(1).mul_(3)
    return self.bn(out) + x


def adds_into_the_shortcut(self, x):
    out = self.bn(self.conv(x))
    x += out
    return self.relu(x) + x


def reads_between(self, x):
    out = self.bn(self.conv(x))
    return self.relu(out + x) * out


def reads_the_convolution_too(self, x):
    z = self.conv(x)
    return self.relu(self.bn(z)) + z


def doubles_itself(self, x):
    out = self.bn(self.conv(x))
    return self.relu(out + out)


def returns_the_middle(self, x):
    out = self.bn(self.conv(x))
    return torch.cat([self.relu(out * 1), out])


def one_convolution_twice(self, x):
    return self.bn(self.conv(x)) + self.bn2(self.conv(x))


def one_norm_twice(self, x):  # statistics are updated in the order of the calls
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x)) * 2
    return self.relu(a + b)


def swaps_in_place(self, x):
    y = x * 1
    y += self.bn(self.conv(x))
    return y.relu_() + self.bn2(self.conv2(y))


def writes_its_input(self, x):
    x.relu_()
    return self.relu(self.bn(self.conv(x)) + x)


def in_place_after(self, x):  # autograd must not have saved what this writes
    out = self.bn(self.conv(x))
    return F.hardtanh(out, inplace=True) + self.bn2(self.conv2(x)).mul_(2)


def gate_in_place(self, x):
    out = self.conv(x)
    out *= x.mean((2, 3), keepdim=True)
    return torch.relu(out + x) + out


def broadcasts(self, x):
    return self.relu(self.bn(self.conv(x)) + x.mean((2, 3), keepdim=True))


def sums_sizes(self, x):
    n = x.shape[2] * x.shape[3] + x.shape[1]
    return self.bn(self.conv(x)) * torch.relu(x.new_ones(1) * n)


@pytest.mark.parametrize(
    "forward",
    [
        written_input,
        written_residual,
        written_through_a_view,
        adds_into_the_shortcut,
        reads_between,
        reads_the_convolution_too,
        doubles_itself,
        returns_the_middle,
        one_convolution_twice,
        one_norm_twice,
        swaps_in_place,
        writes_its_input,
        in_place_after,
        gate_in_place,
        broadcasts,
        sums_sizes,
    ],
    ids=lambda f: f.__name__,
)
def test_hazards_give_what_eager_gives(forward) -> None:
    assert_like_eager(net(forward))


def test_a_sum_in_place_is_seen_by_whoever_holds_the_tensor() -> None:
    assert ops(net(adds_into_the_shortcut))[0] == ("conv_bn_act", "none")
    assert schedule(net(adds_into_the_shortcut), layers).writes_inputs
    assert not schedule(net(lambda self, x: self.relu(self.bn(self.conv(x)))), layers).writes_inputs


def test_one_tensor_given_twice() -> None:
    def forward(self, x, y):
        out = self.conv(x)
        y.mul_(2)
        return self.bn(out) + y

    m, x = net(forward).eval(), torch.randn(2, 4, 5, 5)
    a, b = x.clone(), x.clone()
    with torch.no_grad():
        torch.testing.assert_close(accelerate(copy.deepcopy(m))(a, a), m(b, b))
    assert torch.equal(a, b)


def test_an_opaque_child_may_write_what_it_is_given() -> None:
    class Scribbler(nn.Module):
        def forward(self, x):
            x.mul_(2)
            return x if isinstance(x, Tensor) else None

    def forward(self, x):
        out = self.conv(x)
        y = self.scribbler(x)
        return self.bn(out) + y

    m = net(forward)
    m.scribbler = Scribbler()
    assert_like_eager(m)


# ---------------------------------------------------------------- what cannot be written down


class Refused:
    def by_type(self, x):
        return self.bn(self.conv(x)) if isinstance(x, Tensor) else x

    def by_value(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x

    def by_shape(self, x):
        return self.bn(self.conv(x)) if x.shape[2] > 3 else x

    def by_chance(self, x):
        return self.bn(self.conv(x)) if random.random() < 0.5 else self.conv(x)

    def by_torch_chance(self, x):
        return self.bn(self.conv(x)) if torch.rand(()) < 0.5 else self.conv(x)

    def no_grad(self, x):
        with torch.no_grad():
            return self.bn(self.conv(x))

    def autocast(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.bn(self.conv(x))

    def checkpointed(self, x):
        return torch.utils.checkpoint.checkpoint(
            lambda x: self.bn(self.conv(x)), x, use_reentrant=False
        )

    def counts(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.bn(self.conv(x))

    def collects(self, x):
        self.seen.append(1)
        return self.bn(self.conv(x))

    def a_constant(self, x):
        return self.bn(self.conv(x)) + torch.ones(4, 1, 1)


@pytest.mark.parametrize("name", [n for n in vars(Refused) if not n.startswith("_")])
def test_refused_with_a_sentence_and_left_alone(name: str) -> None:
    m = net(getattr(Refused, name)).eval()
    m.seen = []
    before, state = dict(m.__dict__), random.getstate()
    with pytest.raises(Untraceable, match=r"\w+ \w+"):
        trace(m, layers, False)
    assert m.__dict__.keys() == before.keys() and m.seen == [] and random.getstate() == state
    report = accelerated(accelerate(m))
    assert not report.fused and report.left and "forward" not in m.__dict__
    with pytest.raises(RuntimeError, match="left unfused"):
        accelerate(m, strict=True)


def test_a_child_that_cannot_be_looked_into_stays_one_call() -> None:
    class Odd(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    m = net(lambda self, x: self.relu(self.bn(self.conv(self.odd(x)))))
    m.odd = Odd()
    found = schedule(m, layers, training=False)
    assert [s.target for s in found.steps] == ["odd", "conv"] and "decides by" in found.opaque[
        "odd"
    ]
    assert_like_eager(m)


def test_tracing_fires_no_hook_and_moves_nothing() -> None:
    m = net(lambda self, x: self.relu(self.bn(self.conv(x))))
    fired = []
    for child in m.modules():
        child.register_forward_hook(lambda *a: fired.append(a))
        child.register_forward_pre_hook(lambda *a: fired.append(a))
    before = copy.deepcopy(m.state_dict())
    trace(m, layers, True)
    assert not fired and m.training
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), m.state_dict().values(), strict=True)
    )


def test_outputs_are_what_the_modules_returned() -> None:
    m = net(lambda self, x: self.conv2(self.relu(self.bn(self.conv(x)))))
    found = schedule(m, layers, training=False, outputs=["bn", "relu"])
    assert [s.target for s in found.steps] == ["conv", "relu"] and set(found.output) == {
        "bn",
        "relu",
    }
    with pytest.raises(Untraceable, match="calls no module 'head'"):
        schedule(m, layers, outputs=["head"])


def test_prints_as_a_table() -> None:
    text = str(schedule(net(lambda self, x: self.relu(self.bn(self.conv(x)) + x)), layers))
    assert "conv_bn_act" in text and "relu" in text
