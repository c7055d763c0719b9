"""What to do next after a run: one line for each finding that calls for a decision."""

from __future__ import annotations

from operator import itemgetter

from .found import DTYPES, Found, complete, gap, kernel_of, of_dtype, ours, over_bar, total_gap

# Goals of the project for ResNet-50, bf16, batch 256: how many times faster than each provider, and images a second.
TARGETS = (("eager", 3.0), ("compile", 1.9), ("compile-best", 1.9), ("folded", 1.25))
GOAL = 50_000
SLOWER = 0.98  # below this our kernel counts as slower than the bar


def decisions(found: Found) -> list[str]:
    """Return one line for each finding that calls for a decision."""
    return [
        *_wrong_kernels(found),
        *_nan_of_cudnn(found),
        *_unfinished_checks(found),
        *_ceilings_off(found),
        *_cache_speed(found),
        *_slow_layers(found),
        *_next_layer(found),
        *_goals(found),
        *_unfinished_stages(found),
    ]


def _wrong_kernels(found: Found) -> list[str]:
    """A line for each kernel or network that is wrong."""
    by_kernel: dict[str, list[dict]] = {}
    for row in found.bad():
        kernel = kernel_of(row)
        by_kernel.setdefault(kernel, []).append(row)
    lines = []
    for kernel, rows in by_kernel.items():
        first = rows[0]
        where = f" ({first['where']})" if first.get("where") else ""
        lines.append(
            f"mend {kernel} before anything else: {len(rows)} bad, first {first['status']}: {first['case']}: "
            f"{first.get('reason')}{where}"
        )
    return lines


def _nan_of_cudnn(found: Found) -> list[str]:
    """A line if cuDNN's fused ReLU loses NaN."""
    for row in found.checks.get("aten.cudnn_fused", []):
        if row["case"].startswith("nan ") and row["status"] == "wrong":
            return [
                f"cuDNN's fused ReLU does not keep NaN as eager does ({row['reason']}): a bar, out of tables"
            ]
    return []


def _unfinished_checks(found: Found) -> list[str]:
    """A line that names the kernels with checks left out in the dtype that is timed."""
    here = [id for id, row in found.inventory.items() if row["status"] == "here"]
    kernels = dict.fromkeys([*here, *found.checks])
    missing = []
    for kernel in filter(ours, kernels):
        checks = found.checks.get(kernel, [])
        if not complete(of_dtype(checks, DTYPES[0])):
            missing.append(kernel)
    if not missing:
        return []
    names = ", ".join(missing)
    return [f"check again with more time: {names} (stopped before the end)"]


def _measured_ceilings(found: Found) -> dict[str, float]:
    """Return the value of each ceiling that was measured."""
    values = {}
    for row in found.ceilings:
        if row["status"] == "measured":
            values[row["case"]] = row["value"]
    return values


def _ceilings_off(found: Found) -> list[str]:
    """A line for each ceiling that is more than 5 % off the one the roofline uses."""
    measured = _measured_ceilings(found)
    machine = found.one("environment", "machine") or {}
    lines = []
    for name, value in (machine.get("known") or {}).items():
        if name in measured and abs(measured[name] / value - 1) > 0.05:
            lines.append(
                f"roofline.py says {value / 1e12:g} T/s for {name} on this card, it did {measured[name] / 1e12:.3g}: "
                "see the clocks, then correct it"
            )
    return lines


def _cache_speed(found: Found) -> list[str]:
    """A line on what the speed of the cache means for 3×3 convolutions."""
    measured = _measured_ceilings(found)
    if not {"copy", "cache"} <= measured.keys():
        return []
    times = measured["cache"] / measured["copy"]
    verdict = "still hides behind DRAM" if times > 9 else "is bound by it: load halos once"
    return [
        f"the cache moves {times:.1f} × what DRAM does: a 3×3 that loads its input nine times from it {verdict}",
    ]


def _slow_layers(found: Found) -> list[str]:
    """A line on the layers that are slower than the prefolded bar."""
    slow = [row for row in found.layers if (over_bar(row) or 1) < SLOWER]
    if not slow:
        return []
    worst = min(slow, key=over_bar)
    return [
        f"{len(slow)} layers where ours loses to the prefolded bar; worst {worst['layer']} at batch {worst['batch']}: "
        f"{over_bar(worst):.2f}×"
    ]


def _next_layer(found: Found) -> list[str]:
    """A line on the layer with the most to gain."""
    known = [row for row in found.layers if row["floor_us"]]
    if not known:
        return []
    row = max(known, key=total_gap)
    return [
        f"work on {row['layer']} at batch {row['batch']} next: {row['count']} × {gap(row):.0f} µs above "
        f"the floor that {row['bound']} sets"
    ]


def _goals(found: Found) -> list[str]:
    """A line for each inference case of a large batch: whether our best provider meets the project's goals."""
    lines = []
    for case, row in found.networks().items():
        candidates = [r for r in row["rows"] if r["ours"]]
        best = min(candidates, key=itemgetter("seconds"), default=None)
        if best is None or not case.startswith("infer/") or best["batch"] < 64:
            continue
        missed = _missed_goals(best)
        verdict = "meets every goal"
        if missed:
            verdict = "falls short: " + ", ".join(missed)
        lines.append(f"{case}: {best['provider']} {verdict}")
    return lines


def _missed_goals(row: dict) -> list[str]:
    """Name each goal that a provider does not meet."""
    missed = []
    for id, goal in TARGETS:
        over = row["speed_over"].get(id)
        if over is not None and over < goal:
            missed.append(f"{over:.2f}× {id} (goal {goal:g}×)")
    if row["img_s"] < GOAL:
        missed.append(f"{row['img_s']:,.0f} img/s (goal {GOAL:,})")
    return missed


def _unfinished_stages(found: Found) -> list[str]:
    """A line that names the stages to run again."""
    last = {row["job"]: row.get("status") for row in found.of("stages")}
    unfinished = [name for name, status in last.items() if status in ("cut", "left out")]
    if not unfinished:
        return []
    names = ", ".join(unfinished)
    how = "the same command goes on, on a new machine if this run's folder is put into benchmarks/results"
    return [f"not finished: {names}; {how}"]
