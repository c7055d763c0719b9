"""The command line: ``python -m resnet_fast COMMAND``. Each command is a file of ``cli`` that adds its parser."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

# The files of cli, in the order of the help; each has add_parser(subparsers) and imports heavy modules only to run.
COMMANDS = ("list", "info", "explain", "check", "bench", "predict", "tune", "report", "new_kernel")


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one sentence, with where the help is, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(
            2, f"{self.prog.removeprefix('python -m ')}: {message} (see `{self.prog} --help`)\n"
        )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = Parser(
        prog="python -m resnet_fast",
        description="Faster ResNets for PyTorch: a drop-in for torchvision with fused Triton, CUDA and CPU kernels.",
        epilog="`python -m resnet_fast COMMAND --help` tells more of each.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"resnet_fast.cli.{name}").add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code.

    A user's mistake, and an error of the system (a folder, a full disk), ends in one sentence and code 2, Ctrl-C in
    130, a closed output (``| head``) in 1.
    """
    from .dispatch.registry import NotUsed

    command = "resnet_fast"
    try:
        args = parser().parse_args(argv)
        args.words, command = sys.argv[1:] if argv is None else argv, args.command
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    except (ValueError, LookupError, OSError, ImportError, NotUsed) as error:
        print(f"{command}: {error}", file=sys.stderr)
        code = 2
    _flush_or_drop()
    return code


def _flush_or_drop() -> None:
    """Flush stdout, or drop what it holds: the interpreter tries again at exit and would report an error."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
