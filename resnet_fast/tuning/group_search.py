"""The search for the groups that make a whole network faster: the best of a few starts, then one option at a time.

A pure function: the caller gives the clock and says which groups form. Groups of the same shapes are one option,
decided together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..util.timing import Timing

UNTRIED = "not tried by itself: the time was up"
# The certain part of a gain must exceed this: two graphs of the same network differ by about as much.
MARGIN = 1.002

Option = tuple[str, ...]  # the names of its groups, "kind:step"
Choice = frozenset[Option]
Clock = Callable[[list[Choice]], dict[Choice, "Timing"]]
Formed = Callable[[Iterable[Option]], Choice]


def search(
    options: Sequence[Option],
    clock: Clock,
    formed: Formed,
    late: Callable[[], bool],
    say: Callable[[str], None],
) -> tuple[Choice, list[str]]:
    """Return the options that make the whole network faster, and a sentence for each option.

    ``clock`` times whole networks in one run and leaves out those that could not be run. ``formed`` returns those of
    some options whose steps no larger group takes. The search starts from the fastest of no option, each kind and all;
    then it flips one option at a time for a gain beyond noise, until no flip gains or it is ``late``.
    """
    chosen, was_timed = _start(options, clock, formed)
    if not was_timed:
        return chosen, ["across: nothing was measured: the plan without groups could not be timed"]
    found: dict[Option, str] = {}
    unchanged = 0
    for option in cycle(options):
        if unchanged == len(options) or late():
            break
        flipped = _flipped(chosen, option, formed)
        timings = clock([chosen, flipped])
        unchanged += 1
        if len(timings) < 2:
            found[option] = (
                "it could not be run" if option in flipped else "it could not be run without"
            )
            continue
        with_it, without = (chosen, flipped) if option in chosen else (flipped, chosen)
        speedup = timings[with_it].speedup_over(timings[without])
        found[option] = f"the whole network is {speedup:.3f} times as fast with it"
        if timings[flipped].lead_over(timings[chosen]) >= MARGIN:
            chosen, unchanged = flipped, 0
        say(_decision(option, chosen, found))
    return chosen, [_decision(option, chosen, found) for option in options]


def _start(options: Sequence[Option], clock: Clock, formed: Formed) -> tuple[Choice, bool]:
    """Return the fastest of no option, each kind and all, and whether there was anything to time and it was timed."""
    nothing: Choice = frozenset()
    if not options:
        return nothing, True
    by_kind: dict[str, list[Option]] = {}
    for option in options:
        kind = option[0].partition(":")[0]
        by_kind.setdefault(kind, []).append(option)
    starts = [nothing]
    for alike in by_kind.values():
        starts.append(formed(alike))
    starts.append(formed(options))
    timings = clock(list(dict.fromkeys(starts)))
    if nothing not in timings:
        return nothing, False
    leads = {choice: timing.lead_over(timings[nothing]) for choice, timing in timings.items()}
    best = max(leads, key=leads.__getitem__)
    if leads[best] < MARGIN:
        return nothing, True
    return best, True


def _flipped(chosen: Choice, option: Option, formed: Formed) -> Choice:
    """Return the choice without the option, or with it in place of the options that would take its steps."""
    if option in chosen:
        return formed(chosen - {option})
    rivals = set()
    for other in chosen:
        if option not in formed([other, option]):
            rivals.add(other)
    return formed({*chosen - rivals, option})


def _decision(option: Option, chosen: Choice, found: dict[Option, str]) -> str:
    """Return the sentence on whether an option is used, and why."""
    names = ", ".join(option)
    used = "used" if option in chosen else "not used"
    why = found.get(option, UNTRIED)
    return f"across: {names}: {used}: {why}"
