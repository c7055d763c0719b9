"""The plan: the model's answers by the error rule from a snapshot, in any shape, saved, compared, and never somebody else's memory."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import resnet_fast
from resnet_fast import load_plan, plan, whole
from resnet_fast.dispatch import use
from resnet_fast.planned import Filter
from resnet_fast.planning import SHAPES
from resnet_fast.testing import assert_rule
from resnet_fast.whole import PIECE, pieces

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


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


MODELS = {
    "ours": lambda: resnet_fast.resnet18(), "torchvision": lambda: torchvision.models.resnet50(),
    "accelerated": lambda: resnet_fast.accelerate(torchvision.models.resnet18()),
    "resnext": lambda: resnet_fast.resnext50_32x4d(), "deep stem": lambda: timm.create_model("resnet26d"),
    "se": lambda: timm.create_model("seresnet50"), "vgg": lambda: torchvision.models.vgg11_bn(num_classes=10),
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
        hooks = [getattr(model, k).register_forward_hook(lambda m, a, out, k=k: seen.__setitem__(k, out.clone())) for k in ("layer2", "avgpool")]
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


def test_saved_and_loaded(model, tmp_path):
    x = images()
    run = plan(model, x)
    run.save(tmp_path / "net.plan")
    again = load_plan(tmp_path / "net.plan")
    assert torch.equal(again(x), run(x)) and [s.output for s in again.steps] == [s.output for s in run.steps]
    assert [p.name for p in tmp_path.iterdir()] == ["net.plan"]


def test_a_file_can_call_no_other_function(model, tmp_path):
    run = plan(model, images())
    run.save(tmp_path / "net.plan")
    record = torch.load(tmp_path / "net.plan", weights_only=True)
    for bad in ("torch.load", "builtins.getattr", "operator.methodcaller", "torch.nn.functional.__builtins__", "Tensor.zero_", "operator.imul",
                "Tensor._make_subclass", "torch.nn.functional.importlib.import_module"):
        for step in record["steps"]:
            if step["dict"]["op"] == "function":
                step["dict"]["target"] = bad
        torch.save(record, tmp_path / "bad.plan")
        with pytest.raises(ValueError, match="no saved plan does"):
            load_plan(tmp_path / "bad.plan")
    record["resnet_fast_plan"] = 99
    torch.save(record, tmp_path / "bad.plan")
    with pytest.raises(ValueError, match="version 99"):
        load_plan(tmp_path / "bad.plan")


def test_foreign_and_torn_files_are_refused_in_a_sentence(model, tmp_path):
    plan(model, images()).save(tmp_path / "net.plan")
    whole = (tmp_path / "net.plan").read_bytes()
    torch.save(model, tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "state")
    for name, content in {"empty": b"", "text": b"hello", "torn": whole[:-2000], "flipped": whole[:300] + b"XXXX" + whole[304:]}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "torn", "flipped", "pickled", "state"):
        with pytest.raises(ValueError, match=f"plan: .*{name}: not a plan"):
            load_plan(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "absent")


@pytest.mark.parametrize(("spoil", "words"), [
    (lambda r: r.pop("filters"), "damaged .KeyError: 'filters'"), (lambda r: r.update(dtype="load"), "damaged .KeyError: 'load'"),
    (lambda r: r["filters"].pop("relu"), "step relu reads relu, which is not there"),
    (lambda r: r["tensors"].pop("fc.bias"), "step fc reads fc.bias, which is not there"),
    (lambda r: r["steps"].pop(1), "reads maxpool, which is not there"), (lambda r: r["steps"].pop(), "the answer is fc, which is not there"),
    (lambda r: r["filters"]["relu"].update(bias=torch.zeros(3)), "of no convolution"),
    (lambda r: r["filters"]["relu"].update(geometry=[{"tuple": [1, 1]}] * 3 + [5]), "geometry .* of no convolution"),
    (lambda r: r["filters"]["relu"].update(geometry=[{"tuple": [0, 0]}, *[{"tuple": [1, 1]}] * 2, 1]), "geometry .* of no convolution"),
    (lambda r: r["steps"][0]["dict"].update(extra=1), "damaged .TypeError"), (lambda r: r.update(output={}), "damaged .ValueError"),
])
def test_tampered_files_are_refused_in_a_sentence(model, tmp_path, spoil, words):
    plan(model, images()).save(tmp_path / "net.plan")
    record = torch.load(tmp_path / "net.plan", weights_only=True)
    spoil(record)
    torch.save(record, tmp_path / "net.plan")
    with pytest.raises(ValueError, match=f"plan: .*net.plan: .*{words}"):
        load_plan(tmp_path / "net.plan")


def test_a_saved_plan_may_be_read_by_whom_the_umask_allows(model, tmp_path):
    (tmp_path / "ordinary").touch()
    plan(model, images()).save(tmp_path / "net.plan")
    assert (tmp_path / "net.plan").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


class Odd(nn.Module):
    """Cannot be looked into."""

    def forward(self, x):
        return x * 2 if x.mean() > 0 else x


def test_what_stays_a_module_runs_and_cannot_be_saved(tmp_path):
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Odd()))
    x = images()
    run = plan(net, x)
    judge(run(x), net, x)
    assert run.unfused == {"3": "a module that runs as it is"}
    with pytest.raises(ValueError, match="cannot be saved: 3"):
        run.save(tmp_path / "net.plan")
    assert not list(tmp_path.iterdir())


def test_refusals_come_before_anything_is_built():
    class Chooses(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="Chooses cannot be planned"):
        plan(Chooses(), images())
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match="1: a batch norm without running statistics"):
        plan(net, images())
    with pytest.raises(ValueError, match="expected one 4-D tensor"):
        plan(net, torch.zeros(3, 4))


@pytest.mark.parametrize(("how", "words"), [
    (dict(topk=0), "topk: got 0"), (dict(topk="5"), "topk: got '5', expected a whole number"), (dict(topk=2.5), "topk: got 2.5"),
    (dict(features=[]), "features: got .., expected names of modules"), (dict(features=3), "features: got 3, expected names"),
    (dict(across=3), "across: got 3, expected some of"), (dict(across=[None]), "across: got None, expected some of"),
    (dict(topk=1001), "at least 1001 classes, got .2, 1000."), (dict(dtype=torch.int8), "dtype: got torch.int8"),
    (dict(topk=2, features=("layer1",)), "features: softmax and topk are of the classes"), (dict(cuda_graph=True), "not on CUDA"),
    (dict(normalize=((0, 0, 0), (1, 1, 1))), "expected uint8"), (dict(normalize=((0, 0), (1, 1))), "three numbers each"),
    (dict(normalize=((0, 0, 0), (1, 0, 1))), "no std 0"), (dict(normalize="imagenet"), "three numbers each"),
])
def test_options_that_make_no_sense_are_refused(model, how, words):
    with pytest.raises(ValueError, match=f"plan: .*{words}"):
        plan(model, images(), **how)


def test_what_is_no_model_or_answers_no_classes_is_refused(model):
    with pytest.raises(ValueError, match="model: got Plan, expected an nn.Module"):
        plan(plan(model, images()), images())
    with pytest.raises(ValueError, match=r"softmax=True.*got \[2, 3, 64, 64\]"):
        plan(block(lambda self, x: self.bn(self.conv(x))), images(), softmax=True)
    with pytest.raises(ValueError, match="got torch.int64"):
        plan(model, images().long())


def test_what_wraps_a_model_is_told_apart_from_it(model):
    for wrapper in (nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model)):
        with pytest.raises(ValueError, match="it wraps another model: plan that, model.module$"):
            plan(wrapper, images())
    with pytest.raises(ValueError, match="it wraps another model: plan that, model._orig_mod$"):
        plan(torch.compile(model, backend="eager"), images())
    with pytest.raises(ValueError, match="plan: model: got one with meta tensors"):
        plan(copy.deepcopy(model).to("meta"), images())


def test_inside_a_compiled_function_a_plan_runs_as_it_is(model):
    run, x = plan(model, images()), images()
    assert torch.equal(torch.compile(lambda x: run(x) * 2, backend="eager")(x), run(x) * 2)


def test_bad_input_is_one_sentence(model):
    run = plan(model, images())
    with pytest.raises(ValueError, match="step relu .conv1. does not fit"):
        run(torch.randn(1, 4, 64, 64))
    with pytest.raises(ValueError, match="3-D"):
        run(torch.randn(3, 64, 64))
    with pytest.raises(ValueError, match="uint8"):
        run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    judge(run(images()), model, images())  # and the plan is as good as before


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
    assert plan(ready(resnet_fast.resnet18(), seed=5), images())._lowered.filters["relu"] is not a._lowered.filters["relu"]


def test_fused_beside_unfused(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    assert len(plain.steps) > len(fused.steps)
    rows = fused.compare(plain, images())
    assert [r.value for r in rows] == [s.output for s in fused.steps] and max(r.distance for r in rows) < 1e-4
    assert all(r.ms > 0 and r.other_ms > 0 for r in rows) and "layer4.1.conv2" in str(rows)
    wrong = plan(ready(copy.deepcopy(model), seed=9), images(), fuse=False)
    assert fused.compare(wrong, images())[0].distance > 1e-2
    exact = plan(model, images(), fuse=False, dtype=torch.float64)
    assert 0 < fused.compare(exact, images())[-1].distance < 1e-4


def test_each_step_of_both_schedules_counts_once_and_for_the_row_that_needs_it(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    rows = {r.name: r for r in fused.compare(plain, images())}
    assert sum(r.steps for r in rows.values()) == len(fused.steps) and sum(r.other_steps for r in rows.values()) == len(plain.steps)
    assert rows["layer2.0.downsample.0"].other_steps == 2  # convolution, batch norm; not the other branch, which stands before them
    assert rows["layer2.0.conv2"].other_steps == 4 and rows["conv1"].other_steps == 3


def test_beside_an_exact_plan_each_error_is_judged(model):
    fused, plain, exact = (plan(model, images(), fuse=fuse, dtype=dtype) for fuse, dtype in
                           ((True, torch.float32), (False, torch.float32), (False, torch.float64)))
    rows = fused.compare(plain, images(), exact)
    assert all(r.broken is None and 0 < r.error < 1e-4 and 0 < r.other_error < 1e-4 for r in rows) and "WRONG" not in str(rows)
    right = fused._lowered.filters["layer1_1_relu_1"]
    fused._lowered.filters["layer1_1_relu_1"] = Filter(right.weight, right.bias + 1e-3, right.geometry)
    rows = fused.compare(plain, images(), exact)
    assert next(r for r in rows if r.broken).name == "layer1.1.conv2" and "WRONG" in str(rows)


def test_it_prints_and_explains(model):
    run = plan(model, images())
    assert "layer4.1.conv2" in str(run) and "24 steps" in str(run)
    found = resnet_fast.explain(run, images())
    assert found[0].module == "conv1" and found[0].problem.weight == (64, 3, 7, 7)


def test_a_forced_kernel_runs_in_the_plan(model):
    from resnet_fast.dispatch import _registry, kernel
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


def test_moved_to_the_same_place(model):
    run, x = plan(model, images()), images()
    wanted = run(x)
    assert torch.equal(run.to("cpu")(x), wanted)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_is_a_plan_of_its_own_over_the_same_weights(copied, model, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_KERNEL", "aten")  # oneDNN's packs have no storage that could be copied
    model, x = copy.deepcopy(model), images()
    run = plan(model, x, softmax=True)
    twin, wanted = copied(run), run(x)
    assert torch.equal(twin(x), wanted) and twin._lowered.filters == run._lowered.filters
    assert twin._lock is not run._lock and twin._programs is not run._programs and twin.notes is not run.notes
    with torch.no_grad():
        model.fc.bias.add_(torch.randn(1000))
    assert not torch.equal(twin.refresh()(x), wanted) and torch.equal(run(x), wanted)


def test_what_is_copied_with_its_model_is_refreshed_from_the_copy(model):
    class Service(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model
            self.run = plan(model, images())

    service, x = copy.deepcopy(Service()), images()
    with torch.no_grad():
        service.net.fc.bias.add_(1)
        torch.testing.assert_close(service.run.refresh()(x), service.net(x), rtol=1e-4, atol=1e-4)


def test_pickled_it_is_what_save_writes(model):
    run, x = plan(model, images(), topk=3, dtype=torch.bfloat16), images()
    again = pickle.loads(pickle.dumps(run))
    assert all(map(torch.equal, again(x), run(x))) and (again.dtype, again.topk) == (torch.bfloat16, 3)
    with pytest.raises(RuntimeError, match="is gone: make a new plan"):
        again.refresh()
    with pytest.raises(ValueError, match="cannot be saved: 1 would have to travel as code"):
        pickle.dumps(plan(nn.Sequential(nn.Conv2d(3, 8, 3), Odd()).eval(), x))


@pytest.mark.parametrize(("device", "words"), [
    ("gpu", 'got gpu, which is not to be had here .*: use "cpu"'), ("mps", "got mps, (which is not|expected cpu or cuda)"),
    ("meta", "got meta, expected cpu or cuda"), ("cuda:99", "got cuda:99, which is not to be had here .* on a machine whose GPU torch .* sees"),
])
def test_a_device_that_is_not_here_is_refused_in_a_sentence(model, device, words, tmp_path):
    run = plan(model, images())
    run.save(tmp_path / "net.plan")
    for ask in (lambda: load_plan(tmp_path / "net.plan", device), lambda: run.to(device)):
        with pytest.raises(ValueError, match=f"^plan: device: {words}") as raised:
            ask()
        assert device == "meta" or device == "mps" or isinstance(raised.value.__cause__, RuntimeError)
    assert run(images()).shape == (2, 1000)
    with pytest.raises(ValueError, match="plan: device: got meta"):
        plan(model, images().to("meta"))


def test_tuning_needs_a_gpu(model):
    with pytest.raises(ValueError, match="GPU"):
        plan(model, images(), tune=True)


# ---------------------------------------------------------------- what a plan must not do

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)


def block(forward):
    return ready(type("Case", (Block,), {"forward": forward})())


@pytest.mark.parametrize("forward", [
    lambda self, x: self.bn(self.conv(self.relu(x))),
    lambda self, x: torch.flatten(self.relu(self.bn(self.conv(x))), 1).mul_(2),
    lambda self, x: nn.functional.hardtanh(self.bn(self.conv(x)), inplace=True) * 2,
    lambda self, x: nn.functional.relu(self.bn(self.conv(x)).add_(1), True),
    lambda self, x: self.bn(self.conv(x)).view(x.shape[0], -1).sigmoid_(),
], ids=range(5))
def test_writes_in_place_stay_inside(forward):
    model, x = block(forward), images(2, 12, 12).contiguous(memory_format=torch.channels_last)
    kept = x.clone(memory_format=torch.preserve_format)
    run = plan(model, x)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(kept.clone(memory_format=torch.contiguous_format)), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept)


def reads_what_a_relu_overwrote(self, x):
    y = self.bn(self.conv(x))
    self.relu(y)
    return self.conv(y) + y


def asks_for_strides(self, x):
    return self.bn(self.conv(x)).as_strided((2, 3), (3, 1))


@pytest.mark.parametrize(("forward", "why"), [(reads_what_a_relu_overwrote, "writes in place"), (asks_for_strides, "lies in memory")])
def test_what_would_come_out_otherwise_is_refused(forward, why):
    with pytest.raises(ValueError, match=why):
        plan(block(forward), images(2, 12, 12))


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


# ---------------------------------------------------------------- pieces of a batch

def test_a_large_batch_goes_through_in_pieces(model, monkeypatch):
    x = images(7)
    one = plan(model, x, features=("layer2", "fc"))
    wanted = one(x)
    assert (7, 3, 64, 64) in one._programs
    monkeypatch.setattr(whole, "PIECE", 3 * 64 * 32 * 32 * 4)
    cut = plan(model, x, features=("layer2", "fc"))
    got = cut(x)
    assert (7, 3, 64, 64) not in cut._programs and (3, 3, 64, 64) in cut._programs
    assert cut.activation_bytes < 0.6 * one.activation_bytes
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_piece_does_not_depend_on_the_batch(model, monkeypatch):
    """The first two images, by which it is found, are a part of the whole batch's memory."""
    monkeypatch.setattr(whole, "PIECE", 4 * 64 * 32 * 32 * 4)
    x = images(40)
    run = plan(model, x)
    assert run._pieces(run._prepared(x)) == pieces(40, 64 * 32 * 32 * 4) == [4] * 10


def test_pieces():
    assert pieces(16, PIECE // 4) == [4, 4, 4, 4] and pieces(17, PIECE // 8) == [6, 6, 5] and pieces(5, 1) == [5]
    for n in range(2, 40):
        for fit in (1, 2, 3, 7):
            found = pieces(n, PIECE // fit)
            assert sum(found) == n and min(found) > 1 and max(found) <= max(3, fit)


@pytest.mark.parametrize("forward", [
    lambda self, x: self.bn(self.conv(x)) - x.mean(0, keepdim=True),
    lambda self, x: self.bn(self.conv(x)).flatten(0, 1),
    lambda self, x: self.bn(self.conv(x)) * torch.softmax(x, 0),
    lambda self, x: self.bn(self.conv(x))[:1],
], ids=range(4))
def test_what_mixes_images_is_not_cut(forward, monkeypatch):
    monkeypatch.setattr(whole, "PIECE", 1)
    model, x = block(forward), images(6, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(plan(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_no_batch_in_an_answer_is_neither_cut_nor_lent(monkeypatch):
    monkeypatch.setattr(whole, "PIECE", 1)
    model, x = block(lambda self, x: {"y": self.conv(x), "weight": self.bn.weight, "input": x, "level": 3, "none": None}), images(6, 12, 12)
    run = plan(model, x)
    got = run(x)
    assert torch.equal(got["weight"], model.bn.weight) and torch.equal(got["input"], x) and got["level"] == 3 and got["none"] is None
    got["weight"].zero_(), got["input"].zero_()
    assert torch.equal(run(x)["weight"], model.bn.weight) and x.any() and got["y"].shape == (6, 3, 12, 12)


# ---------------------------------------------------------------- what it says of itself

def test_steps_know_kernel_shapes_and_flops(model):
    run = plan(model, images())
    conv = next(s for s in run.steps if s.name == "layer1.0.conv2")
    assert conv.reads == ((2, 64, 16, 16), (2, 64, 16, 16)) and conv.shape == (2, 64, 16, 16) and conv.act == "relu"
    assert conv.flops == 2 * 2 * 64 * 16 * 16 * 64 * 9 and conv.kernel and conv.modules[:2] == ("layer1.0.conv2", "layer1.0.bn2")
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images())
    assert sum(s.flops for s in run.steps) == counter.get_total_flops()
    assert all(len(line) <= 120 for line in str(run).splitlines())


def test_refusals_of_another_size_name_the_one_it_was_made_for():
    net = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)))
    run = plan(net, images(2, 8, 8))
    sentence = r"got \[2, 3, 9, 9\] \(the plan was made for \[2, 3, 8, 8\]\): step .* \(torch.nn.functional.linear\)"
    with pytest.raises(ValueError, match=sentence):
        run(images(2, 9, 9))


@pytest.mark.parametrize("kwargs", [
    dict(block_args=dict(attn_layer="eca")), dict(block_args=dict(attn_layer="se")), dict(stem_type="deep"), dict(aa_layer=timm.layers.BlurPool2d),
], ids=["eca", "se", "deep stem", "blur pool"])
def test_timm_networks_save_and_load(kwargs, tmp_path):
    resnet = timm.models.resnet
    net = ready(resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=10, **kwargs))
    run = plan(net, images(5))
    run.save(tmp_path / "net.plan")
    again = load_plan(tmp_path / "net.plan")
    judge(again(images(5)), net, images(5))
    assert run._imagewise == again._imagewise == ("aa_layer" not in kwargs)
