"""The plan: the model's answers by the error rule from a snapshot, in any shape, in threads, and never somebody else's memory."""

import copy
import threading

import pytest
import torch
from plans import block, images, judge, ready
from torch import nn

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import use
from resnet_fast.planning.plan import SHAPES
from resnet_fast.testing.rule import assert_rule

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


MODELS = {
    "ours": lambda: resnet_fast.resnet18(),
    "torchvision": lambda: torchvision.models.resnet50(),
    "accelerated": lambda: resnet_fast.accelerate(torchvision.models.resnet18()),
    "resnext": lambda: resnet_fast.resnext50_32x4d(),
    "deep stem": lambda: timm.create_model("resnet26d"),
    "se": lambda: timm.create_model("seresnet50"),
    "vgg": lambda: torchvision.models.vgg11_bn(num_classes=10),
    "mobilenet": lambda: torchvision.models.mobilenet_v2(),
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_and_the_model_unchanged(name):
    model, x = ready(MODELS[name]()), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = plan(model, x)
    judge(run(x), model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.training


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 33, 47), (2, 96, 32), (5, 64, 64)])
def test_other_shapes(model, shape):
    run, x = plan(model, images()), images(*shape)
    judge(run(x), model, x)


def test_strange_layouts(model):
    run, x = plan(model, images()), images(2, 64, 70)[..., 3:67]
    judge(run(x), model, x.contiguous())
    judge(run(x.contiguous(memory_format=torch.channels_last)), model, x.contiguous())


def test_empty_batch(model):
    assert plan(model, images())(images(0)).shape == (0, 1000)


def test_nan_stays_nan(model):
    x = images()
    x[1, 0, 5, 5] = torch.nan
    out = plan(model, images())(x)
    assert out[1].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(model, dtype):
    x = images()
    out = plan(model, x, dtype=dtype)(x)
    assert out.dtype == dtype
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert_rule(out, copy.deepcopy(model).to(dtype)(x.to(dtype)), exact)


def test_residuals_are_added_in_place_only_where_nobody_reads_them_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x):
            y = self.stem(x)
            a = torch.relu(self.bn(self.conv(y)) + y)
            b = torch.relu(self.bn(self.conv(a)) + y)  # y again
            return a, b + y

    model, x = ready(Twice()), images(2, 12, 12)
    got = plan(model, x)(x)
    with torch.no_grad():
        for mine, theirs in zip(got, model(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_outputs_and_input_are_the_callers_own(model):
    run, x = plan(model, images(), features=("layer1", "layer4")), images()
    kept = x.clone()
    first = run(x)
    held = {k: v.clone() for k, v in first.items()}
    run(images(seed=7))
    assert torch.equal(x, kept) and all(torch.equal(first[k], held[k]) for k in held)


def test_it_is_a_snapshot_until_refreshed(model):
    model, x = copy.deepcopy(model), images()
    run = plan(model, x)
    old = run(x)
    model.fc.weight.data.mul_(2)
    model.layer1[0].conv1.weight.data.mul_(0.5)
    assert torch.equal(run(x), old)
    judge(run.refresh()(x), model, x)
    del model
    with pytest.raises(RuntimeError, match="gone"):
        run.refresh()


def test_features(model):
    x = images()
    got = plan(model, x, features=("layer2", "avgpool"))(x)
    with torch.no_grad():
        seen = {}
        hooks = [
            getattr(model, k).register_forward_hook(lambda m, a, out, k=k: seen.__setitem__(k, out.clone()))
            for k in ("layer2", "avgpool")
        ]
        model(x)
        [h.remove() for h in hooks]
    assert list(got) == ["layer2", "avgpool"]
    for k, v in got.items():
        torch.testing.assert_close(v, seen[k], rtol=1e-4, atol=1e-5)
    assert list(plan(model, x, features="layer2")(x)) == ["layer2"]
    with pytest.raises(ValueError, match="layer9"):
        plan(model, x, features=("layer9",))


def test_bytes_in_with_the_normalisation_inside(model):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    photos = torch.randint(0, 256, (2, 40, 56, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = plan(model, photos, normalize=(mean, torch.tensor(std)))
    x = (photos.permute(0, 3, 1, 2).float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(run(photos), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        run(x)


def test_probabilities(model):
    x = images()
    p = torch.softmax(model(x).detach(), 1)
    torch.testing.assert_close(plan(model, x, softmax=True)(x), p, rtol=1e-4, atol=1e-6)
    best, classes = plan(model, x, topk=5)(x)
    torch.testing.assert_close(best, p.topk(5, 1).values, rtol=1e-4, atol=1e-6)
    assert torch.equal(classes, p.topk(5, 1).indices)


def test_inside_a_compiled_function_a_plan_runs_as_it_is(model):
    run, x = plan(model, images()), images()
    assert torch.equal(torch.compile(lambda x: run(x) * 2, backend="eager")(x), run(x) * 2)


def test_shapes_are_bounded(model):
    run = plan(model, images(1, 32, 32))
    for i in range(SHAPES + 3):
        run(images(1, 32, 33 + i))
    assert len(run._programs) == SHAPES


def test_threads(model):
    run, xs = plan(model, images()), [images(1 + i % 2, seed=i) for i in range(8)]
    wanted, got = [run(x) for x in xs], [None] * 8

    def work(i):
        got[i] = run(xs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in workers]
    [t.join() for t in workers]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_plans_can_be_made_in_threads(model):
    nets, failed = [ready(resnet_fast.resnet18(), seed=i) for i in range(3)], []

    def work(i):
        try:
            for _ in range(3):
                plan(nets[i % 3], images(1, 32, 32))
        except RuntimeError as problem:
            failed.append(problem)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    [t.start() for t in workers]
    [t.join() for t in workers]
    assert not failed


def test_plans_of_one_model_share_weights(model):
    a, b, c = plan(model, images()), plan(model, images(), features=("layer1",)), plan(model, images(), topk=3)
    assert a._lowered.filters["relu"] is b._lowered.filters["relu"]
    assert a._lowered.tensors["fc.weight"] is c._lowered.tensors["fc.weight"] is not model.fc.weight
    assert (
        plan(ready(resnet_fast.resnet18(), seed=5), images())._lowered.filters["relu"] is not a._lowered.filters["relu"]
    )


def test_a_forced_kernel_runs_in_the_plan(model):
    from resnet_fast.dispatch.registry import _registry, kernel
    from resnet_fast.kernels import aten

    @kernel("test.planned", op="conv_bn_act", supports=lambda p: None if p.pointwise else "only 1×1")
    def planned(*args):
        return aten.conv_bn_act(*args)

    try:
        with use("test.planned"):
            run = plan(model, images())
        kernels = {line.module: line.kernel for line in run.explain(images())}
        assert kernels["layer2.0.downsample.0"] == "test.planned" and kernels["conv1"] != "test.planned"
        judge(run(images()), model, images())
    finally:
        del _registry["test.planned"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn(self.conv(self.relu(x))),
        lambda self, x: torch.flatten(self.relu(self.bn(self.conv(x))), 1).mul_(2),
        lambda self, x: nn.functional.hardtanh(self.bn(self.conv(x)), inplace=True) * 2,
        lambda self, x: nn.functional.relu(self.bn(self.conv(x)).add_(1), True),
        lambda self, x: self.bn(self.conv(x)).view(x.shape[0], -1).sigmoid_(),
    ],
    ids=range(5),
)
def test_writes_in_place_stay_inside(forward):
    model, x = block(forward), images(2, 12, 12).contiguous(memory_format=torch.channels_last)
    kept = x.clone(memory_format=torch.preserve_format)
    run = plan(model, x)
    with torch.no_grad():
        torch.testing.assert_close(
            run(x), model(kept.clone(memory_format=torch.contiguous_format)), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(x, kept)


def test_hooks_on_the_model_are_not_dropped_in_silence(model):
    model = copy.deepcopy(model)
    handle = model.layer1.register_forward_hook(lambda m, a, out: out * 2)
    judge_run = plan(model, images())
    with torch.no_grad():
        torch.testing.assert_close(judge_run(images()), model(images()), rtol=1e-4, atol=1e-5)
    handle.remove()
    model.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(ValueError, match="the model itself has hooks"):
        plan(model, images())


def test_answers_can_be_trained_on(model):
    head = nn.Linear(512, 3)
    run = plan(model, images(), features=("avgpool",))
    head(run(images())["avgpool"].flatten(1)).sum().backward()
    assert head.weight.grad is not None


def test_autocast_around_it_changes_nothing(model):
    run = plan(model, images())
    wanted = run(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(images()), wanted)


def test_a_replaced_module_is_seen_by_refresh(model):
    model = copy.deepcopy(model)
    run = plan(model, images())
    model.fc = nn.Linear(512, 7)
    model.layer1[0].bn1 = nn.Identity()
    judge(run.refresh()(images()), model, images())
