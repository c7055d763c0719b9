"""``new-kernel``: a working kernel to start from, in Triton or CUDA, ready for ``check`` and ``bench``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

TEMPLATES = Path(__file__).parents[1] / "kernels" / "templates"


def add_parser(commands) -> None:
    p = commands.add_parser(
        "new-kernel",
        help="write a working kernel to start from",
        description="Write a small, right 1×1 convolution kernel under your name; then check, bench and improve it.",
    )
    p.add_argument("name", help="a Python identifier; the kernel will be experimental.NAME")
    kind = p.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--triton", dest="kind", action="store_const", const="triton", help="one .py file"
    )
    kind.add_argument(
        "--cuda", dest="kind", action="store_const", const="cuda", help="one .cu file"
    )
    p.add_argument("--folder", type=Path, default=Path("."), help="where to write (default: here)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", args.name):
        raise ValueError(
            f"name: got {args.name!r}, expected lower-case letters, digits and underscores, such as fast_pointwise"
        )
    file = write(args.name, args.kind, args.folder)
    interpret, without = (
        ("TRITON_INTERPRET=1 ", "    (without a GPU)") if args.kind == "triton" else ("", "")
    )
    print(
        f"wrote {file}\n\nnext:\n  {interpret}python -m resnet_fast check --kernel {file}{without}\n"
        f"  python -m resnet_fast bench --kernel {file}"
    )
    return 0


def write(name: str, kind: str, folder: Path) -> Path:
    """Write the template under ``name`` and return its file; raises FileExistsError if there is one."""
    (source,) = TEMPLATES.glob(f"{kind}_kernel.*")
    target = folder / f"{name}{source.suffix}"
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another name or --folder")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(source.read_text().replace("my_kernel", name))
    return target
