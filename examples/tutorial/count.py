"""Cost of each step of the tutorial, without a clock: bytes in Triton's interpreter, machine code for an H200.

``python examples/tutorial/count.py`` prints the two tables of the page, ``--write`` puts them there. It takes half a
minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from resnet_fast.analysis.launches import MATRIX, dominant
from resnet_fast.bench import fresh_process
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import load_file
from resnet_fast.roofline.cost import problem_step
from resnet_fast.roofline.occupancy import occupancy
from resnet_fast.testing.samples import make_args

HERE = Path(__file__).parent
STEPS = sorted(HERE.glob("step*.py"))
PAGE = HERE / "README.md"
# layer3.1.conv3 of ResNet-50 at batch 256. Bytes are counted on two images of 8², 128 pixels, which all tiles of all
# steps divide.
PROBLEM = Problem(
    "conv_bn_act",
    "cuda",
    torch.bfloat16,
    (256, 256, 14, 14),
    "nhwc",
    weight=(1024, 256, 1, 1),
    residual="nhwc",
    bn=True,
    act="relu",
    capability=(9, 0),
)
SMALL = replace(PROBLEM, x=(2, 256, 8, 8))


@dataclass(frozen=True)
class Moved:
    """Bytes for 128 pixels: loaded and stored by the step's own blocks, moved by torch's ops around it."""

    loaded: int
    stored: int
    torch: int


@dataclass(frozen=True)
class Code:
    """Launches (and how many are torch's), and facts of the step's own kernel.

    Those are its matrix and all instructions, registers a thread, KiB of shared memory and occupancy of an SM.
    """

    launches: int
    torchs: int
    matrix: int
    instructions: int
    registers: int
    shared: int
    occupancy: float


def loaded_and_stored() -> dict[str, tuple[int, int]]:
    """In a process that interprets: bytes that all blocks of each step together load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    loaded = stored = 0

    def moved(pointers, mask) -> int:
        return int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self, pointers, mask, *rest):
        nonlocal loaded
        loaded += moved(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        nonlocal stored
        stored += moved(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = (
        counted_load,
        counted_store,
    )
    found = {}
    for step in STEPS:
        (kernel,) = load_file(step)
        loaded = stored = 0
        kernel.fn(*make_args(replace(SMALL, device="cpu", capability=None)))
        found[step.stem] = loaded, stored
    return found


def compiled() -> dict[str, tuple[int, Code]]:
    """In a process that compiles: bytes that torch's ops move for the small problem, machine code for the batch."""
    from resnet_fast.analysis.aot import compile_call

    found = {}
    for step in STEPS:
        (kernel,) = load_file(step)
        call = compile_call(kernel, PROBLEM)
        one = dominant(call.launches)
        torchs = call.torch_ops.total()
        share = occupancy(one.registers, one.shared, one.threads, PROBLEM.capability).share
        code = Code(
            len(call.launches) + torchs,
            torchs,
            one.count(MATRIX),
            one.instructions.total(),
            one.registers,
            one.shared // 1024,
            share,
        )
        found[step.stem] = compile_call(kernel, SMALL).torch_bytes, code
    return found


def moved_table(rows: dict[str, Moved]) -> str:
    """Markdown table of the bytes of each step."""
    lines = [
        "| step | its blocks load | store | torch's ops move | together |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        together = row.loaded + row.stored + row.torch
        columns = [_mega(row.loaded), _mega(row.stored), _mega(row.torch), _mega(together)]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    floor = _mega(problem_step(SMALL).bytes)
    return "\n".join([*lines, f"| *floor: each operand once* | | | | {floor} |"])


def code_table(rows: dict[str, Code]) -> str:
    """Markdown table of the machine code of each step."""
    lines = [
        "| step | launches | of torch's | matrix instructions | instructions | registers | shared | occupancy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        counts = row.launches, row.torchs, row.matrix, row.instructions, row.registers
        columns = [*map(str, counts), f"{row.shared} KiB", f"{row.occupancy:.0%}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _mega(n: int) -> str:
    return f"{n / 1e6:.2f} MB"


def tables() -> dict[str, str]:
    """Marker → table, counted now."""
    code, moved = fresh_process.call(False, compiled), fresh_process.call(True, loaded_and_stored)
    moved_rows = {name: Moved(*pair, code[name][0]) for name, pair in moved.items()}
    code_rows = {name: row for name, (_, row) in code.items()}
    return {"moved": moved_table(moved_rows), "code": code_table(code_rows)}


def section(page: str, name: str) -> str:
    """The text between the page's markers of that name."""
    return page.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="put the tables into README.md beside this file"
    )
    write = parser.parse_args().write
    page = PAGE.read_text(encoding="utf-8")
    for name, found in tables().items():
        print(f"{found}\n")
        begin = f"<!-- {name}:begin -->\n"
        page = page.replace(begin + section(page, name), begin + found)
    if write:
        PAGE.write_text(page, encoding="utf-8")
