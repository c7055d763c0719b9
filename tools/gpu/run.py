"""One run of ``make gpu``: its folder, its ledger, its watchdog, and the kernels that take part."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from . import extension
from .found import Found, ours
from .watchdog import Job, Ledger, Watchdog


class NoGpu(Exception):
    """There is no GPU to run on."""


@dataclass
class Run:
    """One run: where its results go, the watchdog over its children, and whether it is a rehearsal on a CPU."""

    folder: Path
    ledger: Ledger
    watchdog: Watchdog
    rehearse: bool

    def job(
        self,
        stage: str,
        job: Job,
        deadline: float,
    ) -> str | None:
        """Run a job of a stage; None, or a sentence that says what stopped it."""
        if self.rehearse:  # on a machine that other programs use too
            env = {**job.env, "OMP_NUM_THREADS": "1"}
            job = replace(job, env=env)
        return self.watchdog.run(stage, job, deadline)

    def note(self, title: str, text: str) -> None:
        """Append a tool's output to the log, beside the output of the children."""
        path = self.folder / "log.txt"
        with path.open("a", encoding="utf-8") as log:
            log.write(f"==== {title}\n{text}\n")

    def args(self, **more) -> dict:
        """Return a task's arguments, which in a rehearsal say that it is one."""
        return {"rehearse": True, **more} if self.rehearse else more

    @property
    def found(self) -> Found:
        """The rows so far."""
        return Found(self.ledger.rows)

    def machine_row(self) -> dict:
        """Return the row of the environment stage that describes the machine."""
        return self.found.one("environment", "machine")

    def kernels(self) -> list[str]:
        """Return the kernels that can run here. An extension built from other sources takes no part.

        Candidates to win come first: at a deadline the checks of the others are left out.
        """
        stale = not self.rehearse and extension.prebuilt() != extension.sources()
        ops = {}
        for id, row in self.found.inventory.items():
            if row["status"] == "here" and not (stale and id.startswith("native")):
                ops[id] = row.get("op", "")

        def rank(id: str) -> tuple[bool, bool]:
            elementwise = ops[id].startswith(("bn_act", "add_act"))
            return not ours(id), elementwise

        return sorted(ops, key=rank)

    def proved(self) -> list[str]:
        """Return the kernels proved in the dtype that is timed."""
        return self.found.proved("float32" if self.rehearse else "bfloat16")


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
