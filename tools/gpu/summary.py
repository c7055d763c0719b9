"""The result of a run: a table of one screen, ``summary.json``, and a file for the ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from operator import itemgetter
from pathlib import Path

from .decisions import SLOWER, decisions
from .found import (
    BAD,
    BARS,
    DTYPES,
    SHORT,
    Found,
    dtype_of,
    fastest,
    fastest_of_ours,
    is_our_variant,
    over_bar,
    total_gap,
)

LAYERS_SHOWN = 10


# ---------------------------------------------------------------- the table


def summary(found: Found) -> str:
    """Return the run on one screen: machine, ceilings, kernels, layers with most to gain, networks, what to do next."""
    parts = [
        _heading(found),
        _ceilings(found),
        _kernels(found),
        _layers(found),
        _groups(found),
        _networks(found),
        _stages(found),
    ]
    next_up = "\n".join(f"- {line}" for line in decisions(found) or ["nothing stands out"])
    return "\n\n".join([*filter(None, parts), f"NEXT\n{next_up}"])


def _heading(found: Found) -> str:
    machine = found.machine
    facts = machine["facts"]
    return (
        f"{machine['name']}, driver {facts.get('driver', '?')}, torch {facts.get('torch', '?')}, triton "
        f"{facts.get('triton', '?')}, commit {machine['commit']}, {machine['date']}"
    )


def _ceilings(found: Found) -> str:
    """Return the measured ceilings in one line."""
    values = ", ".join(map(_ceiling, found.ceilings))
    return f"CEILINGS  {values}" if values else ""


def _ceiling(row: dict) -> str:
    case = row["case"]
    if row["status"] != "measured":
        return f"{case} {row['status']}"
    value = row["value"]
    if row["unit"] == "s":
        return f"{case} {value * 1e6:.3g} µs"
    return f"{case} {value / 1e12:.3g} T{row['unit']}"


def _kernels(found: Found) -> str:
    proved = {dtype: found.proved(dtype) for dtype in DTYPES}
    lines = []
    for kernel, rows in found.checks.items():
        dtypes = [SHORT[dtype] for dtype in DTYPES if kernel in proved[dtype]]
        lines.append(_kernel_line(kernel, rows, dtypes))
    for id, row in found.inventory.items():
        if row["status"] == "absent":
            lines.append(f"cannot run here: {id} ({row['reason']})"[:200])
    return "KERNELS\n" + "\n".join(lines) if lines else ""


def _kernel_line(kernel: str, rows: list[dict], proved: list[str]) -> str:
    """Return the count of a kernel's checks, the dtypes in which it is proved, and the first check that is bad."""
    checks = 0
    bad = []
    for row in rows:
        if row["status"] in ("complete", "left out"):
            continue
        checks += 1
        if row["status"] in BAD:
            bad.append(row)
    dtypes = " ".join(proved)
    state = f"proved in {dtypes}" if proved else "not proved"
    line = f"{kernel:28} {checks:5} checks {len(bad):4} bad  {state}"
    if bad:
        first = bad[0]
        line += f"; {first['status']}: {first['case']}: {first.get('reason')}"
    return line[:200]


def _layers(found: Found) -> str:
    rows = found.layers
    if not rows:
        return ""
    lines = [
        f"{'layer':22} {'batch':>5} {'n':>3} {'best of ours':28} {'µs':>8} {'floor':>8} {'%':>4}  over bar, eager"
    ]
    most_to_gain = sorted(rows, key=total_gap, reverse=True)
    lines += [_layer_line(row) for row in most_to_gain[:LAYERS_SHOWN]]
    ratios = [ratio for ratio in map(over_bar, rows) if ratio]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        slower = sum(ratio < SLOWER for ratio in ratios)
        lines.append(
            f"ours over the prefolded cuDNN bar: geometric mean {mean:.2f} over {len(ratios)} layers, "
            f"{slower} slower by more than 2 %"
        )
    return (
        "LAYERS (device time in a graph, rotating buffers; the ten with the most to gain)\n"
        + "\n".join(lines)
    )


def _layer_line(row: dict) -> str:
    """Return a layer with our best kernel, its time, its share of the floor, and its speed over bar and eager."""
    times = row["times"]
    best = fastest_of_ours(row) or fastest(times, times)
    timing = times[best]
    us = timing["us"]
    floor = row["floor_us"]
    share = f"{'?':>8} {'?':>4}"
    if floor:
        percent = 100 * floor / us
        share = f"{floor:8.1f} {percent:4.0f}"
    ratios = map(timing["over"].get, reversed(BARS))
    over = ", ".join(map(_ratio, ratios))
    layer = f"{row['layer']:22} {row['batch']:5} {row['count']:3}"
    return f"{layer} {best:28} {us:8.1f} {share}  {over}"


def _ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else "-"


def _groups(found: Found) -> str:
    """Return which groups of layers the tuned plans use."""
    last = {row["case"]: row for row in found.of("groups")}
    if not last:
        return ""
    lines = map(_group_line, last.values())
    return "GROUPS of layers that the tuned plan (ours-plan) runs as one\n" + "\n".join(lines)


def _group_line(row: dict) -> str:
    """Return the groups that one plan uses, and how many were not tried."""
    case = row["case"]
    if row["status"] != "tuned":
        return f"  {case}: {row['status']}: {row.get('reason')}"
    groups = ", ".join(row["across"]) or "none"
    untried = sum("the time was up" in note for note in row["notes"])
    if not untried:
        return f"  {case}: {groups}"
    return f"  {case}: {groups} ({untried} not tried by themselves: the time was up)"


def _networks(found: Found) -> str:
    lines = []
    for case, row in found.networks().items():
        lines.append(case)
        by_time = sorted(row["rows"], key=itemgetter("seconds"))
        lines += map(_provider_line, by_time)
        for id, why in row.get("skipped", {}).items():
            lines.append(f"  {id:18} skipped: {why}"[:160])
        for id, why in row.get("wrong", {}).items():
            lines.append(f"  {id:18} WRONG: {why}"[:160])
    return "NETWORKS\n" + "\n".join(lines) if lines else ""


def _provider_line(r: dict) -> str:
    """Return a provider's throughput, time, speed over eager, share of the floor, errors and memory."""
    over = r["speed_over"].get("eager")
    ratio = f"{over:.2f}×" if over else "1×"
    share = f"{100 * r['roofline']:.0f} %" if r["roofline"] else "-"
    memory = f"{r['peak_bytes'] / 2**20:,.0f} MiB" if r["peak_bytes"] else "-"
    milliseconds = r["seconds"] * 1e3
    error = _small(r["error"])
    eager_error = _small(r["eager_error"])
    return (
        f"  {r['provider']:18} {r['img_s']:10,.0f} img/s "
        f"{milliseconds:9.3f} ms {ratio:>7} eager"
        f"{share:>6} of floor  "
        f"error {error} (eager {eager_error}) {memory}"
    )


def _small(value: float | None) -> str:
    """Format an error. A peer's answer may be NaN, which a row has as None."""
    return "NaN" if value is None else f"{value:.1e}"


def _stages(found: Found) -> str:
    """Return the seconds of each stage."""
    stages = map(_stage, found.of("stages"))
    return "STAGES  " + "; ".join(stages)


def _stage(row: dict) -> str:
    text = f"{row['job']} {row['seconds']:.0f} s"
    if row["reason"]:
        text += f" ({row['reason']})"
    return text


# ---------------------------------------------------------------- files


def write(found: Found, folder: Path, results: Path) -> list[Path]:
    """Write summary.json beside the rows and, if anything was timed, the run in the ledger's format."""
    path = folder / "summary.json"
    record = {
        "machine": found.machine,
        "proved": {d: found.proved(d) for d in DTYPES},
        "decisions": decisions(found),
        "bad": found.bad(),
        "stages": found.of("stages"),
        "ceilings": found.ceilings,
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [*network_rows(found), *layer_rows(found)]
    if not rows:
        return [path]
    return [path, _write_ledger(rows, found.machine, results)]


def _write_ledger(rows: list[dict], machine: dict, results: Path) -> Path:
    from resnet_fast.bench.ledger import Machine, Row, write_run

    date = machine["date"][:19]
    stamp = "".join(filter(str.isdigit, date))
    name = "".join(c if c.isalnum() else "-" for c in machine["name"].lower())
    commit = machine["commit"].rstrip("+")
    path = results / f"{stamp}-{name}-{commit}.json"
    ledger_rows = [Row(**row) for row in rows]
    return write_run(ledger_rows, Machine(**machine), path)


def network_rows(found: Found) -> Iterable[dict]:
    """Yield each provider of each network as a row of the ledger."""
    for row in found.networks().values():
        yield from row["rows"]


def layer_rows(found: Found) -> Iterable[dict]:
    """Yield each timed variant of each layer as a row of the ledger, with the error that its check found."""
    checks = _checks_by_problem(found)
    for row in found.of("layers"):
        if row["status"] != "measured":
            continue
        for id, time in row["times"].items():
            check = checks.get((id, row["case"]), {})
            yield _ledger_row(row, id, time, check)


def _checks_by_problem(found: Found) -> dict[tuple[str, str], dict]:
    """Return the check rows of a network's problems, by kernel and problem."""
    checks = {}
    for kernel, rows in found.checks.items():
        for row in rows:
            kind, _, problem = row["case"].partition(" ")
            if kind in ("full", "small") and problem:
                checks[kernel, problem] = row
    return checks


def _ledger_row(
    row: dict,
    id: str,
    time: dict,
    check: dict,
) -> dict:
    """Return one timed variant of a layer in the ledger's format."""
    key = row["case"]
    seconds = time["us"] / 1e6
    return {
        "level": "op",
        "case": f"op/{key}",
        "provider": id,
        "ours": is_our_variant(id),
        "dtype": SHORT[dtype_of(key)],
        "batch": row["batch"],
        "size": None,
        "layout": "nhwc",
        "seconds": seconds,
        "low": time["low"] / 1e6,
        "high": time["high"] / 1e6,
        "rounds": time["rounds"],
        "problem": key,
        "tflops": row["flops"] / seconds / 1e12,
        "gb_s": row["bytes"] / seconds / 1e9,
        "roofline": row["floor_us"] and row["floor_us"] / time["us"],
        "error": check.get("error"),
        "eager_error": check.get("eager_error"),
        "speed_over": time["over"],
    }
