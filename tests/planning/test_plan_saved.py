"""A plan that goes elsewhere: saved, loaded, copied, pickled, moved; and files and devices that it refuses."""

import copy
import pickle

import pytest
import torch
from plans import Odd, images, judge, ready
from torch import nn

import resnet_fast
from resnet_fast import load_plan, plan

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


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
    for bad in (
        "torch.load",
        "builtins.getattr",
        "operator.methodcaller",
        "torch.nn.functional.__builtins__",
        "Tensor.zero_",
        "operator.imul",
        "Tensor._make_subclass",
        "torch.nn.functional.importlib.import_module",
    ):
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
    for name, content in {
        "empty": b"",
        "text": b"hello",
        "torn": whole[:-2000],
        "flipped": whole[:300] + b"XXXX" + whole[304:],
    }.items():
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "torn", "flipped", "pickled", "state"):
        with pytest.raises(ValueError, match=f"plan: .*{name}: not a plan"):
            load_plan(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "absent")


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
            lambda r: r["filters"]["relu"].update(geometry=[{"tuple": [1, 1]}] * 3 + [5]),
            "geometry .* of no convolution",
        ),
        (
            lambda r: r["filters"]["relu"].update(geometry=[{"tuple": [0, 0]}, *[{"tuple": [1, 1]}] * 2, 1]),
            "geometry .* of no convolution",
        ),
        (lambda r: r["steps"][0]["dict"].update(extra=1), "damaged .TypeError"),
        (lambda r: r.update(output={}), "damaged .ValueError"),
    ],
)
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


def test_what_stays_a_module_runs_and_cannot_be_saved(tmp_path):
    net = ready(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Odd()))
    x = images()
    run = plan(net, x)
    judge(run(x), net, x)
    assert run.unfused == {"3": "a module that runs as it is"}
    with pytest.raises(ValueError, match="cannot be saved: 3"):
        run.save(tmp_path / "net.plan")
    assert not list(tmp_path.iterdir())


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
    assert torch.equal(twin(x), wanted) and twin._engine.lowered.filters == run._engine.lowered.filters
    assert twin._engine is not run._engine and twin.notes is not run.notes
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


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("gpu", 'got gpu, which is not to be had here .*: use "cpu"'),
        ("mps", "got mps, (which is not|expected cpu or cuda)"),
        ("meta", "got meta, expected cpu or cuda"),
        ("cuda:99", "got cuda:99, which is not to be had here .* on a machine whose GPU torch .* sees"),
    ],
)
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
    assert run._engine.cuts_batches == again._engine.cuts_batches == ("aa_layer" not in kwargs)
