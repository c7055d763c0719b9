"""``list``: the architectures and their size."""

from __future__ import annotations

import argparse

import torch


def add_parser(commands) -> None:
    p = commands.add_parser(
        "list",
        help="the architectures",
        description="List the architectures, with parameters and FLOPs at 224².",
    )
    p.add_argument("--names", action="store_true", help="names only, one a line")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..models.family import MODELS, create_model
    from ..models.problems import conv_layers
    from ..roofline.cost import flops
    from ..util.text import table

    if args.names:
        print("\n".join(MODELS))
        return 0
    rows = []
    for name, spec in MODELS.items():
        with torch.device("meta"):
            model = create_model(name)
        parameters = sum(p.numel() for p in model.parameters())
        total = (
            sum(flops(layer.problem) for layer in conv_layers(name, 1))
            + 2 * model.fc.weight.numel()
        )
        blocks = "-".join(map(str, spec.layers))
        rows.append(
            (name, spec.block.__name__, blocks, f"{parameters / 1e6:.1f}", f"{total / 1e9:.2f}")
        )
    print(table(("model", "block", "blocks", "Mparam", "GFLOP"), rows, right=(3, 4)))
    return 0
