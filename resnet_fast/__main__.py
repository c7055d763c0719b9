"""The command line: ``python -m resnet_fast COMMAND``. Each command is a module of its own that adds its parser here."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import NoReturn

# Command modules, in the order in which a user meets them; each has add_parser(subparsers) and imports what is heavy only when it runs.
COMMANDS = (
    "cli.list",
    "cli.info",
    "cli.explain",
    "cli.check",
    "cli.bench",
    "cli.predict",
    "cli.tune",
    "cli.report",
    "cli.new_kernel",
)


class Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence and where the help is, not all options over again."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: {message} (see `{self.prog} --help`)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
        prog="python -m resnet_fast",
        description="ResNets at the speed the machine allows.",
        epilog="`python -m resnet_fast COMMAND --help` tells more of each.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"resnet_fast.{name}").add_parser(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code.

    What the user got wrong, and what the machine refuses (a folder, a full disk), ends in one sentence and code 2, Ctrl-C in 130, a reader of
    the output that has seen enough (``| head``) in 1.
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
    """What stdout still holds goes out if it can; else the interpreter, which tries again at exit, would complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
