"""accelerate and restore: foreign networks keep their answers, whatever is done to them, and come back as they were."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torchvision
from eager import outcome
from foreign import fused, pair, small
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d
from twins import assert_agree, assert_train_alike, images, shake, wide

import resnet_fast
from resnet_fast.live.accelerate import Forward, accelerate, accelerated, restore
from resnet_fast.testing.rule import assert_rule


def outputs(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [t for part in parts for t in outputs(part)]


def assert_all_agree(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Every tensor of a nested answer by the error rule, in the same containers and strides."""
    with torch.no_grad():
        mine, eager, exact = ours(x), theirs(x), wide(theirs)(x.double())
    assert type(mine) is type(eager) and (not isinstance(eager, dict) or list(mine) == list(eager))
    for got, bar, true in zip(*map(outputs, (mine, eager, exact)), strict=True):
        assert got.stride() == bar.stride()
        assert_rule(got, bar, true)


# ---------------------------------------------------------------- whole networks

NETWORKS = {
    "bottleneck": lambda: small(),
    "basic": lambda: small(BasicBlock),
    "resnext": lambda: small(groups=8, width_per_group=8),
    "dilated": lambda: small(replace_stride_with_dilation=[False, True, True]),
    "frozen": lambda: small(norm_layer=FrozenBatchNorm2d),
    "vgg with biases": lambda: (
        torchvision.models.vgg.VGG(
            torchvision.models.vgg.make_layers([8, "M", 16, "M", 16, 16, "M"], batch_norm=True),
            num_classes=10,
        ).features
    ),
    "mobilenet_v3": lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.25),
    "regnet": lambda: torchvision.models.regnet_y_400mf(num_classes=10),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10),
    "densenet": lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10),
    "a dict of stages": lambda: IntermediateLayerGetter(
        small(norm_layer=FrozenBatchNorm2d), {"layer2": "a", "layer4": "b"}
    ),
}
TIMM = {
    "deep stem, average-pooled shortcut": dict(stem_type="deep", stem_width=32, avg_down=True),
    "squeeze-and-excitation": dict(block_args=dict(attn_layer="se")),
    "eca": dict(block_args=dict(attn_layer="eca")),
    "cbam": dict(block_args=dict(attn_layer="cbam")),
    "anti-aliased": dict(aa_layer="blur"),
    "resnext": dict(cardinality=8, base_width=8),
    "stochastic depth": dict(drop_path_rate=0.5),
}


def timm_net(kwargs: dict) -> nn.Module:
    resnet = pytest.importorskip("timm.models.resnet")
    torch.manual_seed(0)
    if "aa_layer" in kwargs:
        kwargs = {"aa_layer": pytest.importorskip("timm.layers").BlurPool2d}
    return resnet.ResNet(resnet.Bottleneck, (2, 1, 1, 1), num_classes=10, **kwargs)


def build(name: str) -> nn.Module:
    return shake(NETWORKS[name]() if name in NETWORKS else timm_net(TIMM[name])).eval()


@pytest.mark.parametrize("name", [*NETWORKS, *TIMM])
def test_answers(name: str) -> None:
    ours, theirs = pair(build, name=name)
    assert (
        fused(ours, images(2, 64))
        == sum(count for count, _ in accelerated(ours).fused.values())
        > 0
    )
    for x in (
        images(2, 64),
        images(1, (33, 47)),
        images(2, 32).contiguous(memory_format=torch.channels_last),
    ):
        assert_all_agree(ours, theirs, x)


RANDOM = ("mobilenet_v2", "mobilenet_v3", "stochastic depth")


@pytest.mark.parametrize(
    "name", [n for n in [*NETWORKS, *TIMM] if n not in (*RANDOM, "a dict of stages")]
)
def test_training(name: str) -> None:
    ours, theirs = pair(build, name=name)
    if name == "frozen":
        assert_train_alike(ours, theirs, images(3, 64))
    assert_train_alike(ours.train(), theirs.train(), images(3, 64))


@pytest.mark.parametrize("name", RANDOM)
def test_training_with_chance_draws_what_eager_draws(name: str) -> None:
    ours, theirs = pair(build, name=name)
    mine, exact = (outcome(m.double(), images(3, 64).double(), True, True) for m in (ours, theirs))
    for got, true in zip(mine, exact, strict=True):
        assert (got is None) == (true is None)
        if got is not None:
            torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-8)


def test_nothing_is_left_of_a_resnet() -> None:
    for name in (
        "bottleneck",
        "frozen",
        "resnext",
        "squeeze-and-excitation",
        "stochastic depth",
        "eca",
    ):
        report = accelerated(accelerate(build(name), strict=True))
        convs = sum(
            isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d) for m in build(name).modules()
        )
        gates = 5 if name in ("squeeze-and-excitation", "eca") else 0
        assert not report.left and not report.left_training and report.nhwc == ("(model)",)
        assert [sum(c) for c in zip(*report.fused.values(), strict=True)][0] == convs + gates


def test_a_feature_pyramid() -> None:
    ours, theirs = pair(
        lambda: shake(resnet_fpn_backbone(backbone_name="resnet18", weights=None)).eval()
    )
    assert_all_agree(ours, theirs, images(2, 64))
    assert len(accelerated(ours).fused) == 9


def test_a_detector_that_cannot_be_traced_is_accelerated_inside() -> None:
    ours, theirs = pair(
        lambda: torchvision.models.detection.fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=64, max_size=96
        ).eval()
    )
    assert accelerated(ours).nhwc == ("backbone",) and "forward" not in ours.__dict__
    x = [images(1, (64, 80))[0].sigmoid()]
    with torch.no_grad():
        assert [d.keys() for d in ours(x)] == [d.keys() for d in theirs(x)]


def test_double_and_low_precision() -> None:
    ours, theirs = pair()
    for dtype in (torch.float64, torch.bfloat16):
        assert_agree(ours.to(dtype), theirs.to(dtype), images(2, 64, dtype))


# ---------------------------------------------------------------- in place, reversible


def attributes(m: nn.Module) -> dict:
    return {name: dict(child.__dict__) for name, child in m.named_modules()}


def test_restore_gives_back_the_old_state() -> None:
    m = small()
    before, keys = attributes(m), list(m.state_dict())
    assert accelerate(accelerate(m)) is m and type(m) is ResNet and list(m.state_dict()) == keys
    assert isinstance(m.__dict__["forward"], Forward)
    assert restore(m) is m
    after = attributes(m)
    for name, old in before.items():
        assert list(after[name]) == list(old) and all(after[name][k] is v for k, v in old.items())


def test_twice_is_as_good_as_once_and_follows_what_changed() -> None:
    m = small()
    accelerate(m.layer2)
    accelerate(m)
    once = fused(m)
    accelerate(m)
    assert fused(m) == once == 20
    handle = m.layer1[0].conv1.register_forward_hook(lambda *a: None)
    assert fused(m) == once - 4
    accelerate(m)
    assert fused(m) == once - 1  # now only that convolution is left
    assert accelerated(m).left == {"layer1.0.conv1": "its Conv2d has hooks or a forward of its own"}
    handle.remove()


def test_a_forward_of_the_users_own_is_kept() -> None:
    m = small()
    m.layer1[0].forward = lambda x: torch.relu(x.repeat(1, 4, 1, 1))
    own = m.layer1[0].forward
    accelerate(m)
    restore(m)
    assert m.layer1[0].forward is own


def test_strict_changes_nothing_when_it_raises() -> None:
    m = small()
    m.layer1[0].bn1 = nn.BatchNorm2d(64, affine=False)
    with pytest.raises(RuntimeError, match=r"layer1\.0\.conv1: its BatchNorm2d"):
        accelerate(m, strict=True)
    assert not any("forward" in c.__dict__ for c in m.modules())


@pytest.mark.parametrize(
    "call",
    [accelerate, restore, accelerated, lambda m: resnet_fast.explain(m, torch.zeros(1))],
    ids=["accelerate", "restore", "accelerated", "explain"],
)
def test_what_is_no_module_is_refused(call, request) -> None:
    with pytest.raises(
        ValueError, match=f"{request.node.callspec.id}: model: got int, expected an nn.Module"
    ):
        call(3)


def test_our_own_models_fuse_by_themselves() -> None:
    m = resnet_fast.resnet18(num_classes=10).eval()
    accelerate(m, strict=True)
    assert not any("forward" in c.__dict__ for c in m.modules()) and len(accelerated(m).own) == 8
    assert "fuses by itself" in str(accelerated(m))


@pytest.mark.parametrize(
    "build",
    [
        lambda: torchvision.models.squeezenet1_1(num_classes=10),
        lambda: small(norm_layer=lambda c: nn.GroupNorm(4, c)),
    ],
    ids=["no norm", "group norm"],
)
def test_a_model_that_it_cannot_help_keeps_its_answers_to_the_bit(build) -> None:
    m = build().eval()
    ours = accelerate(copy.deepcopy(m))
    for _ in range(4):
        with torch.no_grad():
            assert torch.equal(ours(images(2, 64)), m(images(2, 64)))
    assert not accelerated(ours).nhwc


def test_the_report_prints() -> None:
    m = small()
    m.layer1[0].bn2 = nn.GroupNorm(2, 64)
    m.layer1[1].bn2 = nn.BatchNorm2d(64, affine=False)
    text = str(accelerated(m))
    assert "layer2.0" in text and "layer1.1.conv2" in text and "fused steps" in text


# ---------------------------------------------------------------- copies


def test_deepcopy_and_pickle_are_their_own() -> None:
    ours, theirs = pair()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.__dict__["forward"].owner() is twin and fused(twin) == fused(ours)
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0.5)
        assert_agree(ours, theirs, images(2, 64))


def test_pickle_into_another_process(tmp_path) -> None:
    ours, _ = pair()
    with torch.no_grad():
        torch.save({"model": ours, "x": images(2, 64), "y": ours(images(2, 64))}, tmp_path / "m.pt")
    code = (
        "import sys, torch; s = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): torch.testing.assert_close(s['model'](s['x']), s['y'])\n"
        "from resnet_fast import accelerated; assert accelerated(s['model']).fused"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], check=True, timeout=300)


def test_the_model_is_freed_when_dropped() -> None:
    ours, _ = pair()
    ours(images())
    gone = weakref.ref(ours)
    gc.collect()
    gc.disable()
    try:
        del ours
        assert gone() is None
    finally:
        gc.enable()


def test_a_forward_without_its_module_says_so() -> None:
    forward = accelerate(small()).forward
    with pytest.raises(ReferenceError, match="keep the module"):
        forward(images())


def test_data_parallel_replicas_run_their_own_parameters() -> None:
    ours, theirs = pair()
    block = ours.layer1[0]
    replica = block._replicate_for_data_parallel()
    replica.conv1 = copy.deepcopy(block.conv1)
    with torch.no_grad():
        replica.conv1.weight.zero_()
        x = torch.randn(1, 64, 8, 8)
        assert not torch.allclose(replica(x), block(x))


# ---------------------------------------------------------------- those who look or trace


def test_hooks_see_torchs_values_and_strides() -> None:
    ours, theirs = pair()
    seen: dict[nn.Module, list[Tensor]] = {ours: [], theirs: []}
    for m in (ours, theirs):
        for name in ("layer1", "layer2.0", "avgpool", "fc", ""):
            m.get_submodule(name).register_forward_hook(
                lambda module, args, out, m=m: seen[m].extend((args[0], out))
            )
    with torch.no_grad():
        ours(images(2, 64)), theirs(images(2, 64))
    assert len(seen[ours]) == 10
    for got, bar in zip(seen[ours], seen[theirs], strict=True):
        assert got.stride() == bar.stride()
        torch.testing.assert_close(got, bar, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "how",
    ["compile", "export", "jit.trace", "jit.script", "fx", "features", "vmap", "jvp", "signature"],
)
def test_those_who_trace_get_the_plain_modules(how: str) -> None:
    ours, theirs = pair()
    x = images(2, 64)
    with torch.no_grad():
        y = theirs(x)
        if how == "compile":
            got = torch.compile(ours, fullgraph=True, backend="eager")(x)
        elif how == "export":
            program = torch.export.export(ours, (x,))
            assert not any("resnet_fast" in str(n.target) for n in program.graph.nodes)
            got = program.module()(x)
        elif how == "jit.trace":
            got = torch.jit.trace(ours, x)(x)
        elif how == "jit.script":
            buffer = io.BytesIO()
            torch.jit.save(torch.jit.script(ours), buffer)
            got = torch.jit.load(io.BytesIO(buffer.getvalue()))(x)
            assert fused(ours) == 20
        elif how == "fx":
            got = torch.fx.symbolic_trace(ours)(x)
        elif how == "features":
            assert get_graph_node_names(ours) == get_graph_node_names(theirs)
            got = create_feature_extractor(ours, {"fc": "y"})(x)["y"]
        elif how == "vmap":
            got = torch.func.vmap(lambda image: ours(image[None])[0])(x)
        elif how == "jvp":
            got, tangent = torch.func.jvp(ours, (x,), (x,))
            torch.testing.assert_close(tangent, torch.func.jvp(theirs, (x,), (x,))[1])
        else:
            import inspect

            assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
            got = ours(x=x)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)


def test_autocast_checkpoint_and_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    from torch.utils.checkpoint import checkpoint

    ours, theirs = pair()
    x = images(2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        y = theirs(x)
        for got in pool.map(ours, [x] * 8):
            torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)
    for m in (ours, theirs):
        m.train()
        checkpoint(
            m.layer1,
            torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(),
            use_reentrant=False,
        ).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item()
            )


def test_meta_empty_and_bad_input() -> None:
    ours, theirs = pair()
    assert accelerate(small().to("meta"))(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
    with torch.no_grad():
        assert ours(torch.empty(0, 3, 64, 64)).shape == theirs(torch.empty(0, 3, 64, 64)).shape
    with pytest.raises(RuntimeError, match="channels"):
        ours(torch.randn(2, 4, 64, 64))
    bad = images(2, 64)
    bad[0, 0, 0, 0], bad[1, 1, 5, 5] = float("nan"), float("inf")
    with torch.no_grad():
        got, bar = ours(bad), theirs(bad)
    assert torch.equal(got.isnan(), bar.isnan())
