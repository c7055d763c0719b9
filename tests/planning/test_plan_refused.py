"""A plan refuses models, options and inputs that it was not made for, each in one sentence."""

import copy

import pytest
import torch
from plans import block, images, judge, ready
from torch import nn

import resnet_fast
from resnet_fast import plan


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


# ---------------------------------------------------------------- models


class Chooses(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_network_that_cannot_be_traced_is_refused():
    with pytest.raises(ValueError, match="Chooses cannot be planned"):
        plan(Chooses(), images())


def test_batch_norm_without_running_statistics_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="1: a batch norm without running statistics"):
        plan(net, images())


def test_a_plan_is_not_a_model(model):
    with pytest.raises(ValueError, match="model: got Plan, expected an nn.Module"):
        plan(plan(model, images()), images())


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrapped_model_is_named(model, wrapper):
    with pytest.raises(ValueError, match="it wraps another model: plan that, model.module$"):
        plan(wrapper(model), images())


def test_compiled_model_is_named(model):
    with pytest.raises(ValueError, match="it wraps another model: plan that, model._orig_mod$"):
        plan(torch.compile(model, backend="eager"), images())


def test_meta_tensors_are_refused(model):
    with pytest.raises(ValueError, match="plan: model: got one with meta tensors"):
        plan(copy.deepcopy(model).to("meta"), images())


def reads_what_a_relu_overwrote(self, x):
    y = self.bn(self.conv(x))
    self.relu(y)
    return self.conv(y) + y


def asks_for_strides(self, x):
    return self.bn(self.conv(x)).as_strided((2, 3), (3, 1))


@pytest.mark.parametrize(
    ("forward", "why"),
    [(reads_what_a_relu_overwrote, "writes in place"), (asks_for_strides, "lies in memory")],
)
def test_forward_that_a_plan_would_answer_otherwise_is_refused(forward, why):
    with pytest.raises(ValueError, match=why):
        plan(block(forward), images(2, 12, 12))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(topk=0), "topk: got 0"),
        (dict(topk="5"), "topk: got '5', expected a whole number"),
        (dict(topk=2.5), "topk: got 2.5"),
        (dict(features=[]), "features: got .., expected names of modules"),
        (dict(features=3), "features: got 3, expected names"),
        (dict(across=3), "across: got 3, expected some of"),
        (dict(across=[None]), "across: got None, expected some of"),
        (dict(topk=1001), "at least 1001 classes, got .2, 1000."),
        (dict(dtype=torch.int8), "dtype: got torch.int8"),
        (dict(topk=2, features=("layer1",)), "features: softmax and topk are of the classes"),
        (dict(cuda_graph=True), "not on CUDA"),
        (dict(normalize=((0, 0, 0), (1, 1, 1))), "expected uint8"),
        (dict(normalize=((0, 0), (1, 1))), "three numbers each"),
        (dict(normalize=((0, 0, 0), (1, 0, 1))), "no std 0"),
        (dict(normalize="imagenet"), "three numbers each"),
    ],
)
def test_impossible_options_are_refused(model, options, words):
    with pytest.raises(ValueError, match=f"plan: .*{words}"):
        plan(model, images(), **options)


def test_softmax_of_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match=r"softmax=True.*got \[2, 3, 64, 64\]"):
        plan(block(lambda self, x: self.bn(self.conv(x))), images(), softmax=True)


def test_tuning_on_a_cpu_is_refused(model):
    with pytest.raises(ValueError, match="GPU"):
        plan(model, images(), tune=True)


# ---------------------------------------------------------------- inputs


def test_example_of_another_rank_or_dtype_is_refused(model):
    with pytest.raises(ValueError, match="expected one 4-D tensor"):
        plan(model, torch.zeros(3, 4))
    with pytest.raises(ValueError, match="got torch.int64"):
        plan(model, images().long())


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.randn(1, 4, 64, 64), "step relu .conv1. does not fit"),
        (torch.randn(3, 64, 64), "3-D"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "uint8"),
    ],
    ids=["channels", "rank", "dtype"],
)
def test_wrong_input_is_refused_and_the_plan_goes_on(model, x, words):
    run = plan(model, images())
    with pytest.raises(ValueError, match=words):
        run(x)
    judge(run(images()), model, images())


def test_wrong_image_size_names_the_size_the_plan_was_made_for():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    )
    run = plan(ready(net), images(2, 8, 8))
    sentence = r"got \[2, 3, 9, 9\] \(the plan was made for \[2, 3, 8, 8\]\): step .* \(torch.nn.functional.linear\)"
    with pytest.raises(ValueError, match=sentence):
        run(images(2, 9, 9))


# ---------------------------------------------------------------- compare


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            lambda x: plan(resnet_fast.resnet34().eval(), x),
            "another network, with layer1.2.bn1, expected one of the same model",
        ),
        (
            lambda x: plan(resnet_fast.resnet18().eval(), x, features=("layer1",)),
            "another network, without avgpool, .* with the same features",
        ),
        (
            lambda x: plan(resnet_fast.resnet18(num_classes=5).eval(), x),
            r"whose fc is .2, 5., expected .2, 1000., as in the other",
        ),
        (lambda x: resnet_fast.resnet18(), "got a ResNet, expected a plan"),
    ],
    ids=["another depth", "other features", "other classes", "no plan"],
)
@pytest.mark.parametrize("as_exact", [False, True])
def test_only_plans_of_one_network_are_compared(model, other, words, as_exact):
    run, x = plan(model, images()), images()
    plans = (run, x, other(x)) if as_exact else (other(x), x)
    with pytest.raises(ValueError, match=f"^plan: compare: .*{words}"):
        run.compare(*plans)


# ---------------------------------------------------------------- transforms


class Wrapped(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (lambda net, x: torch.func.vmap(lambda image: net(image[None])[0])(x), "torch.func"),
        (lambda net, x: torch.func.grad(lambda x: net(x).sum())(x), "torch.func"),
        (lambda net, x: torch.jit.trace(net, x), "torch.jit.trace"),
        (lambda net, x: torch.export.export(net, (x,)), "torch.export"),
    ],
    ids=["vmap", "grad", "trace", "export"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:FutureWarning")
def test_transforms_of_a_plan_are_refused(model, transform, name):
    run, x = plan(model, images()), images()
    sentence = f"^plan: {name} cannot look into a plan, .*: give it the model, in eval, that the plan was made of"
    with pytest.raises(ValueError, match=sentence):
        transform(Wrapped(run), x)
    assert run(x).shape == (2, 1000)
