"""What is changed in an accelerated network afterwards counts in its next answer."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import fused, pair
from torch import nn
from torch.nn.utils import parametrize, prune
from torchvision.models.resnet import Bottleneck
from twins import assert_agree, assert_train_alike, images

from resnet_fast.testing.rule import assert_rule


def change_weight(m):
    m.conv1.weight.data.mul_(-1)


def change_through_optimizer(m):
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(m.parameters(), 0.01).step()


def change_statistics(m):
    m.layer1[0].bn2.running_mean.add_(1)


def replace_fc(m):
    torch.manual_seed(3)
    m.fc = nn.Linear(2048, 7)


def replace_relu(m):
    m.layer1[0].relu = nn.SiLU()


def replace_bn(m):
    m.layer2[0].bn1 = nn.GroupNorm(4, 128)


def replace_conv(m):
    torch.manual_seed(3)
    m.layer2[0].conv2 = nn.Conv2d(128, 128, 3, stride=2, padding=1, padding_mode="reflect")


def drop_projection(m):
    m.layer1[0].downsample = nn.Sequential(nn.Conv2d(64, 256, 1), nn.Tanh())


def swap_in_sequence(m):
    m.layer1[0].downsample[1] = nn.Identity()


def patch_class(m):
    m.layer1[0].__class__ = type(
        "Doubled", (Bottleneck,), {"forward": lambda self, x: 2 * Bottleneck.forward(self, x)}
    )


def add_hooks(m):
    for name in ("conv1", "layer1.0.bn2", "layer1.0.downsample", "layer2", "layer3.0", ""):
        m.get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)


def prehooks(m):
    m.layer1[0].downsample.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def pruned(m):
    with torch.no_grad():
        prune.l1_unstructured(m.layer1[0].conv2, "weight", 0.5)


def parametrised(m):
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(m.layer1[0].conv1, "weight", Double())


def to_sync(m):
    nn.SyncBatchNorm.convert_sync_batchnorm(m)


def partly_training(m):
    m.layer1[0].bn1.train()
    m.layer2[0].train()


def own_forward(m):
    m.layer1[0].conv2.forward = lambda x: x[:, :, ::1] * 3


def biased(m):
    m.conv1.bias = nn.Parameter(torch.linspace(-1, 1, 64))


@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_through_optimizer,
        change_statistics,
        replace_fc,
        replace_relu,
        replace_bn,
        replace_conv,
        drop_projection,
        swap_in_sequence,
        patch_class,
        add_hooks,
        prehooks,
        pruned,
        parametrised,
        partly_training,
        own_forward,
        biased,
    ],
    ids=lambda f: f.__name__,
)
def test_what_is_changed_afterwards_counts(change) -> None:
    ours, theirs = pair()
    with torch.no_grad():
        ours(images())  # bind and pack first
    for m in (ours, theirs):
        torch.manual_seed(5)
        change(m)
    x = images(2, 64)
    with torch.no_grad():
        exact, bar = copy.deepcopy(theirs).double()(x.double()), copy.deepcopy(theirs)(x)
        assert_rule(ours(x), bar, exact)


def test_sync_batch_norm_in_eval_stays_fused() -> None:
    ours, theirs = pair()
    to_sync(ours)
    assert fused(ours) == 20
    assert_agree(ours, theirs, images(2, 64))


def test_a_plain_attribute_counts() -> None:
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.twice, self.steps = (
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                False,
                [1, 2],
            )

        def forward(self, x):
            x = self.bn(self.conv(x))
            return x * (2 if self.twice else 1) * sum(self.steps)

    ours, theirs = pair(lambda: Scaled().eval())
    for m in (ours, theirs):
        m(images())
        m.twice = True
        m.steps.append(3)
    assert_agree(ours, theirs, images())


def test_functional_call_and_averaged_model() -> None:
    ours, theirs = pair()
    other = {k: v + 0.01 if v.is_floating_point() else v for k, v in theirs.state_dict().items()}
    with torch.no_grad():
        got = torch.func.functional_call(ours, other, (images(2, 64),))
        theirs.load_state_dict(other)
        torch.testing.assert_close(got, theirs(images(2, 64)), rtol=1e-4, atol=1e-5)
    average = torch.optim.swa_utils.AveragedModel(ours)
    average.update_parameters(theirs)
    assert_agree(average, theirs, images(2, 64))


def test_input_and_frozen_batch_norm_gradients() -> None:
    ours, theirs = pair()
    assert_train_alike(ours, theirs, images(2, 64))
    for m in (ours, theirs):
        for p in m.layer1.parameters():
            p.requires_grad_(False)
    assert_train_alike(ours, theirs, images(2, 64))
