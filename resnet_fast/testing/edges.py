"""Edge cases of each op: small problems with awkward sizes, layouts and options, as fields of a problem.

The device, dtype and, unless named here, NHWC and ReLU are the caller's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]

# Around the sizes of tiles and vectors.
_CHANNELS = (1, 3, 8, 63, 64, 65, 129)
_IMAGE_SHAPES = [*((2, c, 5, 7) for c in _CHANNELS), (1, 64, 1, 9), (4, 128, 14, 14)]
_ACTIVATIONS = ("relu", "none")
_LAYOUTS = ("nhwc", "nchw")


def conv_edges() -> Iterator[Fields]:
    """Channels around the sizes of tiles with each kind of filter, then one case for each option."""
    filters = ((1, 1), (1, 2), (3, 1), (3, 2))  # size, stride
    for c, k in zip(_CHANNELS, reversed(_CHANNELS), strict=True):
        for r, stride in filters:
            residual = "nhwc" if r == stride else None
            yield _conv_case(2, c, 7, 5, k, r, stride, residual=residual, bn=stride == 1)
    yield _conv_case(1, 3, 33, 47, 64, 7, 2)
    yield _conv_case(2, 64, 9, 9, 64, 3, dilation=2, act="none")
    yield _conv_case(2, 64, 8, 6, 64, 3, 2, groups=32, residual="nhwc")
    yield _conv_case(2, 16, 6, 6, 32, 3, groups=4)
    yield _conv_case(1, 256, 1, 1, 64, 1, residual="nhwc")
    yield _conv_case(1, 130, 4, 4, 72, 3, act="none", bn=False)
    yield _conv_case(1, 8, 6, 6, 8, 3, padding=0)
    yield _conv_case(0, 16, 8, 8, 24, 3, residual="nhwc")
    yield _conv_case(3, 32, 5, 5, 200, 1, act="none", residual="nhwc")
    for r, stride in ((3, 1), (1, 1), (1, 2)):  # whole panels of filters
        yield _conv_case(2, 48, 7, 9, 96, r, stride, residual="nhwc")
        yield _conv_case(1, 16, 1, 3, 32, r, stride, act="none", bn=False)


def _conv_case(
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    r: int = 1,
    stride: int = 1,
    *,
    padding: int | None = None,
    dilation: int = 1,
    groups: int = 1,
    **fields: Any,
) -> Fields:
    """n images of c×h×w by k filters of r×r, padded to the same size unless told otherwise."""
    if padding is None:
        padding = dilation * (r // 2)
    case = {
        "x": (n, c, h, w),
        "weight": (k, c // groups, r, r),
        "stride": (stride, stride),
        "padding": (padding, padding),
        "dilation": (dilation, dilation),
        "groups": groups,
        "bn": True,
    }
    return case | fields


def bn_edges() -> Iterator[Fields]:
    """No empty batch, since it has no statistics."""
    cases = itertools.product(_IMAGE_SHAPES, _ACTIVATIONS, (False, True), _LAYOUTS)
    for x, act, has_residual, layout in cases:
        residual = layout if has_residual else None
        yield {"x": x, "layout": layout, "act": act, "residual": residual}


def add_edges() -> Iterator[Fields]:
    """The shapes of batch norm and an empty batch, with and without a gate."""
    shapes = [*_IMAGE_SHAPES, (0, 8, 4, 4)]
    cases = itertools.product(shapes, _ACTIVATIONS, (False, True), _LAYOUTS)
    for x, act, gate, layout in cases:
        yield {"x": x, "layout": layout, "act": act, "residual": layout, "gate": gate}


def pair_edges() -> Iterator[Fields]:
    """Strides of 1 and 2 over even and odd sizes."""
    cases = [  # n, c, h, w → k filters; c2 channels at height h2 and width w2; stride
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
    for case in cases:
        yield _pair_case(*case)
    yield _pair_case(2, 8, 5, 5, 16, 4, 9, 10, 2) | {"layout": "nchw", "residual": "nchw"}


def _pair_case(
    n: int, c: int, h: int, w: int, k: int, c2: int, h2: int, w2: int, stride: int
) -> Fields:
    return {
        "x": (n, c, h, w),
        "weight": (k, c, 1, 1),
        "chain": ((k, c2, 1, 1),),
        "second": (h2, w2),
        "stride": (stride, stride),
        "residual": "nhwc",
    }


def tail_edges() -> Iterator[Fields]:
    """With and without a projection, channels around the sizes of tiles."""
    cases = [  # n, c, h, w → c2 by 3×3 → k, + residual (of cr channels, projected) → k1
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
    for case in cases:
        yield _tail_case(*case)
    yield _tail_case(2, 8, 5, 5, 8, 16, 0, 8) | {"layout": "nchw", "residual": "nchw"}


def _tail_case(n: int, c: int, h: int, w: int, c2: int, k: int, cr: int, k1: int) -> Fields:
    projection = (k, cr, 1, 1) if cr else ()
    return {
        "x": (n, c, h, w),
        "weight": (c2, c, 3, 3),
        "padding": (1, 1),
        "chain": ((k, c2, 1, 1), projection, (k1, k, 1, 1)),
        "residual": "nhwc",
    }


def conv_pool_edges() -> Iterator[Fields]:
    """Floats of one to four channels, and bytes of three."""
    sizes = [  # n, c, h, w; k filters of r×r
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
        yield _conv_pool_case(n, c, h, w, k, r) | {"bytes": False}
        if c == 3:
            yield _conv_pool_case(n, c, h, w, k, r) | {"bytes": True}
    for bytes in (False, True):
        yield _conv_pool_case(2, 3, 20, 18, 64, 7) | {"layout": "nchw", "bytes": bytes}


def _conv_pool_case(n: int, c: int, h: int, w: int, k: int, r: int) -> Fields:
    """n images of c×h×w by k filters of r×r, of stride 2."""
    padding = r // 2
    return {
        "x": (n, c, h, w),
        "weight": (k, c, r, r),
        "stride": (2, 2),
        "padding": (padding, padding),
    }


def pointwise_pool_edges() -> Iterator[Fields]:
    """One pixel up to 182, channels around the sizes of tiles."""
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
