"""``report``: the ledger as README tables, plots and a page; as headline JSON; one run against another, as a gate."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

from ..bench.ledger import RESULTS, Run, read_run, read_runs
from ..report import page, tables
from ..report.summary import Change, changes, headlines, slower
from ..util.files import replacing


def add_parser(commands) -> None:
    p = commands.add_parser(
        "report",
        help="tables, plots and comparisons of the measurements",
        description="Turn the ledger of measurements into README's tables (between its markers), "
        "plots and one HTML page; or print headlines; or compare two runs.",
    )
    p.add_argument("ledger", nargs="?", type=Path, default=RESULTS, help="folder or file (default %(default)s)")
    p.add_argument("--headline", action="store_true", help="print the newest result of each case and machine instead")
    p.add_argument("--json", action="store_true", help="with --headline: machine-readable")
    p.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="print run B against run A instead")
    p.add_argument(
        "--fail-if",
        type=gate,
        metavar="slower:5%",
        help="with --compare: exit code 1 if one of ours lost more than that",
    )
    p.add_argument("--readme", type=Path, default=Path("README.md"), help="filled in (default %(default)s)")
    p.add_argument("--out", type=Path, default=Path("benchmarks/report"), help="plots and page (default %(default)s)")
    p.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    p.set_defaults(run=run)


def gate(text: str) -> float:
    """ "slower:5%" → 0.05, as an argparse type."""
    match = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected slower:N%, as in slower:5%")
    return float(match[1]) / 100


def run(args: argparse.Namespace) -> int:
    if args.fail_if is not None and args.compare is None:
        raise ValueError("--fail-if needs --compare A B")
    if args.json and not args.headline:
        raise ValueError("--json needs --headline")
    if args.compare is not None:
        for path in args.compare:
            if not path.is_file():
                raise FileNotFoundError(f"--compare: {path} is not a file; `bench --save FILE` writes one")
        return compare(*map(read_run, args.compare), args.fail_if)
    if not args.ledger.exists():
        raise FileNotFoundError(
            f"no ledger at {args.ledger}: measure with `python -m resnet_fast bench --save` or `pytest benchmarks/ --ledger`"
        )
    runs = read_runs(args.ledger)
    if args.headline:
        return headline(runs, args.json)
    return write(runs, args)


def headline(runs: list[Run], as_json: bool) -> int:
    """The newest result of each case and machine."""
    found = headlines(runs)
    if as_json:
        json.dump({"rows": [asdict(h) for h in found]}, sys.stdout, indent=1, ensure_ascii=False)
        print()
        return 0
    from ..util.text import table

    header = ("case", "machine", "img/s", "× eager", "× compile", "× folded", "roofline", "error", "eager's", "date")
    print(
        table(
            header,
            [
                (
                    h.case,
                    h.gpu,
                    tables.rate(h.img_s),
                    *map(_ratio, (h.vs_eager, h.vs_compile, h.vs_cudnn)),
                    _share(h.roofline),
                    _error(h.error),
                    _error(h.eager_error),
                    h.date[:10],
                )
                for h in found
            ],
            right=range(2, 9),
        )
    )
    return 0


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def compare(before: Run, after: Run, tolerance: float | None) -> int:
    """Run B against run A, worst first; 1 if the gate is given and one of ours fell through it."""
    from ..util.text import table

    found = changes(before, after)

    def line(c: Change) -> tuple[str, ...]:
        basis = "against eager" if c.relative else "time"
        return c.case, c.provider, _ms(c.before), _ms(c.after), f"{c.speed - 1:+.1%}", basis

    print(f"A: {before.path}: {tables.machine_line(before)}\nB: {after.path}: {tables.machine_line(after)}\n")
    print(table(("case", "provider", "A ms", "B ms", "B's speed", "compared by"), map(line, found), right=(2, 3, 4)))
    if before.machine.name != after.machine.name:
        print("\nTwo different processors: only what is compared against eager means anything.")
    lacking = sorted(
        {f"{row.case} {row.provider}" for row in before.rows if row.ours}
        - {f"{row.case} {row.provider}" for row in after.rows}
    )
    if lacking:
        print(f"\nIn A only: {', '.join(lacking)}.")
    if tolerance is None:
        return 0
    lost = slower(found, tolerance)
    if not lost:
        print(f"\nNone of ours is slower by more than {tolerance:.1%}, by its ratio to eager.")
    for c in lost:
        print(f"SLOWER by more than {tolerance:.1%}: {c.case} {c.provider}: {c.speed - 1:+.1%}")
    return 1 if lost else 0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def write(runs: list[Run], args: argparse.Namespace) -> int:
    """Plots, page, README."""
    pictures = []
    if not args.no_plots:
        from ..report import figures, plots

        pictures = figures.plots(runs)
        files = plots.save(pictures, args.out)
        print(f"{len(files)} plots in {args.out}")
    args.out.mkdir(parents=True, exist_ok=True)
    index = args.out / "index.html"
    with replacing(index) as part:
        part.write_text(page.page(runs, pictures, args.out), encoding="utf-8")
    print(f"page: {index}")
    if args.readme.is_file():
        folder = Path(os.path.relpath(args.out, args.readme.parent)).as_posix()
        text = args.readme.read_text(encoding="utf-8")
        filled = page.fill(text, page.sections(runs, pictures, folder))
        if filled != text:
            with replacing(args.readme) as part:  # half of somebody's README would be worse than none of our tables
                part.write_text(filled, encoding="utf-8")
        print(f"tables: {args.readme}{'' if filled != text else ' (unchanged)'}")
    else:
        print(f"tables: not written, {args.readme} is not there")
    return 0
