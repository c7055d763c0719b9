"""The sizes of a run on a GPU, and of the rehearsal of the same program on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

# a task yields a case's name and the function that returns its row
Cases = Iterator[tuple[str, Callable[[], dict]]]
Alive = Callable[[str], None]  # reports to the watchdog that a long case still works


@dataclass(frozen=True)
class Scale:
    """All sizes of a run. The defaults are those of a run on a GPU."""

    device: str = "cuda"
    model: str = "resnet50"
    more_models: tuple[str, ...] = ("resnet18", "resnext50_32x4d")
    size: int = 224
    check_batch: int = 2
    batches: tuple[int, ...] = (256, 1)
    # the first is the one that is timed
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")
    families: tuple[str, ...] = ()  # of kernels; empty: all
    every: int = 1  # edge problem is checked
    copy_bytes: int = 4 << 30
    cache_copy_bytes: int = 16 << 20  # twice that stays in the cache
    matmul: int = 8192
    large: int = 2**31  # elements that a huge problem exceeds
    seconds: float = 0.5  # of timing a layer
    model_seconds: float = 12.0


REHEARSAL = Scale(
    device="cpu",
    model="resnet18",
    more_models=(),
    size=64,
    check_batch=1,
    batches=(5,),
    dtypes=("float32",),
    families=("aten", "experimental"),
    every=24,
    copy_bytes=1 << 20,
    cache_copy_bytes=1 << 16,
    matmul=64,
    large=2**14,
    seconds=0.01,
    model_seconds=0.1,
)
