"""The rows of a run by what they are about, and the questions that stages and summary ask of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
BAD = ("wrong", "failed", "hung", "died")
BARS = ("eager", "folded")  # timed variants that are no kernels


@dataclass
class Found:
    """The rows of a run; ``checks`` has those of the check stage by kernel."""

    rows: list[dict]
    checks: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.of("check"):
            kernel = kernel_of(row)
            self.checks.setdefault(kernel, []).append(row)

    def of(self, stage: str) -> list[dict]:
        """Return the rows of a stage."""
        return [row for row in self.rows if row["stage"] == stage]

    def one(self, stage: str, case: str) -> dict | None:
        """Return the first row of a case, or None."""
        for row in self.of(stage):
            if row["case"] == case:
                return row
        return None

    @property
    def inventory(self) -> dict[str, dict]:
        """The last row of each kernel: a build may have come in between."""
        return {row["case"]: row for row in self.of("inventory")}

    @property
    def machine(self) -> dict:
        """The ledger's description of the machine."""
        return self.one("environment", "machine")["machine"]

    @property
    def ceilings(self) -> list[dict]:
        """The rows of the measured ceilings."""
        return [row for row in self.of("environment") if row["case"] != "machine"]

    @property
    def layers(self) -> list[dict]:
        """The rows of the layers that have times."""
        rows = self.of("layers")
        measured = [row for row in rows if row["status"] == "measured"]
        return [row for row in measured if row["times"]]

    def proved(self, dtype: str) -> list[str]:
        """Return the kernels with every case of this dtype checked and none found wrong."""
        kernels = []
        for kernel, rows in self.checks.items():
            if is_proved(of_dtype(rows, dtype)):
                kernels.append(kernel)
        return kernels

    def bad(self) -> list[dict]:
        """Return every row in which a kernel of ours is wrong, failed, hung or died, or a network of ours is wrong."""
        return [*self._bad_kernels(), *self._bad_networks()]

    def _bad_kernels(self) -> list[dict]:
        bad = []
        for stage in ("check", "large", "sanitizer", "streams"):
            for row in self.of(stage):
                if row["status"] in BAD and ours(kernel_of(row)):
                    bad.append(row)
        return bad

    def _bad_networks(self) -> list[dict]:
        bad = [row for row in self.of("models") if row["status"] in BAD]
        for case, row in self.networks().items():
            for id, why in row["wrong"].items():
                bad.append(
                    {
                        "stage": "networks",
                        "job": id,
                        "case": case,
                        "status": "wrong",
                        "reason": why,
                    }
                )
        return bad

    def networks(self) -> dict[str, dict]:
        """Return the row of each case. A later stage has more providers: its row replaces that of an earlier one."""
        found = {}
        for stage in ("headline", "peers", "train"):
            for row in self.of(stage):
                if row["status"] == "measured" and row["rows"]:
                    found[row["case"]] = row
        return found


# ---------------------------------------------------------------- questions about rows


def dtype_of(case: str) -> str | None:
    """Return the dtype that a case's name mentions."""
    for part in case.split():
        if part in DTYPES:
            return part
    return None


def of_dtype(rows: list[dict], dtype: str) -> list[dict]:
    """Return the rows of cases in one dtype."""
    return [row for row in rows if dtype_of(row["case"]) == dtype]


def kernel_of(row: dict) -> str:
    """Return the kernel that a row of check, large or sanitizer is about."""
    name = row["case"] if row["stage"] == "large" else row["job"]
    return name.split()[0]


def ours(kernel: str) -> bool:
    """Whether a kernel is not one of torch's own."""
    return not kernel.startswith("aten")


def is_our_variant(id: str) -> bool:
    """Whether a timed variant is a kernel of ours."""
    return id not in BARS and ours(id)


def is_proved(rows: list[dict]) -> bool:
    """Whether every case of a kernel was checked and right, and there was at least one."""
    status = Counter(row["status"] for row in rows)
    right = status["right"]
    nothing_else = right + status["complete"] == len(rows)
    return right > 0 and nothing_else and complete(rows)


def complete(rows: list[dict]) -> bool:
    """Whether every share of a kernel's cases was run to its end."""
    ends = [row for row in rows if row["status"] == "complete"]
    if not ends:
        return False
    shares = ends[0]["shares"]
    return len(ends) == shares


def fastest(times: dict[str, dict], ids: Iterable[str]) -> str | None:
    """Return the fastest of the named variants that have a time."""

    def microseconds(id: str) -> float:
        return times[id]["us"]

    timed = [id for id in ids if id in times]
    return min(timed, key=microseconds, default=None)


def fastest_of_ours(row: dict) -> str | None:
    """Return our fastest kernel on a layer."""
    times = row["times"]
    our_variants = filter(is_our_variant, times)
    return fastest(times, our_variants)


def over_bar(row: dict) -> float | None:
    """Return how many times faster our best kernel is than the prefolded bar on a layer."""
    best = fastest_of_ours(row)
    if best is None:
        return None
    return row["times"][best]["over"].get("folded")


def gap(row: dict) -> float:
    """Return the microseconds between a layer's fastest variant and its floor."""
    times = row["times"]
    best = fastest(times, times)
    floor = row["floor_us"] or 0
    return times[best]["us"] - floor


def total_gap(row: dict) -> float:
    """Return the microseconds that a network could gain on all its layers of this kind."""
    return row["count"] * gap(row)
