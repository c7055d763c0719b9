"""The search for groups: over a clock with computed times, and for whole plans that such a clock tunes."""

import pytest
import torch
from clockwork import tune
from plans import count, groups, images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import tables, use
from resnet_fast.dispatch.problem import ACROSS
from resnet_fast.graph.across import label
from resnet_fast.planning.plan import Plan
from resnet_fast.tuning import kernels
from resnet_fast.tuning.group_search import search
from resnet_fast.util.timing import Timing

TAIL, NARROW, WIDE, PAIR = ("tail:1",), ("tail:2", "tail:3"), ("tail:4",), ("pair:1",)
OTHER_PAIR = ("pair:2",)


class Clock:
    """A network's seconds are 10 plus what each option costs.

    ``absent`` tells which choices cannot be run; ``wobble`` is how far the rounds swing. ``asked`` lists each call.
    """

    def __init__(self, costs: dict, absent=lambda choice: False, wobble: float = 0.0) -> None:
        self.costs, self.absent, self.wobble = costs, absent, wobble
        self.asked = []

    def __call__(self, choices):
        self.asked.append([frozenset(choice) for choice in choices])
        return {choice: self.timing(choice) for choice in choices if not self.absent(choice)}

    def timing(self, choice) -> Timing:
        seconds = 10 + sum(self.costs[option] for option in choice)
        swing = -self.wobble if choice else self.wobble
        return Timing(tuple(seconds + swing * (i % 3 - 1) for i in range(30)))


def find(clock, options, formed=frozenset, late=lambda: False):
    """The search's choice, its sentences, and the lines that it said."""
    said: list[str] = []
    chosen, decisions = search(options, clock, formed, late, said.append)
    return set(chosen), decisions, said


# ---------------------------------------------------------------- the search


SHAPES = [TAIL, NARROW, WIDE, PAIR, OTHER_PAIR]
SHAPE_COSTS = {TAIL: -2.0, NARROW: +0.5, WIDE: -0.1, PAIR: +1.0, OTHER_PAIR: -0.1}


def test_each_shape_is_decided_by_itself() -> None:
    """A kind that wins as a whole loses the shape that costs; one that loses as a whole keeps the shape that gains."""
    chosen, decisions, said = find(Clock(SHAPE_COSTS), SHAPES)
    assert chosen == {TAIL, WIDE, OTHER_PAIR}
    assert decisions == [
        "across: tail:1: used: the whole network is 1.256 times as fast with it",
        "across: tail:2, tail:3: not used: the whole network is 0.940 times as fast with it",
        "across: tail:4: used: the whole network is 1.013 times as fast with it",
        "across: pair:1: not used: the whole network is 0.886 times as fast with it",
        "across: pair:2: used: the whole network is 1.013 times as fast with it",
    ]
    assert said[0].startswith("across: tail:1: used")
    assert said[1].startswith("across: tail:2, tail:3: not used: ")


def test_starts_are_timed_in_one_run_then_one_option_is_flipped_at_a_time() -> None:
    clock = Clock(SHAPE_COSTS)
    find(clock, SHAPES)
    tails, pairs = frozenset([TAIL, NARROW, WIDE]), frozenset([PAIR, OTHER_PAIR])
    assert clock.asked[0] == [frozenset(), tails, pairs, tails | pairs]
    assert clock.asked[1] == [tails, tails - {TAIL}]
    assert clock.asked[2] == [tails, tails - {NARROW}]
    assert clock.asked[3] == [tails - {NARROW}, frozenset({TAIL})]


def test_no_options_need_no_clock() -> None:
    assert find(Clock({}), []) == (set(), [], [])


@pytest.mark.parametrize(
    ("gain", "wobble", "chosen"),
    [(0.03, 0.0, {TAIL}), (0.03, 0.3, set()), (0.01, 0.0, set())],
    ids=[
        "0.3 % and steady",
        "0.3 % among rounds that swing by 6 %",
        "0.1 %, as two graphs may differ",
    ],
)
def test_gain_within_noise_does_not_count(gain, wobble, chosen) -> None:
    assert find(Clock({TAIL: -gain}, wobble=wobble), [TAIL])[0] == chosen


def test_late_search_keeps_what_it_found() -> None:
    late = iter([False, True])
    clock = Clock({TAIL: -2.0, PAIR: -1.0, WIDE: +5.0})
    chosen, decisions, said = find(clock, [WIDE, TAIL, PAIR], late=lambda: next(late))
    assert chosen == {PAIR}  # the start without the tails, since one of them costs
    assert len(said) == 1
    assert decisions[1] == "across: tail:1: not used: not tried by itself: the time was up"


def test_option_that_cannot_be_run_is_left_out() -> None:
    clock = Clock({TAIL: -2.0, PAIR: -1.0}, absent=lambda choice: PAIR in choice)
    chosen, decisions, _ = find(clock, [TAIL, PAIR])
    assert chosen == {TAIL}
    assert decisions[1] == "across: pair:1: not used: it could not be run"


def test_nothing_timed_chooses_nothing() -> None:
    chosen, decisions, _ = find(Clock({TAIL: -2.0}, absent=lambda choice: True), [TAIL])
    assert chosen == set()
    assert decisions == ["across: nothing was measured: the plan without groups could not be timed"]


def tail_takes_the_steps_of_pair(options):
    return frozenset(options) - ({PAIR} if TAIL in options else set())


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ({TAIL: -1.0, PAIR: -2.0, WIDE: -3.0}, {PAIR, WIDE}),
        ({TAIL: -2.0, PAIR: -1.0, WIDE: -3.0}, {TAIL, WIDE}),
    ],
)
def test_rivals_for_the_same_steps_replace_each_other(costs, expected) -> None:
    clock = Clock(costs)
    chosen, _, _ = find(clock, [TAIL, WIDE, PAIR], tail_takes_the_steps_of_pair)
    assert chosen == expected
    for choices in clock.asked:  # no time for a choice that does not form
        assert not any({TAIL, PAIR} <= choice for choice in choices)


# ---------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def model():
    """Two shapes of tails, the first projected, and three of pairs."""
    return ready(
        resnet_fast.ResNet(resnet_fast.Bottleneck, [4, 1, 1, 2], width_per_group=16, num_classes=12)
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where choices are stored."""
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    tables.load.cache_clear()
    yield tmp_path
    tables.load.cache_clear()


@pytest.fixture
def tuned_problems(monkeypatch) -> list:
    """The problems whose kernels were to be measured; none is."""
    problems: list = []
    monkeypatch.setattr(kernels, "tune", lambda found, device, say: problems.extend(found))
    return problems


PLAN_COSTS = {
    "conv_tail:layer1.1.conv2": -2.0,
    "conv_tail:layer1.0.conv2": -0.2,
    "conv_tail:layer1.3.conv2": +0.1,
    "pointwise_pair:layer1.0.conv3": -0.5,
    "pointwise_pair:layer3.0.conv3": +1.0,
    "pointwise_pair:layer2.0.conv3": +0.1,
    "pointwise_pair:layer4.0.conv3": +0.1,
}


def test_plan_uses_the_shapes_that_make_it_faster(model, tuned_problems) -> None:
    x = images()
    run = plan(model, x)
    before = run(x)
    # stand for kernels that won; the other two kinds have none
    with use("aten.conv_tail", "aten.pointwise_pair"):
        said = tune(run, x, PLAN_COSTS)
        after = run(x)

    # Blocks 1 and 2 are of one shape, 3 and the projected first of others; block 0's pair gains more than its tail,
    # which would take its steps.
    winners = {
        "conv_tail:layer1.1.conv2",
        "conv_tail:layer1.2.conv2",
        "pointwise_pair:layer1.0.conv3",
    }
    assert set(run.across) == winners
    assert {label(step) for step in groups(run)} == winners
    assert count(run) == {"conv_tail": 2, "pointwise_pair": 1}
    torch.testing.assert_close(after, before)
    assert run.notes[:2] == [
        "across: conv_pool: not used: no kernel of it won against single steps",
        "across: pointwise_pool: not used: no kernel of it won against single steps",
    ]
    tails = "conv_tail:layer1.1.conv2, conv_tail:layer1.2.conv2"
    assert f"across: {tails}: used: the whole network is 1.267 times as fast with it" in run.notes
    assert all(note in str(run) for note in run.notes)
    assert len(said) >= 6


def test_kernels_of_every_kind_of_group_are_tuned_once(model, tuned_problems) -> None:
    tune(plan(model, images()), images(), {})
    assert {problem.op for problem in tuned_problems} == {"conv_bn_act", *ACROSS}
    assert len(set(tuned_problems)) == len(tuned_problems)


NAMED = ["conv_tail:layer1.1.conv2", "pointwise_pair", "conv_tail:layer4.9.conv2"]


def test_groups_are_formed_by_kind_or_name_and_saved(model, tmp_path) -> None:
    x = images()
    run = plan(model, x, across=NAMED)
    assert count(run) == {"conv_tail": 1, "pointwise_pair": 4}
    assert run.notes == ["across: this network has no conv_tail:layer4.9.conv2"]
    assert torch.equal(run(x), plan(model, x)(x))

    run.save(tmp_path / "net")

    assert count(resnet_fast.load_plan(tmp_path / "net")) == count(run)


def test_tuning_chooses_among_the_named_groups_only(model, tuned_problems) -> None:
    run = plan(model, images(), across=NAMED)
    costs = {"conv_tail:layer1.1.conv2": -1.0, "conv_tail:layer1.2.conv2": -1.0}
    with use("aten.conv_tail", "aten.pointwise_pair"):
        tune(run, images(), costs)
    assert run.across == ("conv_tail:layer1.1.conv2",)


def test_no_seconds_leave_the_best_start(model, tuned_problems) -> None:
    run = plan(model, images())
    costs = {"conv_tail:layer1.1.conv2": -2.0, "conv_tail:layer1.0.conv2": +1.0}
    with use("aten.conv_tail"):
        tune(run, images(), costs, seconds=-1.0)
    assert count(run) == {"conv_tail": 4}
    assert sum("the time was up" in note for note in run.notes) == 3


@pytest.mark.parametrize("after", [0, 1, 2])
def test_variant_that_cannot_run_is_named_and_left_out(
    model, tuned_problems, monkeypatch, after
) -> None:
    """Pooling runs out of memory after so many variants that have it; the plan answers as before."""
    x, real, pooled = images(), Plan.variant, []
    run = plan(model, x, across=("pointwise_pool", "pointwise_pair"))
    before = run(x)

    def variant(self, across):
        made = real(self, across)
        if "pool" in str(across):
            pooled.append(across)
            if len(pooled) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return made

    monkeypatch.setattr(Plan, "variant", variant)
    winners = ["aten.pointwise_pair", *(["aten.pointwise_pool"] if after else [])]
    with use(*winners):
        tune(run, x, {"pointwise_pool:layer4.1.conv3": -1.0, "pointwise_pair:layer2.0.conv3": +1.0})

    assert torch.allclose(run(x), before, atol=1e-4)
    assert "pointwise_pool" not in str(run.across)
    notes = "\n".join(run.notes)
    assert "could not be run: CUDA out of memory. Tried" in notes
    assert "across: pointwise_pair:layer2.0.conv3: not used: the whole network is 0.9" in notes
    assert "conv_tail" not in notes  # the user named other groups
