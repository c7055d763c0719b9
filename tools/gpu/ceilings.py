"""The environment task: the machine, then its ceilings in bandwidth, matrix rate and launch cost."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch

from resnet_fast.bench.ledger import Machine, here
from resnet_fast.bench.network import known_ceilings
from resnet_fast.dispatch import tables
from resnet_fast.tuning import kernels
from resnet_fast.util.machine import cpu_name
from resnet_fast.util.machine import machine as machine_facts
from resnet_fast.util.timing import interleaved

from .check import graph
from .scale import Alive, Cases, Scale

# ---------------------------------------------------------------- the machine


def environment(scale: Scale, alive: Alive) -> Cases:
    """Describe the machine, or say that there is no GPU; then measure its ceilings."""
    yield "machine", partial(machine_row, scale)
    if scale.device == "cpu" or torch.cuda.is_available():
        yield from ceilings(scale)


def machine_row(scale: Scale) -> dict:
    """Return what is known of the machine."""
    if scale.device == "cuda" and not torch.cuda.is_available():
        return {"status": "no gpu", "reason": f"torch {torch.__version__} sees no CUDA device"}
    row = {
        "status": "here",
        "machine": asdict(machine(scale.device)),
        "versions": tables.versions(),
    }
    if scale.device != "cuda":
        return row
    found = torch.cuda.get_device_properties()
    known = known_ceilings("cuda")
    return {
        **row,
        "capability": [found.major, found.minor],
        "sms": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "cudnn": cudnn(),
        "known": known and {"copy": known.copy, "bfloat16": known.rates[torch.bfloat16]},
    }


def cudnn() -> int | str:
    """Return cuDNN's version, or why torch does not accept the one it found: no reason to end the run."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:
        return kernels.first_line(error)


def machine(device: str) -> Machine:
    """Return the ledger's description; without git, as in a copy of the checkout, the commit is unknown."""
    try:
        return here(device)
    except (OSError, subprocess.CalledProcessError):
        name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Machine(name, device, now, "unknown", machine_facts())


# ---------------------------------------------------------------- ceilings


def ceilings(scale: Scale) -> Cases:
    """Measure copy bandwidth, cache bandwidth, matrix rate of each dtype and the cost of a launch, on random data."""
    yield "copy", partial(copy, scale)
    yield "cache", partial(cache, scale)
    for name in ("bfloat16", "float16", "float32", "tf32", "int8", "float8_e4m3fn"):
        yield name, partial(matmul, scale, name)
    yield "launch", partial(launch, scale)


def seconds(work: Callable[[], object], scale: Scale) -> float:
    """Return the median time of one call."""
    timed = interleaved(
        {"": work},
        device=scale.device,
        min_rounds=5,
        max_rounds=30,
        max_seconds=0.5,
    )
    return timed[""].median


def copy(scale: Scale) -> dict:
    """Measure bytes read and written a second, in a copy of much more than any cache holds."""
    source = torch.randn(scale.copy_bytes // 2, device=scale.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), scale)
    return {"status": "measured", "value": 2 * source.nbytes / took, "unit": "B/s"}


def cache(scale: Scale, times: int = 50) -> dict:
    """Measure bytes read and written a second by a kernel whose operands stay in the cache.

    Many calls in a graph hide the launches.
    """
    source = torch.randn(scale.cache_copy_bytes // 2, device=scale.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    torch.mul(source, 2, out=target)
    replay, _ = graph(
        lambda: [torch.mul(source, 2, out=target) for _ in range(times)], scale.device
    )
    took = seconds(replay, scale)
    return {"status": "measured", "value": 2 * source.nbytes * times / took, "unit": "B/s"}


def matmul(scale: Scale, name: str) -> dict:
    """Measure FLOPs a second of a square matrix product in one dtype, float32 without and with TF32."""
    product = matrix_product(scale.matmul, scale.device, name)
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    took = seconds(product, scale)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {"status": "measured", "value": 2 * scale.matmul**3 / took, "unit": "FLOP/s"}


def matrix_product(n: int, device: str, name: str) -> Callable[[], object]:
    """Return a call that multiplies two n × n matrices in a dtype; torch spells the product in three ways."""
    a = torch.randn(n, n, device=device)
    b = torch.randn(n, n, device=device)
    if name == "int8":
        a, b = ((matrix * 40).clamp(-127, 127).to(torch.int8) for matrix in (a, b))
        return lambda: torch._int_mm(a, b.t())
    if name == "float8_e4m3fn":
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
    dtype = getattr(torch, "float32" if name == "tf32" else name)
    a, b = a.to(dtype), b.to(dtype)
    return lambda: a @ b


def launch(scale: Scale, times: int = 200) -> dict:
    """Measure seconds from one small op to the next when Python issues them as fast as it can."""
    x = torch.ones(1, device=scale.device)
    took = seconds(lambda: [x.add_(1) for _ in range(times)], scale)
    return {"status": "measured", "value": took / times, "unit": "s"}
