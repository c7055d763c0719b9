"""Which groups pay: the search over a clock that counts, and whole plans tuned by a clock that reads what they are made of."""

import pytest
import torch
from clockwork import tune
from plans import count, groups, images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import tables, use
from resnet_fast.dispatch.problem import ACROSS
from resnet_fast.graph.across import label
from resnet_fast.tuning import kernels
from resnet_fast.tuning.group_search import search
from resnet_fast.util.timing import Timing

TAIL, NARROW, WIDE, PAIR = ("tail:1",), ("tail:2", "tail:3"), ("tail:4",), ("pair:1",)


class Clock:
    """A network's seconds are 10 plus what each option costs; ``absent`` choices cannot be run."""

    def __init__(self, costs: dict, absent=lambda choice: False, wobble: float = 0.0) -> None:
        self.costs, self.absent, self.wobble, self.asked = costs, absent, wobble, []

    def __call__(self, choices):
        self.asked.append([frozenset(c) for c in choices])
        return {c: self.timing(c) for c in choices if not self.absent(c)}

    def timing(self, choice) -> Timing:
        own = 10 + sum(self.costs[o] for o in choice)
        swing = -self.wobble if choice else self.wobble
        return Timing(tuple(own + swing * (i % 3 - 1) for i in range(30)))


def find(clock, options, formed=frozenset, late=lambda: False):
    said: list[str] = []
    chosen, told = search(options, clock, formed, late, said.append)
    return set(chosen), told, said


def test_each_shape_is_decided_by_itself() -> None:
    """A kind that wins as a whole loses the shape that costs; one that loses as a whole keeps the shape that gains."""
    clock = Clock({TAIL: -2.0, NARROW: +0.5, WIDE: -0.1, PAIR: +1.0, ("pair:2",): -0.1})
    options = [TAIL, NARROW, WIDE, PAIR, ("pair:2",)]
    chosen, told, said = find(clock, options)
    assert chosen == {TAIL, WIDE, ("pair:2",)}
    tails, pairs = frozenset(options[:3]), frozenset(options[3:])
    assert clock.asked[0] == [frozenset(), tails, pairs, frozenset(options)]  # the starts, in one run
    assert clock.asked[1:4] == [
        [tails, tails - {TAIL}],
        [tails, tails - {NARROW}],
        [tails - {NARROW}, frozenset({TAIL})],
    ]
    assert told == [
        "across: tail:1: used: the whole network is 1.256 times as fast with it",
        "across: tail:2, tail:3: not used: the whole network is 0.940 times as fast with it",
        "across: tail:4: used: the whole network is 1.013 times as fast with it",
        "across: pair:1: not used: the whole network is 0.886 times as fast with it",
        "across: pair:2: used: the whole network is 1.013 times as fast with it",
    ]
    assert said[0].startswith("across: tail:1: used") and said[1].startswith("across: tail:2, tail:3: not used: ")
    assert find(Clock({}), []) == (set(), [], [])


def test_a_gain_within_noise_is_none() -> None:
    """The same 0.3 %, once steady and once among rounds that swing by 6 %; a steady 0.1 % is what two graphs may differ by."""
    assert find(Clock({TAIL: -0.03}), [TAIL])[0] == {TAIL}
    assert find(Clock({TAIL: -0.03}, wobble=0.3), [TAIL])[0] == set()
    assert find(Clock({TAIL: -0.01}), [TAIL])[0] == set()


def test_the_time_is_kept_and_what_was_found_by_then_stays() -> None:
    left = iter([False, True])
    chosen, told, said = find(Clock({TAIL: -2.0, PAIR: -1.0, WIDE: +5.0}), [WIDE, TAIL, PAIR], late=lambda: next(left))
    assert chosen == {PAIR} and len(said) == 1  # the start without the tails: one of them costs
    assert told[1] == "across: tail:1: not used: not tried by itself: the time was up"


def test_what_cannot_be_run_is_left_out() -> None:
    chosen, told, _ = find(Clock({TAIL: -2.0, PAIR: -1.0}, absent=lambda c: PAIR in c), [TAIL, PAIR])
    assert chosen == {TAIL} and told[1] == "across: pair:1: not used: it could not be run"
    chosen, told, _ = find(Clock({TAIL: -2.0}, absent=lambda c: True), [TAIL])
    assert chosen == set() and told == ["across: nothing was measured: the plan without groups could not be timed"]


def test_rivals_for_the_same_steps_are_tried_in_each_other_s_place() -> None:
    def formed(options):
        return frozenset(options) - ({PAIR} if TAIL in options else set())

    for costs, expected in (
        ({TAIL: -1.0, PAIR: -2.0, WIDE: -3.0}, {PAIR, WIDE}),
        ({TAIL: -2.0, PAIR: -1.0, WIDE: -3.0}, {TAIL, WIDE}),
    ):
        clock = Clock(costs)
        assert find(clock, [TAIL, WIDE, PAIR], formed)[0] == expected
        assert not any(
            {TAIL, PAIR} <= choice for asked in clock.asked for choice in asked
        )  # no time for what forms nothing


# ---------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def model():
    """Two shapes of tails, the first projected, and three of pairs."""
    return ready(resnet_fast.ResNet(resnet_fast.Bottleneck, [4, 1, 1, 2], width_per_group=16, num_classes=12))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where choices are remembered."""
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    tables.load.cache_clear()
    yield tmp_path
    tables.load.cache_clear()


def test_a_plan_keeps_the_shapes_that_make_it_faster(model, monkeypatch) -> None:
    tuned: list = []
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: tuned.extend(problems))
    x = images()
    run = plan(model, x)
    before = run(x)
    with use("aten.conv_tail", "aten.pointwise_pair"):  # stand for kernels that won; the other two kinds have none
        said = tune(
            run,
            x,
            {
                "conv_tail:layer1.1.conv2": -2.0,
                "conv_tail:layer1.0.conv2": -0.2,
                "conv_tail:layer1.3.conv2": +0.1,
                "pointwise_pair:layer1.0.conv3": -0.5,
                "pointwise_pair:layer3.0.conv3": +1.0,
                "pointwise_pair:layer2.0.conv3": +0.1,
                "pointwise_pair:layer4.0.conv3": +0.1,
            },
        )
        after = run(x)
    assert {p.op for p in tuned} == {"conv_bn_act", *ACROSS} and len(set(tuned)) == len(tuned)
    # Blocks 1 and 2 are of one shape, 3 and the projected first of others; block 0's pair gains more than its tail, which
    # would take its steps.
    assert set(run.across) == {"conv_tail:layer1.1.conv2", "conv_tail:layer1.2.conv2", "pointwise_pair:layer1.0.conv3"}
    assert {label(s) for s in groups(run)} == set(run.across) and count(run) == {"conv_tail": 2, "pointwise_pair": 1}
    torch.testing.assert_close(after, before)
    assert run.notes[:2] == [
        "across: conv_pool: not used: no kernel of it won against single steps",
        "across: pointwise_pool: not used: no kernel of it won against single steps",
    ]
    assert (
        "across: conv_tail:layer1.1.conv2, conv_tail:layer1.2.conv2: used: the whole network is 1.267 times as fast with it"
        in run.notes
    ), run.notes
    assert all(note in str(run) for note in run.notes) and len(said) >= 6


def test_a_tuned_plan_is_saved_and_asked_by_name(model, monkeypatch, tmp_path) -> None:
    x = images()
    run = plan(model, x, across=["conv_tail:layer1.1.conv2", "pointwise_pair", "conv_tail:layer4.9.conv2"])
    assert count(run) == {"conv_tail": 1, "pointwise_pair": 4} and run.notes == [
        "across: this network has no conv_tail:layer4.9.conv2"
    ]
    assert torch.equal(run(x), plan(model, x)(x))
    run.save(tmp_path / "net")
    assert count(resnet_fast.load_plan(tmp_path / "net")) == count(run)
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: None)
    with use("aten.conv_tail", "aten.pointwise_pair"):
        tune(run, x, dict.fromkeys(["conv_tail:layer1.1.conv2", "conv_tail:layer1.2.conv2"], -1.0))
    assert run.across == ("conv_tail:layer1.1.conv2",)  # only what the plan was made with was asked for


def test_no_seconds_leave_the_best_start(model, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: None)
    run = plan(model, images())
    with use("aten.conv_tail"):
        tune(run, images(), {"conv_tail:layer1.1.conv2": -2.0, "conv_tail:layer1.0.conv2": +1.0}, seconds=-1.0)
    assert count(run) == {"conv_tail": 4} and sum("the time was up" in note for note in run.notes) == 3


@pytest.mark.parametrize("after", [0, 1, 2])
def test_tuning_survives_a_variant_that_cannot_run(model, monkeypatch, after) -> None:
    """Out of memory, or a kernel that fails: named, left out, the plan answers as before."""
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: None)
    x, make = images(), resnet_fast.planning.plan.Plan.variant
    run = plan(model, x, across=("pointwise_pool", "pointwise_pair"))
    before, calls = run(x), []

    def failing(self, across):
        made = make(self, across)
        calls.append(across)
        if "pool" in str(across) and sum("pool" in str(c) for c in calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return made

    monkeypatch.setattr(resnet_fast.planning.plan.Plan, "variant", failing)
    with use("aten.pointwise_pair", *["aten.pointwise_pool"] if after else []):
        tune(run, x, {"pointwise_pool:layer4.1.conv3": -1.0, "pointwise_pair:layer2.0.conv3": +1.0})
    assert torch.allclose(run(x), before, atol=1e-4) and "pointwise_pool" not in str(run.across)
    assert any("could not be run: CUDA out of memory. Tried" in note for note in run.notes)
    assert any(
        note.startswith("across: pointwise_pair:layer2.0.conv3: not used: the whole network is 0.9")
        for note in run.notes
    )
    assert not any("conv_tail" in note for note in run.notes)  # only what the plan was made with was asked for
