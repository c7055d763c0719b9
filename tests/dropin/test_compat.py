"""Tracers, compilers, exporters, transforms and modes give the same for our models as for torchvision's."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.utils.mkldnn
from torch import nn
from torch.fx import symbolic_trace
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from twins import CL, assert_agree, both, images, twins, wide_twins

import resnet_fast
from resnet_fast.testing.rule import same_nonfinite

X = images(2, 40)
X64 = X.double()


def test_onednns_own_tensors_and_modules() -> None:
    ours, theirs = twins()
    accelerated = resnet_fast.accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        for _ in range(3):  # the third pass would be a kept one
            for model in (ours, accelerated):
                assert_close(model(X.to_mkldnn()).to_dense(), theirs(X), rtol=1e-4, atol=1e-4)
        assert_close(
            torch.utils.mkldnn.to_mkldnn(accelerated)(X.to_mkldnn()).to_dense(),
            theirs(X),
            rtol=1e-4,
            atol=1e-4,
        )


# ---------------------------------------------------------------- fx, jit, compile, export


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_fx_node_names(name) -> None:
    with torch.device("meta"):
        ours, theirs = (
            getattr(resnet_fast, name)(),
            getattr(__import__("torchvision").models, name)(),
        )
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = [
        [(n.op, n.name, str(n.target), str(n.args)) for n in symbolic_trace(m).graph.nodes]
        for m in (ours, theirs)
    ]
    assert nodes[0] == nodes[1]


def test_feature_extraction() -> None:
    models = wide_twins()
    nodes = ["layer1.0.bn2", "layer2.1.relu_2", "layer3.0.add", "flatten"]
    both(models, lambda m: create_feature_extractor(m, nodes)(X64))
    both(models, lambda m: create_feature_extractor(m.train(), nodes)(X64))
    both(models, lambda m: symbolic_trace(m.eval())(X64))


def test_script_and_trace_and_their_files() -> None:
    ours, theirs = wide_twins()
    with torch.no_grad():
        expected = theirs(X64), theirs(images(3, 33).double())
        for captured in (torch.jit.script(ours), torch.jit.trace(ours, X64)):
            buffer = io.BytesIO()
            torch.jit.save(captured, buffer)
            loaded = torch.jit.load(io.BytesIO(buffer.getvalue()))
            assert "resnet_fast::" not in str(loaded.inlined_graph)
            assert_close((captured(X64), loaded(images(3, 33).double())), expected)
        assert_close(torch.jit.freeze(loaded.eval())(X64), expected[0])
        basic, basic_theirs = wide_twins("resnet18")
        assert_close(torch.jit.script(basic.train())(X64), basic_theirs.train()(X64))


def test_compile_fullgraph() -> None:
    """Inference whole in one graph; training through AOT autograd, gradients and statistics included."""
    torch._dynamo.reset()
    ours, theirs = wide_twins()
    with torch.no_grad():
        assert_close(torch.compile(ours, fullgraph=True, backend="eager")(X64), theirs(X64))
    torch._dynamo.reset()
    found = []
    for model in (torch.compile(ours, fullgraph=True, backend="aot_eager"), theirs):
        model.train()(X64).square().sum().backward()
        found.append([p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()])
    assert_close(*found, rtol=1e-8, atol=1e-8)
    torch._dynamo.reset()


def test_compile_of_a_function_that_calls_the_ops() -> None:
    torch._dynamo.reset()

    def step(x, w, k):
        z = resnet_fast.ops.conv_bn_act(x, w, k, k, padding=1)
        y, mean, _ = resnet_fast.ops.bn_act(z, k, k, z)
        return resnet_fast.ops.add_act(y, z).sum() + mean.sum()

    args = (
        torch.randn(2, 4, 5, 5).double(),
        torch.randn(4, 4, 3, 3).double(),
        torch.rand(4).double(),
    )
    found = []
    for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        live = [a.clone().requires_grad_() for a in args]
        out = f(*live)
        found.append([out, *torch.autograd.grad(out, live)])
    assert_close(*found)
    torch._dynamo.reset()


@pytest.mark.parametrize("train", (False, True))
def test_export_is_aten_only(train, tmp_path) -> None:
    """Anyone can load the program: it contains ATen's ops and nothing of ours."""
    ours, theirs = (m.train(train) for m in wide_twins())
    program = torch.export.export(
        ours, (X64,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    targets = {n.target for n in program.graph.nodes if n.op == "call_function"}
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {"aten"}
    x = images(5, 40, torch.float64)
    assert_close(program.module()(x), theirs(x))
    if not train:
        torch.export.save(program, tmp_path / "model.pt2")
        code = (
            f"import torch, sys; m = torch.export.load({str(tmp_path / 'model.pt2')!r}).module()\n"
            "m(torch.randn(3, 3, 40, 40).double()); assert 'resnet_fast' not in sys.modules"
        )
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode
            == 0
        )


# ---------------------------------------------------------------- transforms, modes, devices


def test_functional_transforms() -> None:
    """functional_call, jvp, vmap, grad, per-sample gradients, an ensemble, forward-mode AD."""
    models = wide_twins("small", num_classes=3)
    x = images(2, 33, torch.float64)

    def run(model: nn.Module) -> list:
        state = {k: v.detach() for k, v in model.state_dict().items()}
        inexact = {k: v for k, v in state.items() if "tracked" not in k}

        def call(params, x):
            return torch.func.functional_call(model, {**state, **params}, (x,))

        def loss(params, x):
            return call(params, x[None]).square().sum()

        small = {
            k: v
            for k, v in inexact.items()
            if k in ("conv1.weight", "bn1.weight", "layer2.1.conv2.weight", "layer4.0.bn3.bias")
        }
        ones = {k: torch.ones_like(v) for k, v in small.items()}
        out = [
            call({}, x),
            torch.func.jvp(lambda x: call({}, x), (x,), (torch.ones_like(x),)),
            torch.func.grad(loss)(small, x[0]),
            torch.func.jvp(lambda p: call(p, x), (small,), (ones,)),
            torch.func.vmap(torch.func.grad(loss), (None, 0))(small, x),
            torch.func.vmap(lambda x: call({}, x[None]))(x),
            torch.func.vjp(lambda x: call({}, x), x)[1](torch.ones(2, 3).double()),
        ]
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
            out.append(torch.autograd.forward_ad.unpack_dual(dual).tangent)
        stacked = torch.func.stack_module_state([model, copy.deepcopy(model)])
        out.append(
            torch.func.vmap(lambda p, b: torch.func.functional_call(model, (p, b), (x,)))(*stacked)
        )
        return out

    both(models, run)


def test_meta_and_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        for train in (False, True):
            assert resnet_fast.resnet18().train(train)(torch.empty(2, 3, 64, 64)).shape == (2, 1000)
    with FakeTensorMode():
        model = resnet_fast.resnet18(num_classes=4)
        out = model.eval()(torch.empty(2, 3, 64, 64))
        assert out.shape == (2, 4) and model.train()(torch.empty(2, 3, 64, 64)).requires_grad
    with torch.device("meta"):
        empty = resnet_fast.resnet18(num_classes=10)
    ours, theirs = twins("resnet18")
    empty.to_empty(device="cpu").load_state_dict(ours.state_dict())
    assert_agree(empty.eval(), theirs, X)


class Tagged(torch.Tensor):
    """A subclass that only wants to come out where it went in."""


def test_tensor_subclasses_and_function_modes() -> None:
    calls: list[list[str]] = []

    class Log(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls[-1].append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    for model in wide_twins():
        assert type(model(X64.as_subclass(Tagged))) is Tagged
        calls.append([])
        with Log():
            model(X64)
    keep = ("conv2d", "batch_norm", "relu_", "relu", "linear", "flatten")
    assert [c for c in calls[0] if c in keep] == [c for c in calls[1] if c in keep]


def test_autocast_and_inference_mode() -> None:
    ours, theirs = twins()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        a, b = ours(X), theirs(X)
    assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)
    with torch.inference_mode():
        assert_close(ours(X), theirs(X), rtol=1e-4, atol=1e-4)
        assert ours(X).is_inference()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_dtypes_layouts_and_shapes(dtype) -> None:
    """Every dtype with odd, sliced, NHWC, single and empty inputs, by the rule and with torchvision's strides."""
    ours, theirs = twins()
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    for layout in (torch.contiguous_format, CL):
        ours, theirs = ours.to(memory_format=layout), theirs.to(memory_format=layout)
        for x in (
            images(2, (33, 47)),
            images(1, 32),
            images(2, 48)[:, :, 5:-2, ::2],
            images(2, 32).contiguous(memory_format=CL),
            images(2, 32).flip(3),
            images(1, 32).expand(3, 3, 32, 32),
        ):
            assert_agree(ours, theirs, x.to(dtype))
    for model in (ours, theirs):
        assert model(torch.empty(0, 3, 40, 40, dtype=dtype)).shape == (0, 10)


def test_mixed_precision_batch_norm() -> None:
    """A half-precision network whose batch norms were left in float32, as mixed-precision recipes have it."""
    ours, theirs = twins()
    for model in (ours, theirs):
        model.bfloat16()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()
    with torch.no_grad():
        assert_close(ours(X.bfloat16()), theirs(X.bfloat16()), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("train", (False, True))
def test_nonfinite_images(bad, train) -> None:
    ours, theirs = twins()
    x = images(3, 40)
    x[1, 0, 7, 9] = bad
    with torch.no_grad():
        a, b = ours.train(train)(x), theirs.train(train)(x)
    assert same_nonfinite(a, b) and not a.isfinite().all()
    assert a[0].isfinite().all() == (not train)


@pytest.mark.parametrize("train", (False, True))
def test_wrong_images_get_one_sentence(train) -> None:
    model = resnet_fast.resnet18(num_classes=2).train(train)
    for x, sentence in (
        (
            torch.randn(2, 4, 32, 32),
            "x channels: got 4, expected 3 (weight is [64, 3, 7, 7], groups 1)",
        ),
        (X.double(), "x dtype: got torch.float64, expected torch.float32 (that of weight)"),
        (
            torch.randint(0, 255, (2, 3, 32, 32)).byte(),
            "x dtype: got torch.uint8, expected a floating dtype",
        ),
        (torch.randn(3, 32, 32), "x: got 3-D shape [3, 32, 32], expected 4-D [N, C, H, W]"),
    ):
        with pytest.raises(RuntimeError) as raised:
            model(x)
        assert str(raised.value) == f"conv_bn_act: {sentence}"
    with pytest.raises(RuntimeError, match="cpu.*meta"):
        model(X.to("meta"))
    with torch.device("meta"):
        unmade = resnet_fast.resnet18(num_classes=2).train(train)
    with pytest.raises(
        RuntimeError, match=r"conv_bn_act: weight device: got meta, expected cpu \(that of x\)"
    ):
        unmade(X)


def test_pickle_into_another_process(tmp_path) -> None:
    ours, _ = twins()
    with torch.no_grad():
        expected = ours(X)
    path = tmp_path / "model.pickle"
    path.write_bytes(pickle.dumps((ours, X, expected)))
    code = (
        "import pickle, torch\ntorch.set_num_threads(1)\n"
        f"model, x, expected = pickle.load(open({str(path)!r}, 'rb'))\n"
        "torch.testing.assert_close(model(x), expected)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_touches_nothing() -> None:
    """No CUDA, no torchvision, no timm, no Triton, no output, no changed default."""
    code = (
        "import torch\nbefore = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()\n"
        "import sys, resnet_fast\nmodel = resnet_fast.resnet18(num_classes=2).eval()\n"
        "model(torch.randn(1, 3, 32, 32))\n"
        "assert not {'torchvision', 'timm', 'triton', 'safetensors'} & sys.modules.keys(), sys.modules.keys()\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
