"""Clocks, power, temperature and throttling of the GPU, read from nvidia-smi while a run goes on."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterable


class Sensors:
    """Reads nvidia-smi every few seconds in a thread. It sets nothing."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    # the second in older drivers
    THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")

    def __init__(self, every: float = 5.0, program: str = "nvidia-smi") -> None:
        self.readings: list[tuple[float, list[str]]] = []
        self._every = every
        self._program = program
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Sensors:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(10)

    def query(self, *names: str) -> list[str] | None:
        """Return one line of values, or None where nvidia-smi is absent or does not know these names."""
        command = [self._program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = answer.stdout.strip().splitlines()
        if answer.returncode != 0 or not lines:
            return None
        return [value.strip() for value in lines[0].split(",")]

    def _known_names(self) -> tuple[str, ...] | None:
        """Return the fields to query, with the throttle reasons under the name that this driver knows."""
        for reasons in self.THROTTLE:
            names = (*self.FIELDS, reasons)
            if self.query(*names):
                return names
        return None

    def _loop(self) -> None:
        names = self._known_names()
        while names is not None and not self._stop.is_set():
            values = self.query(*names)
            if values is not None:
                self.readings.append((time.monotonic(), values))
            self._stop.wait(self._every)

    def since(self, start: float) -> dict[str, str]:
        """Return the range of each reading since a moment, and every throttle reason seen."""
        rows = [values for at, values in self.readings if at >= start]
        if not rows:
            return {}
        seen = {}
        for i, name in enumerate(self.FIELDS):
            low, high = _range(row[i] for row in rows)
            seen[name] = f"{low}..{high}"
        reasons = {row[-1] for row in rows}
        seen["throttle"] = " ".join(sorted(reasons))
        return seen


def _range(values: Iterable[str]) -> tuple[str, str]:
    """Return the lowest and the highest number among some readings."""
    numbers = sorted(filter(_is_number, values), key=float)
    if not numbers:
        return "?", "?"
    return numbers[0], numbers[-1]


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
