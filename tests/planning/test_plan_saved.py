"""Plans that are saved, loaded, copied, pickled and moved; files and devices that are refused."""

import copy
import pickle

import pytest
import torch
from plans import Odd, images, judge, lowered, ready
from torch import nn

import resnet_fast
from resnet_fast import load_plan, plan

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


@pytest.fixture
def saved(model, tmp_path):
    """The file of a saved plan."""
    path = tmp_path / "net.plan"
    plan(model, images()).save(path)
    return path


@pytest.fixture
def record(saved):
    """The content of a saved plan's file."""
    return torch.load(saved, weights_only=True)


# ---------------------------------------------------------------- files


def test_loaded_plan_has_the_same_steps_and_answers(model, saved):
    x = images()
    run, again = plan(model, x), load_plan(saved)
    assert torch.equal(again(x), run(x))
    assert [step.output for step in again.steps] == [step.output for step in run.steps]
    assert [path.name for path in saved.parent.iterdir()] == ["net.plan"]


def test_options_are_saved(model, tmp_path):
    run = plan(model, images(), topk=3, dtype=torch.bfloat16, across=("conv_pool",))
    run.save(tmp_path / "net.plan")
    assert load_plan(tmp_path / "net.plan").options == run.options


def test_saved_file_has_the_permissions_of_the_umask(saved):
    ordinary = saved.with_name("ordinary")
    ordinary.touch()
    assert saved.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize(
    "target",
    [
        "torch.load",
        "builtins.getattr",
        "operator.methodcaller",
        "torch.nn.functional.__builtins__",
        "Tensor.zero_",
        "operator.imul",
        "Tensor._make_subclass",
        "torch.nn.functional.importlib.import_module",
    ],
)
def test_file_cannot_call_other_functions(record, saved, target):
    for step in record["steps"]:
        if step["dict"]["op"] == "function":
            step["dict"]["target"] = target
    torch.save(record, saved)
    with pytest.raises(ValueError, match="no saved plan does"):
        load_plan(saved)


def test_file_of_another_version_is_refused(record, saved):
    torch.save(record | {"resnet_fast_plan": 99}, saved)
    with pytest.raises(ValueError, match="version 99"):
        load_plan(saved)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"hello",
        lambda content: content[:-2000],
        lambda content: content[:300] + b"XXXX" + content[304:],
    ],
    ids=["empty", "text", "torn", "flipped bytes"],
)
def test_damaged_file_is_refused(saved, damage):
    saved.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(ValueError, match="plan: .*net.plan: not a plan"):
        load_plan(saved)


@pytest.mark.parametrize(
    "content", [lambda model: model, lambda model: model.state_dict()], ids=["pickle", "state"]
)
def test_other_files_of_torch_are_refused(model, tmp_path, content):
    torch.save(content(model), tmp_path / "foreign")
    with pytest.raises(ValueError, match="plan: .*foreign: not a plan"):
        load_plan(tmp_path / "foreign")


def test_absent_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "absent")


ONES = {"tuple": [1, 1]}
ZEROS = {"tuple": [0, 0]}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r.pop("filters"), "damaged .KeyError: 'filters'"),
        (lambda r: r.update(dtype="load"), "damaged .KeyError: 'load'"),
        (lambda r: r["filters"].pop("relu"), "step relu reads relu, which is not there"),
        (lambda r: r["tensors"].pop("fc.bias"), "step fc reads fc.bias, which is not there"),
        (lambda r: r["steps"].pop(1), "reads maxpool, which is not there"),
        (lambda r: r["steps"].pop(), "the answer is fc, which is not there"),
        (lambda r: r["filters"]["relu"].update(bias=torch.zeros(3)), "of no convolution"),
        (
            lambda r: r["filters"]["relu"].update(geometry=[ONES, ONES, ONES, 5]),
            "geometry .* of no convolution",
        ),
        (
            lambda r: r["filters"]["relu"].update(geometry=[ZEROS, ONES, ONES, 1]),
            "geometry .* of no convolution",
        ),
        (
            lambda r: r["filters"]["relu"].update(geometry=[ONES, ONES, 1]),
            "geometry .* of no convolution",
        ),
        (lambda r: r["steps"][0]["dict"].update(extra=1), "damaged .TypeError"),
        (lambda r: r.update(output={}), "damaged .ValueError"),
    ],
)
def test_tampered_file_is_refused(record, saved, spoil, words):
    spoil(record)
    torch.save(record, saved)
    with pytest.raises(ValueError, match=f"plan: .*net.plan: .*{words}"):
        load_plan(saved)


def test_module_that_is_not_data_runs_and_cannot_be_saved(tmp_path):
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Odd()))
    x = images()
    run = plan(net, x)

    judge(run(x), net, x)
    assert run.unfused == {"3": "a module that runs as it is"}
    with pytest.raises(ValueError, match="cannot be saved: 3"):
        run.save(tmp_path / "net.plan")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(block_args=dict(attn_layer="eca")),
        dict(block_args=dict(attn_layer="se")),
        dict(stem_type="deep"),
        dict(aa_layer=timm.layers.BlurPool2d),
    ],
    ids=["eca", "se", "deep stem", "blur pool"],
)
def test_timm_networks_save_and_load(kwargs, tmp_path):
    resnet = timm.models.resnet
    net = ready(resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), num_classes=10, **kwargs))
    run = plan(net, images(5))

    run.save(tmp_path / "net.plan")
    again = load_plan(tmp_path / "net.plan")

    judge(again(images(5)), net, images(5))
    cuts_batches = "aa_layer" not in kwargs
    assert run._engine.cuts_batches == again._engine.cuts_batches == cuts_batches


# ---------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_shares_weights_and_nothing_else(copied, model, monkeypatch):
    # oneDNN's packs have no storage that could be copied
    monkeypatch.setenv("RESNET_FAST_KERNEL", "aten")
    run = plan(model, images(), softmax=True)
    twin = copied(run)

    assert torch.equal(twin(images()), run(images()))
    assert lowered(twin).filters == lowered(run).filters
    assert twin._engine is not run._engine
    assert twin.notes is not run.notes


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copy_is_refreshed_by_itself(copied, model, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_KERNEL", "aten")
    model, x = copy.deepcopy(model), images()
    run = plan(model, x, softmax=True)
    twin, old = copied(run), run(x)

    with torch.no_grad():
        model.fc.bias.add_(torch.randn(1000))

    assert not torch.equal(twin.refresh()(x), old)
    assert torch.equal(run(x), old)


def test_plan_copied_with_its_model_is_refreshed_from_the_copy(model):
    class Service(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model
            self.run = plan(model, images())

    service, x = copy.deepcopy(Service()), images()
    with torch.no_grad():
        service.net.fc.bias.add_(1)
        torch.testing.assert_close(service.run.refresh()(x), service.net(x), rtol=1e-4, atol=1e-4)


def test_pickle_holds_what_save_writes(model):
    run, x = plan(model, images(), topk=3, dtype=torch.bfloat16), images()
    again = pickle.loads(pickle.dumps(run))

    for mine, theirs in zip(again(x), run(x), strict=True):
        assert torch.equal(mine, theirs)
    assert (again.dtype, again.topk) == (torch.bfloat16, 3)
    with pytest.raises(RuntimeError, match="is gone: make a new plan"):
        again.refresh()


def test_plan_with_a_module_that_is_not_data_cannot_be_pickled():
    run = plan(nn.Sequential(nn.Conv2d(3, 8, 3), Odd()).eval(), images())
    with pytest.raises(ValueError, match="cannot be saved: 1 would have to travel as code"):
        pickle.dumps(run)


# ---------------------------------------------------------------- devices


def test_move_to_the_same_device(model):
    run, x = plan(model, images()), images()
    before = run(x)
    assert torch.equal(run.to("cpu")(x), before)


ABSENT_DEVICES = [
    ("gpu", 'got gpu, which is not to be had here .*: use "cpu"'),
    ("mps", "got mps, (which is not|expected cpu or cuda)"),
    ("meta", "got meta, expected cpu or cuda"),
    ("cuda:99", "got cuda:99, which is not to be had here .* on a machine whose GPU torch .* sees"),
]


@pytest.mark.parametrize(("device", "words"), ABSENT_DEVICES)
def test_absent_device_is_refused(model, saved, device, words):
    run = plan(model, images())
    for move in (lambda: load_plan(saved, device), lambda: run.to(device)):
        with pytest.raises(ValueError, match=f"^plan: device: {words}") as raised:
            move()
        if device in ("gpu", "cuda:99"):
            assert isinstance(raised.value.__cause__, RuntimeError)
    assert run(images()).shape == (2, 1000)


def test_example_on_the_meta_device_is_refused(model):
    with pytest.raises(ValueError, match="plan: device: got meta"):
        plan(model, images().to("meta"))
