"""Tasks that check what users call on a GPU: whole networks, other streams, and a second GPU."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from resnet_fast.bench.network import Case, measure
from resnet_fast.bench.providers import PROVIDERS
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel, find
from resnet_fast.testing import samples

from .check import compared, first_of_network, outputs
from .scale import Alive, Cases, Scale

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OURS = {
    "infer": ("ours", "ours-accelerate", "ours-plan", "ours-plan-across"),
    "train": ("ours", "ours-accelerate"),
}
TRAINING_BATCH = 8  # batch norm over fewer images makes eager itself inexact
SPIN = 100_000_000  # clock cycles that a stream is kept busy, 50 ms or more


# ---------------------------------------------------------------- whole networks


def models(scale: Scale, alive: Alive) -> Cases:
    """Judge drop-in, accelerate and plan against float64, by eager's error; in training, all gradients."""
    torch.backends.cudnn.allow_tf32 = False
    for mode, providers in OURS.items():
        batch = scale.check_batch if mode == "infer" else min(TRAINING_BATCH, 4 * scale.check_batch)
        for model in (scale.model, *scale.more_models):
            for dtype in scale.dtypes:
                case = Case(mode, model, SHORT[dtype], batch, scale.size, scale.device)
                for id in providers:
                    yield f"{id} {dtype} {case.name}", partial(judged_network, case, id, alive)


def judged_network(case: Case, id: str, alive: Alive) -> dict:
    """Return whether one way of ours to run a network obeys the error rule."""
    found = measure(case, [PROVIDERS[id]], max_seconds=0, max_rounds=1, say=alive)[id]
    if found.skipped:
        return {"status": "left out", "reason": found.skipped}
    if found.wrong:
        return {"status": "wrong", "reason": found.wrong}
    return {
        "status": "right",
        "error": found.row.error,
        "eager_error": found.row.eager_error,
    }


# ---------------------------------------------------------------- streams and devices


def streams(scale: Scale, alive: Alive, kernel: str) -> Cases:
    """Call a kernel on a stream of its own, and on a second GPU while the first is the current one."""
    found = find(kernel)
    for name in scale.dtypes:
        dtype = getattr(torch, name)
        for problem in first_of_network(found, dtype, scale):
            yield f"stream {problem.key}", partial(on_a_stream, found, problem)
            yield f"device {problem.key}", partial(on_second_device, found, problem)


def on_a_stream(kernel: Kernel, problem: Problem) -> dict:
    """Whether a call waits for earlier work of the current stream: on any other it would read its input too early."""
    if problem.device != "cuda":
        return {"status": "left out", "reason": "streams are a GPU's"}
    x, *rest = samples.make_args(problem, 0)
    later, *_ = samples.make_args(problem, 1)
    with torch.no_grad():
        expected = outputs(kernel.fn(later, *rest))
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SPIN)
            x.copy_(later)
            got = outputs(kernel.fn(x, *rest))
        stream.synchronize()
    return compared(
        got, expected, problem, "a call on another stream differs from one on the default"
    )


def on_second_device(kernel: Kernel, problem: Problem) -> dict:
    """Whether a call on tensors of a second GPU computes there, though the first is the current device."""
    if problem.device != "cuda" or torch.cuda.device_count() < 2:
        return {"status": "left out", "reason": "there is no second GPU"}
    args = samples.make_args(problem, 0)
    with torch.no_grad():
        expected = outputs(kernel.fn(*args))
        moved = [there(value, "cuda:1") for value in args]
        got = outputs(kernel.fn(*moved))
    if any(value.device.index != 1 for value in got):
        return {"status": "wrong", "reason": "the result is not on the input's device"}
    return compared(
        got, expected, problem, "a call on the second GPU differs from one on the first"
    )


def there(value: object, device: str) -> object:
    """Return a tensor's copy on a device, in its memory format; any other argument is returned as it is."""
    return value.to(device) if isinstance(value, Tensor) else value
