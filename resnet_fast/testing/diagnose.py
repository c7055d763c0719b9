"""Diagnosis of a wrong kernel: which elements of its output are wrong, and which usual mistake makes such a pattern."""

from __future__ import annotations

from torch import Tensor

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from . import check, rule, samples


def diagnose(kernel: Kernel, problem: Problem, seed: int = 0) -> str:
    """Run the kernel once more in poisoned memory and say which elements are wrong and what that points to."""
    args = _with_visible_scales(problem, samples.make_args(problem, seed))
    outputs = check.run_poisoned(kernel, problem, args)
    oracle = check.oracle(problem.op, args)
    found = []
    for got, exact in zip(outputs, oracle, strict=True):
        if exact.numel():
            found.append(locate(got.cpu(), exact, problem))
    wrong = [f"output {i}: {text}" for i, text in enumerate(found) if text]
    return "; ".join(wrong) or "right this time: the error moves, so suspect a race"


def _with_visible_scales(problem: Problem, args: tuple) -> tuple:
    """The arguments with no zero or tiny scale, which would hide a wrong channel."""
    if problem.op != "conv_bn_act":
        return args
    x, weight, scale, *rest = args
    return x, weight, scale.abs() + 0.5, *rest


def locate(got: Tensor, exact: Tensor, problem: Problem) -> str | None:
    """One sentence about the wrong elements of one output, or None if there are none.

    An element is wrong if it is NaN where the oracle is not, or off by more than sixteen roundings of the largest
    value.
    """
    if got.shape != exact.shape:
        return f"its shape is {list(got.shape)}, expected {list(exact.shape)}"
    values = got.double()
    tolerance = 16 * rule.FLOOR[got.dtype] * exact[exact.isfinite()].abs().max()
    off = (values - exact).abs() > tolerance
    unwritten = values.isnan() & ~exact.isnan()
    wrong = off | unwritten
    if not wrong.any():
        return None
    count = f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
    if unwritten.any():
        share = "all" if bool((wrong == unwritten).all()) else str(int(unwritten.sum()))
        count += f", {share} of them NaN (memory was poisoned: never written, or read where nobody wrote)"
    return f"{count}: {_pattern(wrong, values, exact, problem)}"


def _pattern(wrong: Tensor, got: Tensor, exact: Tensor, problem: Problem) -> str:
    """What the places of the wrong elements have in common and point to."""
    if wrong.dim() == 4:
        return _pattern_images(wrong, got, exact, problem)
    channels = wrong.any(0) if wrong.dim() == 2 else wrong
    return f"channels {_ranges(channels.flatten())}: a reduction's partials or its divisor"


def _pattern_images(wrong: Tensor, got: Tensor, exact: Tensor, problem: Problem) -> str:
    """The usual mistake that fits the wrong channels and pixels of images."""
    channels = wrong.any(0).flatten(1).any(1)
    pixels = wrong.any(1).flatten()
    where = f"channels {_ranges(channels)} of {len(channels)}, pixels {_ranges(pixels)} of {len(pixels)} in NHWC order"
    if _is_tail(channels):
        return f"{where}: the tail of the filter tile"
    if _is_tail(pixels):
        return f"{where}: the tail of the pixel tile"
    border = _border(wrong.any(1))
    if border:
        return f"{where}: only {border} next to the border: a padding mask, or the offset of a tap"
    if not channels.all():
        return f"{where}: some channels only: the affine, the groups, or a swizzle"
    if not pixels.all():
        return f"{where}: some pixels only: the pixel → (n, h, w) coordinates, or the residual's stride"
    return f"{where}: {_magnitude(got, exact, problem)}"


def _magnitude(got: Tensor, exact: Tensor, problem: Problem) -> str:
    """Which part of the formula is missing, from the size of the error where every element is wrong."""
    if problem.act == "relu" and bool((got < 0).any()):
        return "there are negative results after a ReLU: the activation is missing"
    norm = exact.square().sum()
    ratio = (got * exact).sum() / norm
    distance = (got - ratio * exact).square().sum()
    if distance < 1e-4 * norm:
        return f"everywhere by the same factor {ratio:.4g}: a scale, eps or a divisor"
    residual = "the residual, " if problem.residual else ""
    return f"everywhere: {residual}swapped taps, a remainder of K (C·R·S), or the affine"


def _border(wrong: Tensor) -> str | None:
    """ "the first row" and the like, if nothing but the outermost rows and columns is wrong."""
    inner = wrong[:, 1:-1, 1:-1]
    if inner.numel() == 0 or inner.any():
        return None
    sides = {
        "the first row": wrong[:, 0, 1:-1],
        "the last row": wrong[:, -1, 1:-1],
        "the first column": wrong[:, 1:-1, 0],
        "the last column": wrong[:, 1:-1, -1],
    }
    wrong_sides = [name for name, side in sides.items() if side.any()]
    return ", ".join(wrong_sides) or "the corners"


def _is_tail(flags: Tensor) -> bool:
    """Whether the set flags are one run, and it ends the sequence without being all of it."""
    if flags.all() or not flags[-1]:
        return False
    changes = flags[1:] != flags[:-1]
    return int(changes.sum()) == 1


def _ranges(flags: Tensor, most: int = 4) -> str:
    """ "0–63, 128" of the indices that are set."""
    runs: list[list[int]] = []
    for i in flags.nonzero().flatten().tolist():
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    shown = [_range(first, last) for first, last in runs[:most]]
    text = ", ".join(shown)
    more = len(runs) - most
    if more > 0:
        text += f" and {more} more runs"
    return text


def _range(first: int, last: int) -> str:
    if first == last:
        return str(first)
    return f"{first}–{last}"
