"""Every way to run a network that a user could pick, as a Provider: eager, folded, compiled, ours, other engines.

All are built from one reference model, so all compute with the same weights and each time has an error beside it. Each
takes the same input, contiguous NCHW in the case's dtype; converting that input is part of a provider's time.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import named, use
from ..dispatch.problem import ACROSS
from ..live.accelerate import accelerate
from ..models.family import create_model
from ..models.settle import settle
from ..planning.make import plan
from ..util.machine import SHORT_DTYPES
from . import engines, folded

DTYPES = SHORT_DTYPES  # of a case
MODES = ("infer", "train")
Run = Callable[[Tensor], Tensor]
Build = Callable[[nn.Module, Tensor, torch.dtype], Run]


def _always() -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """One way to run a network.

    ``build(model, example, dtype)`` gets a reference model (eval, float32, NCHW, on the example's device; it must not
    change it) and returns x → logits; ``train`` likewise returns a :class:`TrainStep`, or is None. ``unavailable()`` is
    None or one sentence.
    """

    id: str
    title: str
    build: Build = field(repr=False)
    train: Build | None = field(repr=False, default=None)
    unavailable: Callable[[], str | None] = field(repr=False, default=_always)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] | None = None
    ours: bool = False

    def why_not(self, mode: str, device: str, dtype: str) -> str | None:
        """Why this provider cannot run such a case here, in one sentence, or None if it can."""
        if device not in self.devices:
            return f"{self.title} does not run on {device} here"
        if mode == "train" and self.train is None:
            return f"{self.title} does not train"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"{self.title} takes {', '.join(self.dtypes)}, not {dtype}"
        return self.unavailable()

    def prepare(self, mode: str, model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
        """Build for "infer" or "train"."""
        build = self.build if mode == "infer" else self.train
        return build(model, example, dtype)


# ---------------------------------------------------------------- what every provider shares


def reference_model(name: str, device: str | torch.device = "cpu", seed: int = 0) -> nn.Module:
    """Return the eager model that all providers share, settled, eval, fp32, NCHW.

    It is torchvision's if that is installed, else ours held to its plain modules.
    """
    torch.manual_seed(seed)
    if importlib.util.find_spec("torchvision") is None:
        model: Any = plain(create_model(name))
    else:
        import torchvision

        model = torchvision.models.get_model(name)
    model.architecture = name
    return settle(model).eval().to(device)


def plain(model: nn.Module) -> nn.Module:
    """Make one of our models run its plain modules: a module with its own forward is not fused."""
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.forward = m.forward  # type: ignore[method-assign]
    return model


def example_input(
    batch: int, size: int, dtype: torch.dtype, device: str | torch.device, seed: int = 0
) -> Tensor:
    """Return random normal images, contiguous NCHW (zeros would run 13 % faster on a GPU and prove nothing)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, size, size)
    images = torch.randn(shape, generator=generator)
    return images.to(device, dtype)


@contextmanager
def fair() -> Iterator[None]:
    """Measure every provider of a case under the same settings.

    cuDNN may choose its algorithms by timing, and the compiler starts without specialisations of earlier cases (its
    limit counts every model of a process).
    """
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


# ---------------------------------------------------------------- inference


def _inference(
    run: Run,
    memory_format: torch.memory_format = torch.contiguous_format,
    guard: Callable = torch.inference_mode,
) -> Run:
    def infer(x: Tensor) -> Tensor:
        with guard():
            return run(x.contiguous(memory_format=memory_format))

    return infer


def _copy(
    model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    copied = copy.deepcopy(model)
    return _converted(copied, dtype, memory_format)


def _converted(
    model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> nn.Module:
    model = model.to(dtype)
    return model.to(memory_format=memory_format)


def _eager_nchw(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    net = _copy(model, dtype, torch.contiguous_format)
    return _inference(net)


def _eager_nhwc(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    net = _copy(model, dtype)
    return _inference(net, torch.channels_last)


def _folded(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    if example.device.type == "cpu":
        return folded.FoldedNet(model, dtype, folded.onednn)
    net = folded.FoldedNet(model, dtype, folded.cudnn)
    return folded.graphed(net, example)


def _compile(**options) -> Build:
    def build(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
        # no_grad, not inference_mode: the compiler's own documentation uses it, and it is enough for freezing.
        net = _copy(model, dtype)
        compiled = torch.compile(net, fullgraph=True, dynamic=False, **options)
        return _inference(compiled, torch.channels_last, torch.no_grad)

    return build


def _best_options() -> dict:
    options = torch._inductor.list_mode_options("max-autotune")
    return {"options": {**options, "freezing": True}}


def _compile_best(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    build = _compile(**_best_options())
    return build(model, example, dtype)


def _ours(model: Any) -> nn.Module:
    device = next(model.parameters()).device
    net = create_model(model.architecture).to(device)
    net.load_state_dict(model.state_dict())
    return net.eval()


def _dropin(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    net = _converted(_ours(model), dtype)
    return _inference(net)


def _accelerated(model: nn.Module) -> nn.Module:
    return accelerate(copy.deepcopy(model))


def _accelerate(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    net = _converted(_accelerated(model), dtype)
    return _inference(net)


def _plan(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    return plan(model, example, dtype=dtype)


def _plan_across(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
    """Plan with every kind of group; a group runs step by step if no kernel has won on this GPU."""
    return plan(model, example, dtype=dtype, across=ACROSS)


# ---------------------------------------------------------------- training


class TrainStep:
    """One step of SGD with momentum on cross-entropy: forward, backward, update; x: [N, 3, H, W] → the loss.

    Half precision is autocast over float32 weights, as in common training recipes. The learning rate is tiny: the work
    is the same and nothing diverges.
    """

    def __init__(
        self,
        net: nn.Module,
        forward: Run,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.net, self.forward, self.dtype, self.memory_format = net, forward, dtype, memory_format
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=self.memory_format)
        target = torch.arange(x.shape[0], device=x.device)
        self.optimizer.zero_grad(set_to_none=True)
        half = self.dtype not in (torch.float32, torch.float64)
        with torch.autocast(x.device.type, self.dtype, enabled=half):
            logits = self.forward(x)
            loss = nn.functional.cross_entropy(logits, target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradients(self) -> Tensor:
        """Return the last step's gradients of all parameters, concatenated."""
        return torch.cat([p.grad.flatten() for p in self.net.parameters()])


def _train(
    prepare: Callable[[nn.Module], nn.Module],
    memory_format: torch.memory_format = torch.channels_last,
    compiled: Callable[[], dict] | None = None,
) -> Build:
    def build(model: nn.Module, example: Tensor, dtype: torch.dtype) -> TrainStep:
        net = prepare(model).train().to(memory_format=memory_format)
        if compiled is None:
            return TrainStep(net, net, dtype, memory_format)
        forward = torch.compile(net, fullgraph=True, dynamic=False, **compiled())
        return TrainStep(net, forward, dtype, memory_format)

    return build


# ---------------------------------------------------------------- the list

_LIST = (
    Provider(
        "eager-nchw", "eager, NCHW", _eager_nchw, _train(copy.deepcopy, torch.contiguous_format)
    ),
    Provider("eager", "eager, channels_last", _eager_nhwc, _train(copy.deepcopy)),
    Provider("folded", "folded + fused by torch", _folded),
    Provider("compile", "torch.compile", _compile(), _train(copy.deepcopy, compiled=dict)),
    Provider(
        "compile-best",
        "torch.compile, max-autotune",
        _compile_best,
        _train(copy.deepcopy, compiled=lambda: {"mode": "max-autotune"}),
    ),
    Provider("ours", "resnet_fast, drop-in", _dropin, _train(_ours), ours=True),
    Provider(
        "ours-accelerate", "resnet_fast, accelerate()", _accelerate, _train(_accelerated), ours=True
    ),
    Provider("ours-plan", "resnet_fast, plan()", _plan, ours=True),
    Provider(
        "ours-plan-across",
        "resnet_fast, plan(across=…)",
        _plan_across,
        devices=("cuda",),
        ours=True,
    ),
    Provider(
        "openvino",
        "OpenVINO",
        engines.openvino,
        unavailable=engines.missing("openvino"),
        devices=("cpu",),
        dtypes=("fp32", "bf16"),
    ),
    Provider(
        "onnxruntime",
        "ONNX Runtime",
        engines.onnxruntime,
        unavailable=engines.missing("onnxruntime", "onnx", "onnxscript"),
        dtypes=("fp32", "fp16"),
    ),
    Provider(
        "tensorrt",
        "TensorRT",
        engines.tensorrt,
        unavailable=engines.missing("torch_tensorrt"),
        devices=("cuda",),
    ),
    Provider(
        "cudnn-frontend",
        "cudnn-frontend",
        engines.cudnn_frontend,
        unavailable=engines.missing("cudnn"),
        devices=("cuda",),
        dtypes=("fp16", "bf16"),
    ),
)
PROVIDERS = {provider.id: provider for provider in _LIST}


def provider(id: str) -> Provider:
    """Return the provider of that id; "kernel:ID" or "kernel:FILE" is our plan with it forced where it applies.

    Raises LookupError for an unknown id, ImportError with what is wrong in a file.
    """
    if id.startswith("kernel:"):
        return _forced(id.removeprefix("kernel:"))
    if id not in PROVIDERS:
        raise LookupError(
            f"provider {id!r} is unknown; known: {', '.join(PROVIDERS)}, kernel:ID|FILE"
        )
    return PROVIDERS[id]


def _forced(kernel: str) -> Provider:
    forced = named(kernel)  # raises now, not after others have been measured for minutes

    def build(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Run:
        with use(kernel):
            return _plan(model, example, dtype)

    def unavailable() -> str | None:
        reasons = [k.available() for k in forced]
        return next((reason for reason in reasons if reason is not None), None)

    return Provider(
        f"kernel:{kernel}",
        f"plan() with {kernel}",
        build,
        ours=True,
        unavailable=unavailable,
    )
