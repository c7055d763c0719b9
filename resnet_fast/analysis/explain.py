"""``explain``: which kernel runs each layer, why, and why a layer runs as plain modules."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dispatch import record
from ..live.eligibility import why_plain
from ..models.blocks import BasicBlock, Bottleneck, why_plain_block

if TYPE_CHECKING:
    from ..runtime.explanation import Explanation, Line


def explain(model: nn.Module, example: Tensor) -> Explanation:
    """Run one forward of a copy of ``model`` on ``example`` and say what ran each convolution and batch norm, and why.

    The copy keeps the model's statistics as they are; its hooks run once. Accepts a plan too, which knows its steps.
    """
    from ..runtime.explanation import Explanation, Line, timed

    explain_plan = getattr(model, "explain", None)
    if explain_plan is not None:
        return explain_plan(example)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"explain: model: got {type(model).__name__}, expected an nn.Module or a plan"
        )
    twin = copy.deepcopy(model)
    owners = {
        id(p): name.rpartition(".")[0] for name, p in twin.named_parameters(remove_duplicate=False)
    }
    with record() as choices, torch.no_grad():
        twin(example)
    lines = []
    for choice in choices:
        module = owners.get(choice.tensor, "(add)")
        line = Line(module, choice.problem.op, choice.kernel, choice.why, choice.problem)
        lines.append(timed(line))
    fused = {line.module for line in lines}
    return Explanation(lines + _plain_lines(twin, example, fused))


def _plain_lines(model: nn.Module, example: Tensor, fused: set[str]) -> list[Line]:
    """The blocks and single convolutions that no op ran, with the reason."""
    from ..runtime.explanation import Line

    lines: list[Line] = []
    blocks: list[str] = []  # prefixes of the modules inside a block
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in blocks):
            continue
        if isinstance(module, (BasicBlock, Bottleneck)):
            blocks.append(f"{name}.")
            reason = why_plain_block(module, example)
            overridden = type(module).forward not in (BasicBlock.forward, Bottleneck.forward)
            if reason is not None or overridden:
                lines.append(
                    Line(name, "plain", "torch modules", reason or "a subclass overrides forward")
                )
        elif (
            isinstance(module, nn.Conv2d) and name not in fused and not _norm_is_fused(name, fused)
        ):
            reason = why_plain(example, [module]) or "not part of a fused block"
            lines.append(Line(name, "plain", "torch module", reason))
    return lines


def _norm_is_fused(name: str, fused: set[str]) -> bool:
    """Whether the convolution's batch norm ran fused: in training the convolution itself is torch's."""
    return name.replace("conv", "bn") in fused
