"""Which groups of a network pay, by the whole network's time: the best of a few starts, then one distinct group at a time on or off.

Pure: the clock, and what a choice of groups forms, are given. Groups of the same shapes are one option, decided together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..util.timing import Timing

UNTRIED = "not tried by itself: the time was up"
MARGIN = (
    1.002  # of what is certain of a gain: two measurements of the same network, each in a graph of its own, differ too
)

Option = tuple[str, ...]  # the names of its groups, "kind:step"
Choice = frozenset[Option]
Clock = Callable[[list[Choice]], dict[Choice, "Timing"]]


def search(
    options: Sequence[Option],
    clock: Clock,
    formed: Callable[[Iterable[Option]], Choice],
    late: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[Choice, list[str]]:
    """(the options that make the whole network faster, a sentence for each).

    ``clock`` times whole networks in one run; what it leaves out could not be run. ``formed``: those of some options whose steps no
    larger group takes. Starts are nothing, each kind and everything; an option is then turned on or off for a gain beyond noise, until
    none changes or ``late``.
    """
    chosen, timed = _start(options, clock, formed)
    if not timed:
        return chosen, ["across: nothing was measured: the plan without groups could not be timed"]
    how: dict[Option, str] = {}
    unchanged = 0
    for option in cycle(options):
        if unchanged == len(options) or late():
            break
        other = _turned(chosen, option, formed)
        timings = clock([chosen, other])
        unchanged += 1
        if len(timings) < 2:
            how[option] = "it could not be run" if option in other else "it could not be run without"
            continue
        own, without = (timings[c] for c in ((chosen, other) if option in chosen else (other, chosen)))
        how[option] = f"the whole network is {own.speedup_over(without):.3f} times as fast with it"
        if timings[other].lead_over(timings[chosen]) >= MARGIN:
            chosen, unchanged = other, 0
        say(_told(option, chosen, how))
    return chosen, [_told(option, chosen, how) for option in options]


def _start(
    options: Sequence[Option], clock: Clock, formed: Callable[[Iterable[Option]], Choice]
) -> tuple[Choice, bool]:
    """The fastest of nothing, each kind and everything; whether nothing could be timed."""
    kinds = dict.fromkeys(_kind(option) for option in options)
    starts = [formed([o for o in options if _kind(o) == kind]) for kind in kinds]
    nothing: Choice = frozenset()
    timings = clock(list(dict.fromkeys([nothing, *starts, formed(options)]))) if options else {}
    if nothing not in timings:
        return nothing, not options
    leads = {choice: timing.lead_over(timings[nothing]) for choice, timing in timings.items()}
    best = max(leads, key=leads.__getitem__)
    return best if leads[best] >= MARGIN else nothing, True


def _kind(option: Option) -> str:
    return option[0].partition(":")[0]


def _turned(chosen: Choice, option: Option, formed: Callable[[Iterable[Option]], Choice]) -> Choice:
    """Without the option, or with it in place of those that would take its steps."""
    if option in chosen:
        return formed(chosen - {option})
    rivals = {other for other in chosen if option not in formed([other, option])}
    return formed({*chosen - rivals, option})


def _told(option: Option, chosen: Choice, how: dict[Option, str]) -> str:
    used = "used" if option in chosen else "not used"
    return f"across: {', '.join(option)}: {used}: {how.get(option, UNTRIED)}"
