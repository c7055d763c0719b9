"""``report``: the ledger as README tables, plots and a page; as headlines; one run compared with another, as a gate."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..bench.ledger import RESULTS, Row, Run, read_run, read_runs
from ..report import page, tables
from ..report.summary import Change, Headline, changes, headlines, slower
from ..util.files import replacing


def add_parser(commands) -> None:
    """Add the command and its options."""
    p = commands.add_parser(
        "report",
        help="tables, plots and comparisons of the measurements",
        description="Turn the ledger of measurements into README's tables (between its markers), "
        "plots and one HTML page; or print headlines; or compare two runs.",
    )
    p.add_argument(
        "ledger", nargs="?", type=Path, default=RESULTS, help="folder or file (default %(default)s)"
    )
    p.add_argument(
        "--headline",
        action="store_true",
        help="print the newest result of each case and machine instead",
    )
    p.add_argument("--json", action="store_true", help="with --headline: machine-readable")
    p.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="print run B against run A instead",
    )
    p.add_argument(
        "--fail-if",
        type=gate,
        metavar="slower:5%",
        help="with --compare: exit code 1 if one of ours lost more than that",
    )
    p.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="filled in (default %(default)s)"
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/report"),
        help="plots and page (default %(default)s)",
    )
    p.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    p.set_defaults(run=run)


def gate(text: str) -> float:
    """Convert "slower:5%" to 0.05; an argparse type."""
    match = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected slower:N%, as in slower:5%")
    return float(match[1]) / 100


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if args.fail_if is not None and args.compare is None:
        raise ValueError("--fail-if needs --compare A B")
    if args.json and not args.headline:
        raise ValueError("--json needs --headline")
    if args.compare is not None:
        for path in args.compare:
            if not path.is_file():
                raise FileNotFoundError(
                    f"--compare: {path} is not a file; `bench --save FILE` writes one"
                )
        before, after = map(read_run, args.compare)
        return compare(before, after, args.fail_if)
    if not args.ledger.exists():
        raise FileNotFoundError(
            f"no ledger at {args.ledger}: "
            "measure with `python -m resnet_fast bench --save` or `pytest benchmarks/ --ledger`"
        )
    runs = read_runs(args.ledger)
    if args.headline:
        return headline(runs, args.json)
    return write(runs, args)


# ---------------------------------------------------------------- headlines


def headline(runs: list[Run], as_json: bool) -> int:
    """Print the newest result of each case and machine; return the exit code."""
    found = headlines(runs)
    if as_json:
        rows = [asdict(headline) for headline in found]
        json.dump({"rows": rows}, sys.stdout, indent=1, ensure_ascii=False)
        print()
        return 0
    from ..util.text import table

    header = (
        "case",
        "machine",
        "img/s",
        "× eager",
        "× compile",
        "× folded",
        "roofline",
        "error",
        "eager's",
        "date",
    )
    print(table(header, map(_headline_cells, found), right=range(2, 9)))
    return 0


def _headline_cells(headline: Headline) -> tuple[str, ...]:
    return (
        headline.case,
        headline.gpu,
        tables.rate(headline.img_s),
        _formatted(headline.vs_eager, ".2f"),
        _formatted(headline.vs_compile, ".2f"),
        _formatted(headline.vs_cudnn, ".2f"),
        _formatted(headline.roofline, ".0%"),
        _formatted(headline.error, ".1e"),
        _formatted(headline.eager_error, ".1e"),
        headline.date[:10],
    )


def _formatted(value: float | None, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form)


# ---------------------------------------------------------------- one run compared with another


def compare(before: Run, after: Run, tolerance: float | None) -> int:
    """Print run B compared with run A, worst first; return 1 if one of ours lost more than the tolerance."""
    from ..util.text import table

    found = changes(before, after)
    header = ("case", "provider", "A ms", "B ms", "B's speed", "compared by")
    print(
        f"A: {before.path}: {tables.machine_line(before)}\nB: {after.path}: {tables.machine_line(after)}\n"
    )
    print(table(header, map(_change_cells, found), right=(2, 3, 4)))
    if before.machine.name != after.machine.name:
        print("\nTwo different processors: only what is compared against eager means anything.")
    ours_before = [row for row in before.rows if row.ours]
    lacking = _names(ours_before) - _names(after.rows)
    if lacking:
        print(f"\nIn A only: {', '.join(sorted(lacking))}.")
    if tolerance is None:
        return 0
    return _judge(found, tolerance)


def _change_cells(change: Change) -> tuple[str, ...]:
    return (
        change.case,
        change.provider,
        f"{change.before * 1e3:.3f}",
        f"{change.after * 1e3:.3f}",
        f"{change.speed - 1:+.1%}",
        "against eager" if change.relative else "time",
    )


def _names(rows: Iterable[Row]) -> set[str]:
    return {f"{row.case} {row.provider}" for row in rows}


def _judge(found: list[Change], tolerance: float) -> int:
    """Print the rows of ours that lost more than the tolerance; return 1 if there are any."""
    lost = slower(found, tolerance)
    if not lost:
        print(f"\nNone of ours is slower by more than {tolerance:.1%}, by its ratio to eager.")
        return 0
    for change in lost:
        name = f"{change.case} {change.provider}"
        print(f"SLOWER by more than {tolerance:.1%}: {name}: {change.speed - 1:+.1%}")
    return 1


# ---------------------------------------------------------------- README, page and plots


def write(runs: list[Run], args: argparse.Namespace) -> int:
    """Write plots, page and README; return the exit code."""
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
        _fill_readme(args.readme, runs, pictures, args.out)
    else:
        print(f"tables: not written, {args.readme} is not there")
    return 0


def _fill_readme(readme: Path, runs: list[Run], pictures: list, out: Path) -> None:
    folder = Path(os.path.relpath(out, readme.parent)).as_posix()
    text = readme.read_text(encoding="utf-8")
    filled = page.fill(text, page.sections(runs, pictures, folder))
    if filled == text:
        print(f"tables: {readme} (unchanged)")
        return
    # atomically: a README that is half written would be worse than an old one
    with replacing(readme) as part:
        part.write_text(filled, encoding="utf-8")
    print(f"tables: {readme}")
