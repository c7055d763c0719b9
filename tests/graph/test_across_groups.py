"""Groups of steps in a plan: found by structure, formed only without a visible difference, chosen by measurement."""

import dataclasses

import pytest
import torch
from plans import count, groups, images, judge, ready
from torch import nn

import resnet_fast
from resnet_fast import load_plan, plan
from resnet_fast.dispatch import choose, use
from resnet_fast.dispatch.problem import ACROSS
from resnet_fast.graph import across
from resnet_fast.graph.ir import Group
from resnet_fast.runtime import bind

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

# How many groups of each kind a network has: its tails are stride 1, all blocks but the last lead on to a next one.
NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(), {"conv_pool": 1}),
    "resnet50": (
        lambda: torchvision.models.resnet50(),
        {"conv_pool": 1, "pointwise_pool": 1, "pointwise_pair": 4, "conv_tail": 12},
    ),
    "ours": (
        lambda: resnet_fast.resnet50(),
        {"conv_pool": 1, "pointwise_pool": 1, "pointwise_pair": 4, "conv_tail": 12},
    ),
    "resnext50": (
        lambda: torchvision.models.resnext50_32x4d(),
        {"conv_pool": 1, "pointwise_pool": 1, "pointwise_pair": 4},
    ),
    "wide": (
        lambda: torchvision.models.wide_resnet50_2(),
        {"conv_pool": 1, "pointwise_pool": 1, "pointwise_pair": 4, "conv_tail": 12},
    ),
    "timm": (
        lambda: timm.create_model("resnet26"),
        {"conv_pool": 1, "pointwise_pool": 1, "pointwise_pair": 4, "conv_tail": 4},
    ),
    "timm deep stem": (
        lambda: timm.create_model("resnet26d"),
        {"pointwise_pool": 1, "pointwise_pair": 4, "conv_tail": 4},
    ),
    "squeeze and excite": (lambda: timm.create_model("seresnet50"), {"conv_pool": 1}),
}
STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def model():
    """Small and with every kind: bottlenecks with and without projection, the stem, the head."""
    return ready(
        resnet_fast.ResNet(resnet_fast.Bottleneck, [2, 1, 1, 2], width_per_group=16, num_classes=12)
    )


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_of_real_networks(name) -> None:
    """Each kind is found as often as the architecture has it; all together give exactly the single steps' results."""
    make, expected = NETWORKS[name]
    net, x = ready(make()), images(h=32, w=32)
    plain = plan(net, x)
    for kind in ACROSS:
        assert count(plain.variant((kind,))) == (
            {kind: expected[kind]} if kind in expected else {}
        ), kind
    run = plain.variant(ACROSS)
    assert sum(count(run).values()) and groups(plain) == []
    judge(run(x), net, x)
    assert torch.equal(run(x), plain(x))  # one by one: the very same calls


def test_members_stand_for_every_step_once(model) -> None:
    plain = plan(model, images())
    run = plain.variant(ACROSS)
    members = [
        m for s in run._engine.lowered.steps for m in (s.members if isinstance(s, Group) else (s,))
    ]
    assert sorted(m.output for m in members) == sorted(
        s.output for s in plain._engine.lowered.steps
    )
    # layer1.0 (projected) and layer4.0's last block; strided blocks keep their pair
    assert count(run) == {"pointwise_pair": 3, "conv_tail": 2, "conv_pool": 1, "pointwise_pool": 1}
    tail = next(s for s in groups(run) if s.op == "conv_tail")
    assert tail.target == "layer1.0.conv2" and [m.target for m in tail.members] == [
        "layer1.0.conv2",
        "layer1.0.downsample.0",
        "layer1.0.conv3",
        "layer1.1.conv1",
    ]


@pytest.mark.parametrize("kind", ACROSS)
def test_every_kernel_gets_the_right_arguments(model, kind) -> None:
    """The op in place of single steps: forced, its aten composition holds the error rule in every dtype and size."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = images().to(dtype)
        net = model if dtype == torch.float32 else __import__("copy").deepcopy(model).to(dtype)
        with use(f"aten.{kind}"):
            run = plan(net, x, across=(kind,))
            judge(run(x), net, x)
            for shape in ((1, 3, 64, 64), (5, 3, 65, 47), (2, 3, 33, 32)):
                again = torch.randn(shape).to(dtype)
                judge(run(again), net, again)
            assert {s.kernel for s in run.steps if s.op == kind} == {f"aten.{kind}"}
            assert run(torch.randn(0, 3, 64, 64, dtype=dtype)).shape == (0, 12)


# ---------------------------------------------------------------- not formed


class Net(nn.Module):
    """One bottleneck after a convolution, with a hole for what a test wants read or done."""

    def __init__(self, middle=None, kernel=3, groups_=1, stride=1, act=True, pool=None):
        super().__init__()

        def conv(i, o, r, s=1, g=1):
            return nn.Sequential(
                nn.Conv2d(i, o, r, s, r // 2, groups=g, bias=False), nn.BatchNorm2d(o)
            )

        self.stem, self.two, self.three, self.next = (
            conv(3, 8, 3),
            conv(8, 8, kernel, stride, groups_),
            conv(8, 8, 1),
            conv(8, 8, 1),
        )
        self.projection = conv(8, 8, 1, stride)
        self.middle, self.act, self.pool = middle, act, pool
        self.spy = nn.Sigmoid()
        self.spy.register_forward_hook(lambda m, args, out: out)

    def forward(self, x):
        start = torch.relu(self.stem(x))
        m = torch.relu(self.two(start))
        early = self.projection(start) if self.middle == "early" else None
        main = self.three(m)
        shortcut = self.projection(start) if early is None else early
        extra = self.spy(start).mean() if self.middle == "spy" else 0
        y = main + shortcut
        y = torch.relu(y) if self.act else y
        z = torch.relu(self.next(y))
        if self.middle == "m":
            z = z + m.mean()
        if self.middle == "shortcut":
            z = z + shortcut.mean()
        if self.middle == "y":
            return z, y
        return (z + y).mean((2, 3)) + extra


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, {"pointwise_pair": 1, "conv_tail": 1}),
        ({"middle": "y"}, {"pointwise_pair": 1, "conv_tail": 1}),
        ({"middle": "m"}, {"pointwise_pair": 1}),
        ({"middle": "shortcut"}, {"conv_tail": 1}),
        ({"kernel": 5}, {"pointwise_pair": 1}),
        ({"kernel": 1}, {"pointwise_pair": 1}),
        ({"groups_": 2}, {"pointwise_pair": 1}),
        ({"stride": 2}, {"pointwise_pair": 1}),
        ({"act": False}, {}),
        ({"middle": "spy"}, {}),
        ({"middle": "early"}, {"pointwise_pair": 1}),
        ({"middle": "early", "stride": 2}, {"pointwise_pair": 1}),
    ],
)
def test_formed_only_where_nobody_can_tell(how, expected) -> None:
    """A second reader inside, another kernel size, groups, stride or no ReLU, a hooked module of unknown code; the
    block's output itself may be read and returned.
    """
    net, x = ready(Net(**how)), images(h=16, w=16)
    plain = plan(net, x)
    assert {
        kind: n for kind in ACROSS for n in [count(plain.variant((kind,))).get(kind)] if n
    } == expected
    with torch.no_grad():
        wanted = net(x)
    run = plain.variant(ACROSS)
    for ids in ((), tuple(f"aten.{kind}" for kind in count(run))):
        with use(*ids):
            run = plain.variant(ACROSS)
            for got, want in zip(
                run(x) if isinstance(wanted, tuple) else [run(x)],
                wanted if isinstance(wanted, tuple) else [wanted],
                strict=True,
            ):
                torch.testing.assert_close(got, want)


def test_features_inside_a_group_stay(model) -> None:
    x = images()
    for path, lost in (
        ("layer1.0.conv2", "conv_tail"),
        ("layer2.0.downsample", "pointwise_pair"),
        ("relu", "conv_pool"),
        ("layer4", "pointwise_pool"),
    ):
        wanted = plan(model, x, features=[path, "fc"])
        run = plan(model, x, features=[path, "fc"], across=ACROSS)
        assert count(run).get(lost, 0) < count(plan(model, x, across=ACROSS))[lost], path
        for key, got in run(x).items():
            torch.testing.assert_close(got, wanted(x)[key])


def test_no_group_with_what_the_user_hooked() -> None:
    net, x = ready(torchvision.models.resnet50()), images(h=32, w=32)
    net.layer1[0].bn3.register_forward_hook(lambda m, a, out: out)
    found = [s.target for s in groups(plan(net, x, across=("conv_tail",)))]
    assert "layer1.0.conv2" not in found and "layer1.1.conv2" in found


def test_a_residual_that_broadcasts_runs_one_by_one() -> None:
    class Squeezed(Net):
        def forward(self, x):
            start = torch.relu(self.stem(x))
            shortcut = self.projection(start.mean((2, 3), keepdim=True))
            return torch.relu(self.three(torch.relu(self.two(start))) + shortcut)

    net, x = ready(Squeezed()), images(h=16, w=16)
    with torch.no_grad():
        run = plan(net, x, across=("pointwise_pair",))
        torch.testing.assert_close(run(x), net(x))
    (step,) = (s for s in run.steps if s.op == "pointwise_pair")
    assert step.problem is None and "x2 shape" in step.why


def test_an_inner_value_that_broadcasts_keeps_its_shape(monkeypatch) -> None:
    """The next convolution is bound for what it will get: the residual's size, not the block's own."""

    class Squeezed(Net):
        def forward(self, x):
            start = torch.relu(self.stem(x))
            small = start.mean((2, 3), keepdim=True)
            y = torch.relu(self.three(torch.relu(self.two(small))) + start)
            return torch.relu(self.next(y)), y

    net, x = ready(Squeezed()), images(h=16, w=16)
    asked: list = []
    monkeypatch.setattr(
        bind, "choose", lambda problem, **how: (asked.append(problem), choose(problem, **how))[1]
    )
    run = plan(net, x, across=("conv_tail",))
    with torch.no_grad():
        for got, want in zip(run(x), net(x), strict=True):
            torch.testing.assert_close(got, want)
    assert count(run) == {"conv_tail": 1} and asked[-1].x == (2, 8, 16, 16)


# ---------------------------------------------------------------- promises


def test_unknown_kinds_and_absent_groups_are_said(model) -> None:
    with pytest.raises(ValueError, match="across: got 'tails', expected some of 'pointwise_pair'"):
        plan(model, images(), across=("tails",))
    basic = plan(
        ready(resnet_fast.resnet18()), images(h=32, w=32), across=["conv_tail", "conv_pool"]
    )
    assert basic.notes == [
        "across: this network has no conv_tail"
    ] and "this network has no conv_tail" in str(basic)


@pytest.mark.parametrize("forced", [False, True])
def test_bytes_are_normalised_inside_the_stem(model, forced) -> None:
    """One by one to the bit, in the op by the rule; padding is zero after normalising; softmax and top-k follow."""
    pixels = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        plain = plan(model, pixels, normalize=STATS, dtype=dtype, softmax=True, topk=3)
        with use(*["aten.conv_pool"] if forced else []):
            run = plan(
                model, pixels, normalize=STATS, dtype=dtype, softmax=True, topk=3, across=ACROSS
            )
            assert (
                run._engine.prepared(pixels).dtype == torch.uint8
                and plain._engine.prepared(pixels).dtype == dtype
            )
            (p, c), (q, d) = run(pixels), plain(pixels)
        assert torch.equal(c, d)
        torch.testing.assert_close(p, q, rtol=0 if not forced else 2e-2, atol=0)
        assert [s.problem.bytes for s in run.steps if s.op == "conv_pool"] == [True]


def test_the_input_read_twice_is_normalised_outside() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            return (
                nn.functional.max_pool2d(torch.relu(self.bn(self.conv(x))), 3, 2, 1).mean()
                + x.mean()
            )

    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    net = ready(Twice())
    run = plan(net, pixels, normalize=STATS, across=("conv_pool",))
    assert count(run) == {"conv_pool": 1} and run._engine.prepared(pixels).dtype == torch.float32
    torch.testing.assert_close(run(pixels), plan(net, pixels, normalize=STATS)(pixels))


def test_saved_loaded_moved_refreshed(model, tmp_path) -> None:
    pixels = torch.randint(0, 256, (2, 64, 48, 3), dtype=torch.uint8)
    run = plan(model, pixels, normalize=STATS, across=("conv_tail", "conv_pool"))
    wanted = run(pixels)
    run.save(tmp_path / "net")
    loaded = load_plan(tmp_path / "net")
    assert (
        loaded.across == run.across
        and count(loaded) == count(run)
        and torch.equal(loaded(pixels), wanted)
    )
    assert count(run.to("cpu")) == count(loaded) and torch.equal(run(pixels), wanted)
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)
    assert (
        torch.equal(run(pixels), wanted)
        and not torch.equal(run.refresh()(pixels), wanted)
        and count(run) == count(loaded)
    )
    with torch.no_grad():
        model.conv1.weight.div_(1.5)
    record = torch.load(tmp_path / "net", weights_only=True)
    for spoil, words in (
        ({"across": ["conv_tails"]}, "damaged .*across: got 'conv_tails'"),
        ({"resnet_fast_plan": 1}, "version 1, expected 2"),
    ):
        torch.save(record | spoil, tmp_path / "bad")
        with pytest.raises(ValueError, match=words):
            load_plan(tmp_path / "bad")


def test_weights_are_shared_and_pieces_and_memory_are_as_without(model, monkeypatch) -> None:
    x = images(n=9)
    plain = plan(model, x)
    run = plan(model, x, across=ACROSS)
    assert (
        all(run._engine.lowered.filters[k] is f for k, f in plain._engine.lowered.filters.items())
        and run.weight_bytes == plain.weight_bytes
    )
    assert run._engine.cuts_batches and run._engine.programs.keys() == plain._engine.programs.keys()
    assert all(
        run._engine.programs[k].largest == p.largest for k, p in plain._engine.programs.items()
    )
    assert torch.equal(run(x), plain(x))
    # whose largest value is the stem's, inside a group
    basic = plan(ready(resnet_fast.resnet18()), x)
    basic_run = basic.variant(ACROSS)
    basic_run(x)
    assert [p.largest for p in basic_run._engine.programs.values()] == [
        p.largest for p in basic._engine.programs.values()
    ]
    assert sum(s.flops for s in run.steps) == sum(s.flops for s in plain.steps)


def test_values_die_in_time(model) -> None:
    """A value that only a group reads is gone after it; a residual is overwritten only if nothing reads it again."""
    x = images()
    run = plan(model, x, across=ACROSS)
    (step, _, dead), *_ = [
        call
        for call in run._engine.last_built._calls
        if isinstance(call[0], Group) and call[0].op == "conv_tail"
    ]
    assert {v.name for v in step.args} <= dead
    first = run(x)
    assert torch.equal(run(x), first)


def test_a_bound_group_holds_weights_and_no_activations(model) -> None:
    with use(*(f"aten.{kind}" for kind in ACROSS)):
        run = plan(model, images(), across=ACROSS)
    weights = {id(f.weight) for f in run._engine.lowered.filters.values()}
    for step, call, _ in run._engine.last_built._calls:
        if isinstance(step, Group):
            tuples = [
                cell.cell_contents
                for cell in call.__closure__
                if isinstance(cell.cell_contents, tuple)
            ]
            held = [t for found in tuples for t in found if isinstance(t, torch.Tensor)]
            assert held and all(id(t) in weights for t in held if t.dim() == 4), step.op
    single = plan(model, images(), across=ACROSS)
    assert [
        call.values for step, call, _ in single._engine.last_built._calls if isinstance(step, Group)
    ] == [{}] * len(groups(single))


def test_compare_aligns_by_the_values_that_both_make(model) -> None:
    x = images()
    run, plain = plan(model, x, across=ACROSS), plan(model, x, fuse=False)
    rows = run.compare(plain, x, plan(model, x, dtype=torch.float64, fuse=False))
    by_value = {r.value: r for r in rows}
    tail = next(s for s in groups(run) if s.op == "conv_tail")
    y, z = by_value[tail.output], by_value[tail.also[0]]
    assert (
        (y.steps, z.steps) == (1, 0)
        and y.other_steps == 9
        and z.other_steps == 3
        and z.ms == 0 < z.other_ms
    )
    assert sum(r.steps for r in rows) == len(run.steps) and sum(r.other_steps for r in rows) == len(
        plain.steps
    )
    assert not any(r.broken for r in rows) and all(r.distance < 1e-5 for r in rows)


def test_it_prints_and_explains(model, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = plan(model, images(), across=ACROSS)
    text = str(run)
    assert "conv_tail with downsample.0, conv3, layer1.1.conv1 relu" in text
    assert "aten (oneDNN)" in text or "cpu." in text  # which of them depends on the processor
    line = next(x for x in run.explain(images()) if x.op == "pointwise_pair")
    assert (
        line.module == "layer2.0.conv3" and line.why == "one by one: default" and line.problem.chain
    )
    assert [s.op for s in run.steps] == [
        s.op for s in plan(model, images(), across=ACROSS).variant(ACROSS).steps
    ]


def test_fusion_is_pure(model) -> None:
    lowered = plan(model, images())._engine.lowered
    before = [dataclasses.replace(s) for s in lowered.steps]
    assert across.grouped(lowered, ACROSS) == across.grouped(lowered, reversed(ACROSS))
    assert list(lowered.steps) == before
    assert across.grouped(lowered, ()).steps == lowered.steps
