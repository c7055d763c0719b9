"""Problem grids: small problems with every awkward size, layout and option."""

from __future__ import annotations

import torch

from ..dispatch.problem import Problem
from .edges import Fields
from .samples import SAMPLES


def nasty_problems(
    op: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    capability: tuple[int, int] | None = None,
) -> list[Problem]:
    """Small problems at the edges of an op.

    Channels in {1, 3, 8, 63, 64, 65, 129}, H≠W, odd sizes with stride 2, groups, dilation, N=0 and 1.
    """
    common: Fields = {
        "op": op,
        "device": device,
        "dtype": dtype,
        "capability": capability,
        "layout": "nhwc",
        "act": "relu",
    }
    return [Problem(**(common | fields)) for fields in SAMPLES[op].edges()]
