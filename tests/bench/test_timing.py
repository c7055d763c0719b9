"""The clock that every speed comes from."""

from __future__ import annotations

import pytest

from resnet_fast.util.timing import Timing, interleaved


def test_every_round_times_each_once_in_an_order_of_its_own() -> None:
    called: list[str] = []
    found = interleaved(
        {name: lambda name=name: called.append(name) for name in "abcd"},
        warmup=0,
        min_rounds=6,
        max_rounds=6,
    )
    rounds = [called[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(order) == list("abcd") for order in rounds)
    assert len(set(map(tuple, rounds))) > 3, "a fixed order gives everyone a fixed neighbour"
    assert {len(t.seconds) for t in found.values()} == {6}


def test_a_ratio_is_taken_round_by_round() -> None:
    """A machine that slows down in between slows both: the ratio does not see it."""
    base, other = Timing((1.0, 10.0, 100.0)), Timing((0.5, 5.0, 50.0))
    assert other.speedup_over(base) == pytest.approx(2.0)
    assert base.spread > 1


def test_it_stops_when_late_but_never_before_three_rounds() -> None:
    assert len(interleaved({"a": lambda: None}, max_seconds=0.0, confidence=0.0)["a"].seconds) == 3
