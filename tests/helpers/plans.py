"""Helpers for tests of plans: networks with nontrivial batch norms, images, and the judge of an answer."""

import copy

import torch
from torch import nn

from resnet_fast.dispatch.problem import ACROSS
from resnet_fast.graph.ir import Group
from resnet_fast.testing.rule import assert_rule


def ready(model, seed=0):
    """Return the model in eval, with nontrivial statistics and affine parameters."""
    torch.manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.normal_(m.bias, std=0.1)
    return model.eval()


def images(n=2, h=64, w=64, seed=1):
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(seed))


def judge(got, model, x):
    """Assert that an answer obeys the error rule, with the model as eager."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_rule(got, model(x), exact)


class Odd(nn.Module):
    """Cannot be traced."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)


def block(forward):
    """Return a Block with this forward."""
    return ready(type("Case", (Block,), {"forward": forward})())


def programs(plan) -> dict:
    """The programs that a plan has built, by input shape."""
    return plan._engine.programs


def lowered(plan):
    """The network as the plan runs it: with groups."""
    return plan._engine.lowered


def groups(plan) -> list[Group]:
    return [step for step in lowered(plan).steps if isinstance(step, Group)]


def count(plan) -> dict[str, int]:
    """How many groups of each kind the plan forms."""
    kinds = [step.op for step in groups(plan)]
    return {kind: kinds.count(kind) for kind in ACROSS if kind in kinds}
