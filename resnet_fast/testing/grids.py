"""Problem grids: small problems with every awkward size, layout and option."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from ..dispatch.problem import ACROSS, Problem


def nasty_problems(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", capability: tuple[int, int] | None = None
) -> list[Problem]:
    """Small problems at the edges: channels in {1, 3, 8, 63, 64, 65, 129}, H≠W, odd sizes with stride 2, groups, dilation, N=0 and 1."""
    place = {"op": op, "device": device, "dtype": dtype, "capability": capability}
    if op == "conv_bn_act":
        return [Problem(layout="nhwc", **place, **case) for case in _nasty_convs()]
    if op in ACROSS:
        return [Problem(**{"layout": "nhwc", "act": "relu", **place, **case}) for case in _NASTY_ACROSS[op]()]
    shapes = [(2, c, 5, 7) for c in (1, 3, 8, 63, 64, 65, 129)] + [(1, 64, 1, 9), (4, 128, 14, 14), (0, 8, 4, 4)]
    if op.startswith("bn_act"):
        shapes = shapes[:-1]  # an empty batch has no statistics
    found = []
    for x, act, residual, layout in itertools.product(shapes, ("relu", "none"), (False, True), ("nhwc", "nchw")):
        if op.startswith("bn_act"):
            found.append(Problem(x=x, layout=layout, act=act, residual=layout if residual else None, **place))
        else:
            found.append(Problem(x=x, layout=layout, act=act, residual=layout, gate=residual, **place))
    return found


def _nasty_convs() -> Iterator[dict]:
    def case(n, c, h, w, k, r=1, stride=1, dilation=1, groups=1, act="relu", residual=None, bn=True, padding=None):
        pad = dilation * (r // 2) if padding is None else padding
        return {
            "x": (n, c, h, w),
            "weight": (k, c // groups, r, r),
            "stride": (stride, stride),
            "padding": (pad, pad),
            "dilation": (dilation, dilation),
            "groups": groups,
            "act": act,
            "residual": residual,
            "bn": bn,
        }

    channels = (1, 3, 8, 63, 64, 65, 129)
    for c, k in zip(channels, channels[::-1], strict=True):
        for r, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
            yield case(2, c, 7, 5, k, r, stride, residual="nhwc" if r == stride else None, bn=stride == 1)
    yield case(1, 3, 33, 47, 64, 7, 2)
    yield case(2, 64, 9, 9, 64, 3, dilation=2, act="none")
    yield case(2, 64, 8, 6, 64, 3, 2, groups=32, residual="nhwc")
    yield case(2, 16, 6, 6, 32, 3, groups=4)
    yield case(1, 256, 1, 1, 64, 1, residual="nhwc")
    yield case(1, 130, 4, 4, 72, 3, act="none", bn=False)
    yield case(1, 8, 6, 6, 8, 3, padding=0)
    yield case(0, 16, 8, 8, 24, 3, residual="nhwc")
    yield case(3, 32, 5, 5, 200, 1, act="none", residual="nhwc")
    for r, stride in ((3, 1), (1, 1), (1, 2)):  # whole panels of filters
        yield case(2, 48, 7, 9, 96, r, stride, residual="nhwc")
        yield case(1, 16, 1, 3, 32, r, stride, act="none", bn=False)


def _nasty_pairs() -> Iterator[dict]:
    """n, c, h, w → k filters; c2 channels at height and width h2, w2."""
    cases = [
        (2, 64, 7, 5, 256, 64, 7, 5, 1),
        (2, 128, 4, 6, 512, 256, 8, 12, 2),
        (2, 128, 4, 3, 512, 256, 7, 5, 2),
        (1, 1, 3, 3, 3, 129, 5, 6, 2),
        (2, 65, 5, 4, 63, 3, 5, 4, 1),
        (3, 8, 1, 1, 130, 8, 2, 1, 2),
        (1, 72, 9, 1, 8, 1, 17, 1, 2),
        (0, 16, 4, 4, 24, 8, 8, 8, 2),
        (4, 64, 7, 7, 64, 32, 13, 13, 2),
    ]
    for n, c, h, w, k, c2, h2, w2, stride in cases:
        yield {
            "x": (n, c, h, w),
            "weight": (k, c, 1, 1),
            "chain": ((k, c2, 1, 1),),
            "second": (h2, w2),
            "stride": (stride, stride),
            "residual": "nhwc",
        }
    yield {
        "x": (2, 8, 5, 5),
        "weight": (16, 8, 1, 1),
        "chain": ((16, 4, 1, 1),),
        "second": (9, 10),
        "stride": (2, 2),
        "layout": "nchw",
        "residual": "nchw",
    }


def _nasty_tails() -> Iterator[dict]:
    """c channels → c2 by 3×3 → k, + residual (of cr channels, projected) → k1."""
    cases = [
        (2, 64, 9, 7, 64, 256, 0, 64),
        (2, 64, 8, 8, 64, 256, 64, 64),
        (1, 128, 14, 5, 128, 512, 0, 128),
        (2, 3, 5, 4, 8, 65, 0, 129),
        (1, 63, 1, 1, 64, 64, 1, 8),
        (3, 16, 1, 6, 24, 40, 0, 1),
        (2, 8, 17, 3, 1, 3, 130, 65),
        (0, 16, 4, 4, 16, 64, 0, 16),
        (2, 64, 6, 6, 64, 256, 0, 128),
    ]
    for n, c, h, w, c2, k, cr, k1 in cases:
        chain = (k, c2, 1, 1), (k, cr, 1, 1) if cr else (), (k1, k, 1, 1)
        yield {"x": (n, c, h, w), "weight": (c2, c, 3, 3), "padding": (1, 1), "chain": chain, "residual": "nhwc"}
    yield {
        "x": (2, 8, 5, 5),
        "weight": (8, 8, 3, 3),
        "padding": (1, 1),
        "chain": ((16, 8, 1, 1), (), (8, 16, 1, 1)),
        "layout": "nchw",
        "residual": "nchw",
    }


def _nasty_stems() -> Iterator[dict]:
    sizes = [
        (2, 3, 32, 32, 64, 7),
        (1, 3, 33, 47, 64, 7),
        (2, 3, 224, 5, 64, 7),
        (1, 3, 1, 1, 64, 7),
        (2, 3, 2, 3, 8, 7),
        (3, 3, 9, 10, 65, 7),
        (0, 3, 16, 16, 64, 7),
        (1, 4, 21, 22, 64, 7),
        (2, 1, 12, 13, 3, 5),
        (1, 3, 19, 18, 32, 3),
    ]
    for n, c, h, w, k, r in sizes:
        for byte in (False, True) if c == 3 else (False,):
            yield {
                "x": (n, c, h, w),
                "weight": (k, c, r, r),
                "stride": (2, 2),
                "padding": (r // 2, r // 2),
                "bytes": byte,
            }
    for byte in (False, True):
        yield {
            "x": (2, 3, 20, 18),
            "weight": (64, 3, 7, 7),
            "stride": (2, 2),
            "padding": (3, 3),
            "layout": "nchw",
            "bytes": byte,
        }


def _nasty_pointwise_pools() -> Iterator[dict]:
    cases = [
        (2, 512, 7, 7, 2048),
        (1, 64, 1, 1, 64),
        (3, 65, 5, 9, 63),
        (2, 8, 14, 13, 129),
        (5, 1, 3, 1, 3),
        (0, 16, 4, 4, 24),
        (2, 130, 2, 8, 72),
    ]
    for n, c, h, w, k in cases:
        yield {"x": (n, c, h, w), "weight": (k, c, 1, 1), "residual": "nhwc"}
    yield {"x": (2, 8, 5, 5), "weight": (16, 8, 1, 1), "layout": "nchw", "residual": "nchw"}


_NASTY_ACROSS = {
    "pointwise_pair": _nasty_pairs,
    "conv_tail": _nasty_tails,
    "conv_pool": _nasty_stems,
    "pointwise_pool": _nasty_pointwise_pools,
}
