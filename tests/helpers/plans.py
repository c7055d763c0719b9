"""What the tests of plans share: networks whose batch norms are not trivial, images, and the judge of an answer."""

import copy

import torch
from torch import nn

from resnet_fast.dispatch.problem import ACROSS
from resnet_fast.graph.ir import Group
from resnet_fast.testing.rule import assert_rule


def ready(model, seed=0):
    """Eval, with statistics and affines that are not trivial."""
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
    with torch.no_grad():
        assert_rule(got, model(x), copy.deepcopy(model).double()(x.double()))


class Odd(nn.Module):
    """Cannot be looked into."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)


def block(forward):
    return ready(type("Case", (Block,), {"forward": forward})())


def groups(p) -> list[Group]:
    return [s for s in p._lowered.steps if isinstance(s, Group)]


def count(p) -> dict[str, int]:
    return {kind: n for kind in ACROSS if (n := sum(s.op == kind for s in groups(p)))}
