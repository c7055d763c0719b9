"""Which kernel runs: the registry, use() and the environment, tables, the memo, recording, kernels from a file."""

from __future__ import annotations

import sys
import threading
import types
from dataclasses import replace

import pytest
import torch

from resnet_fast import ops
from resnet_fast.dispatch import kernel, registry, select, tables, use
from resnet_fast.dispatch.problem import Problem, describe
from resnet_fast.dispatch.select import Choice

pytestmark = pytest.mark.usefixtures("registry")
X, W, K = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3), torch.ones(8)


def everything(problem: Problem) -> None:
    return None


def conv(x: torch.Tensor = X, **keywords) -> torch.Tensor:
    return ops.conv_bn_act(x, W, K, K, **keywords)


def spy(
    id: str, supports=everything, available=lambda: None, op: str = "conv_bn_act"
) -> list[tuple]:
    """Register a kernel that notes its calls and lets aten answer."""
    calls: list[tuple] = []

    @kernel(id, op=op, supports=supports, available=available)
    def run(*args):
        calls.append(args)
        return registry.find("aten", op).fn(*args)

    return calls


def only_relu(problem: Problem) -> str | None:
    return None if problem.act == "relu" else "it ends in a ReLU"


# ---------------------------------------------------------------- registry


def test_an_unknown_op_is_refused_when_registering() -> None:
    with pytest.raises(
        ValueError, match="kernel 'a.b': unknown op 'conv', expected one of conv_bn_act"
    ):
        kernel("a.b", op="conv", supports=everything)


def test_find_names_what_is_known() -> None:
    assert registry.find("aten", "bn_act").id == registry.find("aten.bn_act").id == "aten.bn_act"
    with pytest.raises(
        LookupError, match=r"kernel 'aten.nothing' is unknown; known: aten.add_act, "
    ):
        registry.find("aten.nothing")


@pytest.mark.parametrize(
    ("id", "meant"),
    [
        ("cpu", "cpu.bn_act, cpu.bn_act_backward, cpu.conv, cpu.winograd"),
        ("cpu.winogard", "cpu.winograd"),
        ("aten.conv_bn", "aten.conv_bn_act"),
    ],
)
def test_an_id_that_is_nearly_one_is_told_which_it_may_be(id, meant, monkeypatch) -> None:
    with pytest.raises(
        LookupError, match=f"kernel '{id}' is unknown; did you mean one of these: {meant}\\?"
    ):
        use(id)
    monkeypatch.setenv(select.ENV, id)
    with pytest.raises(
        LookupError, match=f"kernel '{id}' is unknown; did you mean one of these: {meant}\\?"
    ):
        conv()


def test_every_op_has_an_aten_kernel_and_every_kernel_a_reason_for_foreign_problems() -> None:
    problem = describe("add_act", (X, X, None, "relu"))
    for k in registry.kernels("conv_bn_act"):
        assert k.reason(problem) == "it implements conv_bn_act, not add_act"
    for op in ("conv_bn_act", "bn_act", "bn_act_backward", "add_act", "add_act_backward"):
        assert registry.find("aten", op).reason(replace(problem, op=op)) is None


def test_registering_again_replaces() -> None:
    first, second = spy("experimental.a"), spy("experimental.a")
    with use("experimental.a"):
        conv()
    assert not first and len(second) == 1


def test_a_kernel_without_a_file_can_register(monkeypatch) -> None:
    """In a notebook or at the prompt ``__main__`` has no file."""
    code = (
        "import resnet_fast\n@resnet_fast.kernel('experimental.prompt', op='add_act', supports=lambda p: None)\n"
        "def f(x, y, gate, act): return x + y\n"
    )
    for module in (types.ModuleType("prompt"), None):
        monkeypatch.setitem(sys.modules, "prompt", module)
        exec(code, {"__name__": "prompt"})
        assert registry.find("experimental.prompt").sources == ()


# ---------------------------------------------------------------- use()


def test_use_forces_and_lets_go() -> None:
    calls = spy("experimental.a")
    conv()
    with use("experimental.a"):
        conv()
        ops.add_act(X, X)
    conv()
    assert len(calls) == 1


def test_use_leaves_declined_problems_to_others() -> None:
    calls = spy("experimental.a", only_relu)
    with use("experimental.a"):
        conv(act="none")
        conv()
        conv(act="none")
    assert len(calls) == 1


def test_use_raises_for_what_it_cannot_do() -> None:
    spy("experimental.absent", available=lambda: "it needs a GPU")
    with pytest.raises(LookupError, match="'experimental.none' is unknown"):
        use("experimental.none")
    with pytest.raises(
        RuntimeError, match="kernel 'experimental.absent' cannot run here: it needs a GPU"
    ):
        use("experimental.absent")


def test_use_raises_if_it_claimed_nothing() -> None:
    spy("experimental.a", only_relu)
    with (
        pytest.raises(
            RuntimeError, match="kernel 'experimental.a' claimed no problem: it ends in a ReLU"
        ),
        use("experimental.a"),
    ):
        conv(act="none")
    with (
        pytest.raises(
            RuntimeError,
            match="kernel 'experimental.a' claimed no problem: its op was never called",
        ),
        use("experimental.a"),
    ):
        ops.add_act(X, X)
    assert not select._forced


def test_an_error_inside_use_is_not_hidden() -> None:
    spy("experimental.a")
    with pytest.raises(KeyError, match="mine"), use("experimental.a"):
        raise KeyError("mine")
    assert not select._forced


def test_strict_raises_at_the_first_declined_problem() -> None:
    calls = spy("experimental.a", only_relu)
    with use("experimental.a", strict=True):
        conv()
        ops.add_act(X, X)  # another op is not its business
    for _ in range(2):  # nothing is memoised by the first refusal
        with (
            pytest.raises(
                RuntimeError,
                match="kernel 'experimental.a' declines conv_bn_act float32 .*: it ends in a ReLU",
            ),
            use("experimental.a", strict=True),
        ):
            conv(act="none")
    assert len(calls) == 1


def test_the_inner_use_wins_and_gives_back() -> None:
    outer, inner = spy("experimental.outer"), spy("experimental.inner", only_relu)
    with use("experimental.outer"):
        conv()
        with use("experimental.inner"):
            conv()
            conv(act="none")  # the inner declines, the outer takes it
        conv()
    assert (len(outer), len(inner)) == (3, 1)


def test_several_kernels_at_once() -> None:
    a, b = spy("experimental.a"), spy("experimental.b", op="add_act")
    with use("experimental.a", "experimental.b"):
        conv()
        ops.add_act(X, X)
    assert len(a) == len(b) == 1


def test_use_reaches_the_threads_of_backward() -> None:
    """CUDA backward runs in threads of its own: forcing is process-wide, not thread-local."""
    calls, threads = spy("experimental.b", op="add_act_backward"), []
    with use("experimental.b"):
        x = X.clone().requires_grad_()
        out = ops.add_act(x, X)
        worker = threading.Thread(target=lambda: threads.append(torch.autograd.grad(out.sum(), x)))
        worker.start()
        worker.join()
    assert len(calls) == len(threads) == 1


def test_a_choice_made_while_use_begins_is_not_memoised() -> None:
    """Another thread is between choosing and memoising when ``use`` opens: its choice must not outlive it."""
    calls, entered = spy("experimental.a"), []

    class Later:
        def __enter__(self):
            self.context = use("experimental.a")
            self.context.__enter__()

    def slow(problem: Problem) -> str | None:
        if not entered:
            entered.append(Later())
            entered[0].__enter__()
        return "it only wanted to be asked"

    spy("experimental.slow", slow)
    with pytest.raises(RuntimeError, match="claimed no problem"), use("experimental.slow"):
        conv()  # asked under the old rules, while the new ones come into force
        conv()
        entered[0].context.__exit__(None, None, None)
    assert len(calls) >= 1


# ---------------------------------------------------------------- environment


def test_the_environment_forces(monkeypatch) -> None:
    calls = spy("experimental.a", only_relu)
    monkeypatch.setenv(select.ENV, "aten.bn_act, experimental.a")
    with select.record() as choices:
        conv()
        conv(act="none")
    assert len(calls) == 1
    assert [(c.kernel, c.why) for c in choices] == [
        ("experimental.a", f"forced by {select.ENV}"),
        ("aten.conv_bn_act", "default"),
    ]


def test_the_environment_names_what_it_cannot_do(monkeypatch) -> None:
    spy("experimental.absent", available=lambda: "it needs a GPU")
    monkeypatch.setenv(select.ENV, "experimental.none")
    with pytest.raises(LookupError, match="'experimental.none' is unknown"):
        conv()
    monkeypatch.setenv(select.ENV, "experimental.absent")
    with pytest.raises(
        RuntimeError,
        match=f"'experimental.absent' from {select.ENV} cannot run here: it needs a GPU",
    ):
        conv()


def test_use_goes_before_the_environment(monkeypatch) -> None:
    spy("experimental.env")
    calls = spy("experimental.use")
    monkeypatch.setenv(select.ENV, "experimental.env")
    with use("experimental.use"):
        conv()
    assert len(calls) == 1


# ---------------------------------------------------------------- tables

ON_GPU = Problem(
    op="conv_bn_act",
    device="cuda",
    dtype=torch.bfloat16,
    x=(8, 64, 56, 56),
    layout="nhwc",
    weight=(64, 64, 1, 1),
    bn=True,
    act="relu",
    capability=(9, 0),
)


@pytest.fixture
def table(monkeypatch) -> dict[str, dict]:
    """A GPU model of our own with its table, no GPU needed."""
    entries: dict[str, dict] = {}
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Imaginary 1")
    monkeypatch.setattr(tables, "lookup", lambda problem, graph=False: entries.get(problem.key))
    return entries


def test_the_table_is_asked_on_a_gpu_only(table) -> None:
    spy("experimental.a")
    table[ON_GPU.key] = table[replace(ON_GPU, device="cpu").key] = {
        "kernel": "experimental.a",
        "time_us": 12.34,
    }
    chosen, why = select.choose(ON_GPU)
    assert chosen.id == "experimental.a" and why == "measured: 12.3 µs on Imaginary 1"
    assert select.choose(replace(ON_GPU, device="cpu", capability=None))[0].id in (
        "cpu.conv",
        "aten.conv_bn_act",
    )


def test_without_an_entry_nothing_unproved_is_chosen(table) -> None:
    spy("experimental.a")
    assert select.choose(ON_GPU)[0].id == "aten.conv_bn_act"
    assert select.rejected(ON_GPU)["experimental.a"].startswith("no measurement on this GPU")


def test_an_entry_whose_kernel_declines_is_passed_over(table) -> None:
    spy("experimental.a", lambda problem: "not today")
    table[ON_GPU.key] = {"kernel": "experimental.a", "time_us": 1.0}
    assert select.choose(ON_GPU)[0].id == "aten.conv_bn_act"
    assert select.rejected(ON_GPU)["experimental.a"] == "not today"


def test_force_goes_before_the_table(table) -> None:
    spy("experimental.a")
    spy("experimental.b")
    table[ON_GPU.key] = {"kernel": "experimental.a", "time_us": 1.0}
    with pytest.raises(RuntimeError, match="claimed no problem"), use("experimental.b"):
        assert select.choose(replace(ON_GPU, op="conv_bn_act"))[0].id == "experimental.b"
        select._forced[-1].claimed = False


# ---------------------------------------------------------------- memo, record, problem


def test_the_memo_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(select, "MEMO_LIMIT", 5)
    for height in range(3, 20):
        conv(torch.randn(1, 4, height, 3))
        assert len(registry._memo) <= 5


def test_the_memo_asks_a_kernel_once() -> None:
    asked = []
    spy("experimental.a", lambda problem: asked.append(problem))
    with use("experimental.a"):
        for _ in range(3):
            conv()
    assert len(asked) == 1 and asked[0] == describe(
        "conv_bn_act", (X, W, K, K, None, None, None, 0.0, (1, 1), (0, 0), (1, 1), 1, "relu")
    )


def test_record_tells_problem_kernel_reason_and_layer() -> None:
    with select.record() as outer:
        conv()
        with select.record() as inner:
            ops.bn_act(X, W[0, :, 0, 0], W[0, :, 0, 0])
    conv()
    assert [c.problem.op for c in outer] == ["conv_bn_act", "bn_act"] and [
        c.problem.op for c in inner
    ] == ["bn_act"]
    assert outer[0] == Choice(outer[0].problem, "aten.conv_bn_act", "default", id(W))
    assert not select._recorders


def test_record_sees_other_threads() -> None:
    with select.record() as choices:
        worker = threading.Thread(target=conv)
        worker.start()
        worker.join()
    assert len(choices) == 1


def test_problems_describe_layout_geometry_and_operands() -> None:
    x = X.contiguous(memory_format=torch.channels_last)
    res = torch.randn(2, 8, 3, 3)
    p = describe("conv_bn_act", (x, W, K, K, res, K, K, 1e-5, (2, 2), (1, 1), (1, 1), 1, "relu"))
    assert (p.layout, p.residual, p.bn, p.out_hw, p.capability) == (
        "nhwc",
        "nchw",
        True,
        (3, 3),
        None,
    )
    assert p.key == "conv_bn_act float32 2x4x6x6 nhwc w8x4x3x3 s2x2 p1x1 d1x1 g1 res-nchw bn relu"
    assert describe("add_act", (x[..., 1:], X[..., 1:], None, "none")).layout == "strided"
    assert not p.pointwise and replace(p, weight=(8, 4, 1, 1), padding=(0, 0)).pointwise


def test_distinct_problems_have_distinct_keys() -> None:
    variants = [
        {},
        {"dtype": torch.float16},
        {"x": (4, 64, 56, 56)},
        {"layout": "nchw"},
        {"weight": (64, 64, 3, 3)},
        {"stride": (2, 2)},
        {"padding": (1, 1)},
        {"dilation": (2, 2)},
        {"groups": 2},
        {"residual": "nhwc"},
        {"residual": "nchw"},
        {"bn": False},
        {"act": "none"},
        {"op": "bn_act"},
        {"gate": True},
    ]
    assert len({replace(ON_GPU, **v).key for v in variants}) == len(variants)


# ---------------------------------------------------------------- kernels from a file

KERNEL_FILE = """
from resnet_fast import kernel

@kernel("experimental.mine", op="add_act", supports=lambda p: "no gates" if p.gate else None)
def mine(x, y, gate, act):
    return (x + y).clamp_(min=0) if act == "relu" else x + y
"""


def test_load_file_brings_its_kernels(tmp_path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(KERNEL_FILE)
    for _ in range(2):  # edited and loaded again
        brought = registry.load_file(path)
        assert [k.id for k in brought] == ["experimental.mine"] and str(path) in brought[0].sources
    with use("experimental.mine"):
        assert torch.equal(ops.add_act(X, X), torch.relu(X + X))


def test_load_file_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing.py does not exist"):
        registry.load_file(tmp_path / "nothing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="registered no kernel"):
        registry.load_file(tmp_path / "empty.py")
    (tmp_path / "kernel.txt").write_text(KERNEL_FILE)
    with pytest.raises(ValueError, match="kernel.txt is not a Python file"):
        registry.load_file(tmp_path / "kernel.txt")
