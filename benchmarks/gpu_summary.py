"""What a run on a GPU says: which kernels are proved, a short table, the next decisions, the file for the ledger."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

DTYPES = ("bfloat16", "float16", "float32")
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
BAD = ("wrong", "failed", "hung", "died")
BARS = ("eager", "folded")
# Targets of the project at ResNet-50, bf16, batch 256: what to be faster than, by how much, and images a second.
TARGETS = (("eager", 3.0), ("compile", 1.9), ("compile-best", 1.9), ("folded", 1.25))
GOAL = 50_000


def dtype_of(case: str) -> str | None:
    """The dtype that a case's name mentions."""
    return next((part for part in case.split() if part in DTYPES), None)


def ours(kernel: str) -> bool:
    return not kernel.startswith("aten")


@dataclass
class Found:
    """The rows of a run, by what they are about."""

    rows: list[dict]
    checks: dict[str, list[dict]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.of("check"):
            self.checks.setdefault(kernel_of(row), []).append(row)

    def of(self, stage: str) -> list[dict]:
        return [row for row in self.rows if row["stage"] == stage]

    def one(self, stage: str, case: str) -> dict | None:
        return next((row for row in self.of(stage) if row["case"] == case), None)

    @property
    def inventory(self) -> dict[str, dict]:
        """Kernel → what was last said of it: a build may have come in between."""
        return {row["case"]: row for row in self.of("inventory")}

    @property
    def machine(self) -> dict:
        return self.one("environment", "machine")["machine"]

    @property
    def ceilings(self) -> list[dict]:
        return [row for row in self.of("environment") if row["case"] != "machine"]

    def proved(self, dtype: str) -> list[str]:
        """Kernels of which nothing was left out in this dtype, and nothing found wrong."""

        def clean(rows: list[dict]) -> bool:
            status = Counter(row["status"] for row in rows)
            return status["right"] > 0 and status["right"] + status["complete"] == len(rows) and complete(rows)

        return [
            kernel
            for kernel, rows in self.checks.items()
            if clean([row for row in rows if dtype_of(row["case"]) == dtype])
        ]

    def bad(self) -> list[dict]:
        """Every row that says that a kernel of ours is wrong, failed, hung or died, or that a network of ours is wrong."""
        kernels = [
            row
            for stage in ("check", "large", "sanitizer")
            for row in self.of(stage)
            if row["status"] in BAD and ours(kernel_of(row))
        ]
        return kernels + [
            {"stage": "networks", "job": id, "case": case, "status": "wrong", "reason": why}
            for case, row in self.networks().items()
            for id, why in row["wrong"].items()
        ]

    def networks(self) -> dict[str, dict]:
        """Case → its row; the later stage, which has more providers, stands for both if it was completed."""
        return {
            row["case"]: row
            for stage in ("headline", "peers", "train")
            for row in self.of(stage)
            if row["status"] == "measured" and row["rows"]
        }


def kernel_of(row: dict) -> str:
    """The kernel a row of check, large or sanitizer is about."""
    return (row["case"] if row["stage"] == "large" else row["job"]).split()[0]


def complete(rows: list[dict]) -> bool:
    """Whether every share of the cases was gone through to its end."""
    ends = [row for row in rows if row["status"] == "complete"]
    return bool(ends) and len(ends) == ends[0]["shares"]


# ---------------------------------------------------------------- the table


def summary(found: Found) -> str:
    """The run in a screenful: machine, ceilings, kernels, worst layers, networks, what to decide next."""
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
    machine, facts = found.machine, found.machine["facts"]
    return (
        f"{machine['name']}, driver {facts.get('driver', '?')}, torch {facts.get('torch', '?')}, triton "
        f"{facts.get('triton', '?')}, commit {machine['commit']}, {machine['date']}"
    )


def _ceilings(found: Found) -> str:
    def value(row: dict) -> str:
        if row["status"] != "measured":
            return f"{row['case']} {row['status']}"
        amount, unit = (row["value"] * 1e6, "µs") if row["unit"] == "s" else (row["value"] / 1e12, "T" + row["unit"])
        return f"{row['case']} {amount:.3g} {unit}"

    return "CEILINGS  " + ", ".join(map(value, found.ceilings)) if found.ceilings else ""


def _kernels(found: Found) -> str:
    lines = []
    for kernel, rows in found.checks.items():
        judged = [row for row in rows if row["status"] not in ("complete", "left out")]
        bad = [row for row in judged if row["status"] in BAD]
        proved = [SHORT[d] for d in DTYPES if kernel in found.proved(d)]
        first = f"; {bad[0]['status']}: {bad[0]['case']}: {bad[0].get('reason')}" if bad else ""
        state = f"proved in {' '.join(proved)}" if proved else "not proved"
        lines.append(f"{kernel:28} {len(judged):5} checks {len(bad):4} bad  {state}{first}"[:200])
    absent = [f"{id} ({row['reason']})" for id, row in found.inventory.items() if row["status"] == "absent"]
    lines += [f"cannot run here: {line}"[:200] for line in absent]
    return "KERNELS\n" + "\n".join(lines) if lines else ""


def fastest(times: dict[str, dict], ids: Iterable[str]) -> str | None:
    """The fastest of the named variants that have a time."""
    return min((id for id in ids if id in times), key=lambda id: times[id]["us"], default=None)


def _layers(found: Found) -> str:
    rows = [row for row in found.of("layers") if row["status"] == "measured" and row["times"]]
    if not rows:
        return ""
    lines = [f"{'layer':22} {'batch':>5} {'n':>3} {'best of ours':28} {'µs':>8} {'floor':>8} {'%':>4}  over bar, eager"]
    for row in sorted(rows, key=lambda row: -row["count"] * _gap(row))[:10]:
        lines.append(_layer_line(row))
    ratios = [r for r in map(over_bar, rows) if r]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(
            f"ours over the prefolded cuDNN bar: geometric mean {mean:.2f} over {len(ratios)} layers, "
            f"{sum(r < 0.98 for r in ratios)} slower by more than 2 %"
        )
    return "LAYERS (device time in a graph, rotating buffers; the ten with the most to gain)\n" + "\n".join(lines)


def _layer_line(row: dict) -> str:
    times = row["times"]
    best = fastest(times, filter(mine, times)) or fastest(times, times)
    us, floor = times[best]["us"], row["floor_us"]
    share = f"{floor:8.1f} {100 * floor / us:4.0f}" if floor else f"{'?':>8} {'?':>4}"
    over = ", ".join(f"{ratio:.2f}" if ratio else "-" for ratio in map(times[best]["over"].get, BARS[::-1]))
    return f"{row['layer']:22} {row['batch']:5} {row['count']:3} {best:28} {us:8.1f} {share}  {over}"


def mine(id: str) -> bool:
    """Whether a timed variant is a kernel of ours."""
    return id not in BARS and ours(id)


def over_bar(row: dict) -> float | None:
    """How many times faster our best kernel is than the prefolded bar on a layer."""
    best = fastest(row["times"], filter(mine, row["times"]))
    return None if best is None else row["times"][best]["over"].get("folded")


def _gap(row: dict) -> float:
    """Microseconds between the fastest variant and the floor."""
    best = fastest(row["times"], row["times"])
    return row["times"][best]["us"] - (row["floor_us"] or 0)


def _networks(found: Found) -> str:
    lines = []
    for case, row in found.networks().items():
        lines.append(case)
        for r in sorted(row["rows"], key=lambda r: r["seconds"]):
            over = r["speed_over"].get("eager")
            share = f"{100 * r['roofline']:.0f} %" if r["roofline"] else "-"
            ratio = f"{over:.2f}×" if over else "1×"
            memory = f"{r['peak_bytes'] / 2**20:,.0f} MiB" if r["peak_bytes"] else "-"
            lines.append(
                f"  {r['provider']:18} {r['img_s']:10,.0f} img/s {r['seconds'] * 1e3:9.3f} ms {ratio:>7} eager"
                f"{share:>6} of floor  error {_small(r['error'])} (eager {_small(r['eager_error'])}) {memory}"
            )
        lines += [f"  {id:18} skipped: {why}"[:160] for id, why in row.get("skipped", {}).items()]
        lines += [f"  {id:18} WRONG: {why}"[:160] for id, why in row.get("wrong", {}).items()]
    return "NETWORKS\n" + "\n".join(lines) if lines else ""


def _small(value: float | None) -> str:
    """A peer's answer may be NaN, which a row has as None."""
    return "NaN" if value is None else f"{value:.1e}"


def _untried(notes: list[str]) -> str:
    count = sum("the time was up" in note for note in notes)
    return f" ({count} not tried by themselves: the time was up)" if count else ""


def _groups(found: Found) -> str:
    """Which groups of layers the tuned plans use."""
    lines = [
        f"  {row['case']}: {', '.join(row['across']) or 'none'}" + _untried(row["notes"])
        if row["status"] == "tuned"
        else f"  {row['case']}: {row['status']}: {row.get('reason')}"
        for row in {row["case"]: row for row in found.of("groups")}.values()
    ]
    return "GROUPS of layers that the tuned plan (ours-plan) runs as one\n" + "\n".join(lines) if lines else ""


def _stages(found: Found) -> str:
    def told(row: dict) -> str:
        return f"{row['job']} {row['seconds']:.0f} s" + (f" ({row['reason']})" if row["reason"] else "")

    return "STAGES  " + "; ".join(map(told, found.of("stages")))


# ---------------------------------------------------------------- what to do next


def decisions(found: Found) -> list[str]:
    """One line for each finding that calls for one."""
    return [
        *_about_kernels(found),
        *_about_ceilings(found),
        *_about_layers(found),
        *_about_networks(found),
        *_about_stages(found),
    ]


def _about_kernels(found: Found) -> list[str]:
    lines, seen = [], {}
    here = dict.fromkeys([*(id for id, row in found.inventory.items() if row["status"] == "here"), *found.checks])
    for row in found.bad():
        seen.setdefault(kernel_of(row), []).append(row)
    for kernel, rows in seen.items():
        first = rows[0]
        where = f" ({first['where']})" if first.get("where") else ""
        lines.append(
            f"mend {kernel} before anything else: {len(rows)} bad, first {first['status']}: {first['case']}: "
            f"{first.get('reason')}{where}"
        )
    for row in found.checks.get("aten.cudnn_fused", []):
        if row["case"].startswith("nan ") and row["status"] == "wrong":
            lines.append(f"cuDNN's fused ReLU does not keep NaN as eager does ({row['reason']}): a bar, out of tables")
            break
    missing = [
        kernel
        for kernel in here
        if ours(kernel)
        and not complete([row for row in found.checks.get(kernel, []) if dtype_of(row["case"]) == DTYPES[0]])
    ]
    if missing:
        lines.append(f"check again with more time: {', '.join(missing)} (stopped before the end)")
    return lines


def _about_ceilings(found: Found) -> list[str]:
    lines = []
    values = {row["case"]: row["value"] for row in found.ceilings if row["status"] == "measured"}
    known = (found.one("environment", "machine") or {}).get("known") or {}
    for name, value in known.items():
        if name in values and abs(values[name] / value - 1) > 0.05:
            lines.append(
                f"roofline.py says {value / 1e12:g} T/s for {name} on this card, it did {values[name] / 1e12:.3g}: "
                "see the clocks, then correct it"
            )
    if {"copy", "cache"} <= values.keys():
        times = values["cache"] / values["copy"]
        lines.append(
            f"the cache moves {times:.1f} × what DRAM does: a 3×3 that loads its input nine times from it "
            + ("still hides behind DRAM" if times > 9 else "is bound by it: load halos once")
        )
    return lines


def _about_layers(found: Found) -> list[str]:
    rows = [row for row in found.of("layers") if row["status"] == "measured" and row["times"]]
    slow = [row for row in rows if (over_bar(row) or 1) < 0.98]
    lines = [
        f"{len(slow)} layers where ours loses to the prefolded bar; worst {w['layer']} at batch {w['batch']}: "
        f"{over_bar(w):.2f}×"
        for w in sorted(slow, key=over_bar)[:1]
    ]
    known = [row for row in rows if row["floor_us"]]
    for row in sorted(known, key=lambda row: -row["count"] * _gap(row))[:1]:
        lines.append(
            f"work on {row['layer']} at batch {row['batch']} next: {row['count']} × {_gap(row):.0f} µs above "
            f"the floor that {row['bound']} sets"
        )
    return lines


def _about_networks(found: Found) -> list[str]:
    lines = []
    for case, row in found.networks().items():
        best = min((r for r in row["rows"] if r["ours"]), key=lambda r: r["seconds"], default=None)
        if best is None or not case.startswith("infer/") or best["batch"] < 64:
            continue
        short = [
            f"{best['speed_over'][id]:.2f}× {id} (goal {goal:g}×)"
            for id, goal in TARGETS
            if id in best["speed_over"] and best["speed_over"][id] < goal
        ]
        short += [f"{best['img_s']:,.0f} img/s (goal {GOAL:,})"] if best["img_s"] < GOAL else []
        verdict = f"falls short: {', '.join(short)}" if short else "meets every goal"
        lines.append(f"{case}: {best['provider']} {verdict}")
    return lines


def _about_stages(found: Found) -> list[str]:
    last = {row["job"]: row.get("status") for row in found.of("stages")}
    left = [name for name, status in last.items() if status in ("cut", "left out")]
    how = "the same command goes on, on a new machine if this run's folder is put into benchmarks/results"
    return [f"not finished: {', '.join(left)}; {how}"] if left else []


# ---------------------------------------------------------------- files


def write(found: Found, folder: Path, results: Path) -> list[Path]:
    """summary.json beside the rows, and the run in the ledger's own format if anything was timed."""
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
    rows = [r for row in found.networks().values() for r in row["rows"]] + list(layer_rows(found))
    return [path, _write_ledger(rows, found.machine, results)] if rows else [path]


def _write_ledger(rows: list[dict], machine: dict, results: Path) -> Path:
    from resnet_fast.bench.ledger import Machine, Row, write_run

    stamp = "".join(c for c in machine["date"][:19] if c.isdigit())
    name = "".join(c if c.isalnum() else "-" for c in machine["name"].lower())
    return write_run(
        [Row(**row) for row in rows],
        Machine(**machine),
        results / f"{stamp}-{name}-{machine['commit'].rstrip('+')}.json",
    )


def layer_rows(found: Found) -> Iterable[dict]:
    """Each timed variant of each layer as a row of the ledger, with the error that its check found."""
    errors = {
        (kernel, row["case"].split(" ", 1)[-1]): row
        for kernel, rows in found.checks.items()
        for row in rows
        if row["case"].startswith(("full ", "small "))
    }
    for row in found.of("layers"):
        if row["status"] != "measured":
            continue
        key = row["case"]
        for id, time in row["times"].items():
            checked = errors.get((id, key), {})
            s = time["us"] / 1e6
            yield {
                "level": "op",
                "case": f"op/{key}",
                "provider": id,
                "ours": mine(id),
                "dtype": SHORT[dtype_of(key)],
                "batch": row["batch"],
                "size": None,
                "layout": "nhwc",
                "seconds": s,
                "low": time["low"] / 1e6,
                "high": time["high"] / 1e6,
                "rounds": time["rounds"],
                "problem": key,
                "tflops": row["flops"] / s / 1e12,
                "gb_s": row["bytes"] / s / 1e9,
                "roofline": row["floor_us"] and row["floor_us"] / time["us"],
                "error": checked.get("error"),
                "eager_error": checked.get("eager_error"),
                "speed_over": time["over"],
            }
