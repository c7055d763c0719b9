"""Plans answer like their model by the error rule: for any shape, in threads, from a snapshot, in their own memory."""

import copy
import threading

import pytest
import torch
from plans import block, images, judge, lowered, programs, ready
from torch import nn

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import use
from resnet_fast.planning.engine import SHAPES
from resnet_fast.testing.rule import assert_rule

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

NORMALIZE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

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


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


def run_in_threads(work, count):
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("name", MODELS)
def test_plan_answers_like_the_model_and_leaves_it_unchanged(name):
    model, x = ready(MODELS[name]()), images()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    run = plan(model, x)

    judge(run(x), model, x)
    assert not model.training
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 33, 47), (2, 96, 32), (5, 64, 64)])
def test_other_shapes_than_the_examples(model, shape):
    run, x = plan(model, images()), images(*shape)
    judge(run(x), model, x)


def test_strided_and_channels_last_inputs(model):
    run, x = plan(model, images()), images(2, 64, 70)[..., 3:67]
    judge(run(x), model, x.contiguous())
    judge(run(x.contiguous(memory_format=torch.channels_last)), model, x.contiguous())


def test_empty_batch(model):
    assert plan(model, images())(images(0)).shape == (0, 1000)


def test_nan_stays_nan_in_its_image(model):
    x = images()
    x[1, 0, 5, 5] = torch.nan
    out = plan(model, images())(x)
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(model, dtype):
    x = images()
    out = plan(model, x, dtype=dtype)(x)

    assert out.dtype == dtype
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert_rule(out, eager, exact)


def test_features(model):
    x, names = images(), ("layer2", "avgpool")
    got = plan(model, x, features=names)(x)

    expected, hooks = {}, []
    for name in names:

        def keep(module, args, out, name=name):
            expected[name] = out.clone()

        hooks.append(getattr(model, name).register_forward_hook(keep))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    assert list(got) == list(names)
    for name in names:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


def test_one_feature_may_be_a_string(model):
    assert list(plan(model, images(), features="layer2")(images())) == ["layer2"]


def test_absent_feature_is_named(model):
    with pytest.raises(ValueError, match="layer9"):
        plan(model, images(), features=("layer9",))


def test_uint8_input_is_normalized_inside(model):
    mean, std = NORMALIZE
    generator = torch.Generator().manual_seed(0)
    photos = torch.randint(0, 256, (2, 40, 56, 3), dtype=torch.uint8, generator=generator)

    run = plan(model, photos, normalize=(mean, torch.tensor(std)))

    pixels = photos.permute(0, 3, 1, 2).float() / 255
    x = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(run(photos), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="uint8"):
        run(x)


def test_softmax(model):
    x = images()
    expected = torch.softmax(model(x).detach(), 1)
    torch.testing.assert_close(plan(model, x, softmax=True)(x), expected, rtol=1e-4, atol=1e-6)


def test_topk(model):
    x = images()
    expected = torch.softmax(model(x).detach(), 1).topk(5, 1)
    probabilities, classes = plan(model, x, topk=5)(x)
    torch.testing.assert_close(probabilities, expected.values, rtol=1e-4, atol=1e-6)
    assert torch.equal(classes, expected.indices)


# ---------------------------------------------------------------- memory


class ReadsResidualAgain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        y = self.stem(x)
        a = torch.relu(self.bn(self.conv(y)) + y)
        b = torch.relu(self.bn(self.conv(a)) + y)  # y again
        return a, b + y


def test_residual_is_overwritten_only_after_its_last_read():
    model, x = ready(ReadsResidualAgain()), images(2, 12, 12)
    got = plan(model, x)(x)
    with torch.no_grad():
        expected = model(x)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_outputs_and_input_belong_to_the_caller(model):
    run, x = plan(model, images(), features=("layer1", "layer4")), images()
    x_before = x.clone()

    first = run(x)
    before = {k: v.clone() for k, v in first.items()}
    run(images(seed=7))

    assert torch.equal(x, x_before)
    for name, value in before.items():
        assert torch.equal(first[name], value), name


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn(self.conv(self.relu(x))),
        lambda self, x: torch.flatten(self.relu(self.bn(self.conv(x))), 1).mul_(2),
        lambda self, x: nn.functional.hardtanh(self.bn(self.conv(x)), inplace=True) * 2,
        lambda self, x: nn.functional.relu(self.bn(self.conv(x)).add_(1), True),
        lambda self, x: self.bn(self.conv(x)).view(x.shape[0], -1).sigmoid_(),
    ],
    ids=["relu of the input", "mul_ of a view", "hardtanh", "relu of add_", "sigmoid_ of a view"],
)
def test_in_place_ops_do_not_write_to_the_input(forward):
    model = block(forward)
    x = images(2, 12, 12).contiguous(memory_format=torch.channels_last)
    x_before = x.clone(memory_format=torch.preserve_format)
    run = plan(model, x)

    with torch.no_grad():
        expected = model(x_before.clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, x_before)


def test_plans_of_one_model_share_weights(model):
    plain = lowered(plan(model, images()))
    with_features = lowered(plan(model, images(), features=("layer1",)))
    with_topk = lowered(plan(model, images(), topk=3))
    other_model = lowered(plan(ready(resnet_fast.resnet18(), seed=5), images()))

    assert plain.filters["relu"] is with_features.filters["relu"]
    assert plain.tensors["fc.weight"] is with_topk.tensors["fc.weight"]
    assert plain.tensors["fc.weight"] is not model.fc.weight
    assert plain.filters["relu"] is not other_model.filters["relu"]


def test_programs_are_bounded(model):
    run = plan(model, images(1, 32, 32))
    for i in range(SHAPES + 3):
        run(images(1, 32, 33 + i))
    assert len(programs(run)) == SHAPES


# ---------------------------------------------------------------- snapshot and refresh


def test_plan_is_a_snapshot_until_refreshed(model):
    model, x = copy.deepcopy(model), images()
    run = plan(model, x)
    old = run(x)

    model.fc.weight.data.mul_(2)
    model.layer1[0].conv1.weight.data.mul_(0.5)

    assert torch.equal(run(x), old)
    judge(run.refresh()(x), model, x)


def test_refresh_without_the_model_raises(model):
    model = copy.deepcopy(model)
    run = plan(model, images())
    del model
    with pytest.raises(RuntimeError, match="gone"):
        run.refresh()


def test_refresh_sees_a_replaced_module(model):
    model = copy.deepcopy(model)
    run = plan(model, images())
    model.fc = nn.Linear(512, 7)
    model.layer1[0].bn1 = nn.Identity()
    judge(run.refresh()(images()), model, images())


def test_hooks_on_submodules_run(model):
    model = copy.deepcopy(model)
    model.layer1.register_forward_hook(lambda module, args, out: out * 2)
    run = plan(model, images())
    with torch.no_grad():
        torch.testing.assert_close(run(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_hooks_on_the_model_itself_are_refused(model):
    model = copy.deepcopy(model)
    model.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="the model itself has hooks"):
        plan(model, images())


# ---------------------------------------------------------------- threads, compilers, autograd


def test_one_plan_in_threads(model):
    run = plan(model, images())
    inputs = [images(1 + i % 2, seed=i) for i in range(8)]
    expected, got = [run(x) for x in inputs], [None] * 8

    def work(i):
        got[i] = run(inputs[i])

    run_in_threads(work, 8)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_plans_are_made_in_threads(model):
    models, failed = [ready(resnet_fast.resnet18(), seed=i) for i in range(3)], []

    def work(i):
        try:
            for _ in range(3):
                plan(models[i % 3], images(1, 32, 32))
        except RuntimeError as problem:
            failed.append(problem)

    run_in_threads(work, 6)
    assert not failed


def test_plan_runs_inside_a_compiled_function(model):
    run, x = plan(model, images()), images()
    compiled = torch.compile(lambda x: run(x) * 2, backend="eager")
    assert torch.equal(compiled(x), run(x) * 2)


def test_answers_can_be_trained_on(model):
    head = nn.Linear(512, 3)
    run = plan(model, images(), features=("avgpool",))
    head(run(images())["avgpool"].flatten(1)).sum().backward()
    assert head.weight.grad is not None


def test_autocast_around_a_plan_changes_nothing(model):
    run = plan(model, images())
    expected = run(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(images()), expected)


def test_a_forced_kernel_runs_in_the_plan(model):
    from resnet_fast.dispatch.registry import _registry, kernel
    from resnet_fast.kernels import aten

    @kernel(
        "test.planned", op="conv_bn_act", supports=lambda p: None if p.pointwise else "only 1×1"
    )
    def planned(*args):
        return aten.conv_bn_act(*args)

    try:
        with use("test.planned"):
            run = plan(model, images())
        kernels = {line.module: line.kernel for line in run.explain(images())}
        assert kernels["layer2.0.downsample.0"] == "test.planned"
        assert kernels["conv1"] != "test.planned"
        judge(run(images()), model, images())
    finally:
        del _registry["test.planned"]
