"""GPU-only code on fake CUDA functions of torch: streams, pools, and captures that fail as those of torch 2.11 do."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from resnet_fast import plan, resnet18
from resnet_fast.bench import folded
from resnet_fast.dispatch import kernel, use
from resnet_fast.dispatch.select import on_device_of
from resnet_fast.runtime import cuda_graph
from resnet_fast.runtime.cuda_graph import Graph
from resnet_fast.runtime.program import Program
from resnet_fast.tuning import kernels

BROKEN = "operation failed due to a previous error during capture"


class Stream:
    def __init__(self, device=None) -> None:
        self.device = device

    def wait_stream(self, other) -> None:
        pass


DEFAULT, OWN = Stream(), Stream()  # the second is what torch captures on unless told otherwise


class Cuda:
    """As much of ``torch.cuda`` as captures touch; ``breaks`` says that an error inside of one invalidates it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.current, self.device, self.breaks, self.underway, self.captures = (
            DEFAULT,
            0,
            True,
            set(),
            [],
        )
        cuda = self

        class graph:
            def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
                self.pool, self.stream = pool or object(), stream or OWN

            def __enter__(self):
                if self.pool in cuda.underway:
                    raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
                cuda.underway.add(self.pool)
                self.before, cuda.current = cuda.current, self.stream
                cuda.captures.append((self.stream, self.pool))

            def __exit__(self, kind, error, trace):
                if kind is not None and cuda.breaks:
                    raise RuntimeError(BROKEN)
                cuda.underway.discard(self.pool)
                cuda.current = self.before

        patch.setattr(torch.cuda, "graph", graph)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: self._set("current", stream))
        patch.setattr(
            torch.cuda, "device", lambda device: self._set("device", torch.device(device).index)
        )

    @contextmanager
    def _set(self, name, value):
        before = getattr(self, name)
        setattr(self, name, value)
        try:
            yield
        finally:
            setattr(self, name, before)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    return Cuda(monkeypatch)


def fails() -> None:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_capture_leaves_the_stream_and_says_what_failed(cuda) -> None:
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        cuda_graph.captured(fails)
    assert cuda.current is DEFAULT
    assert cuda_graph.captured(lambda: (cuda.current, 7))[1] == (OWN, 7) and cuda.current is DEFAULT


@pytest.mark.parametrize("breaks", [True, False])
def test_a_kernel_that_cannot_be_captured_costs_the_others_nothing(cuda, breaks) -> None:
    cuda.breaks = breaks
    graphs, reasons = kernels.Device("pretended", "cpu").capture(
        {"a": lambda: 1, "b": fails, "c": lambda: 1 / 0, "d": lambda: 2}
    )
    assert list(graphs) == ["a", "d"] and cuda.current is DEFAULT
    assert reasons == {
        "b": "operation not permitted when stream is capturing",
        "c": "division by zero",
    }


def test_a_plan_goes_on_after_a_capture_that_failed(cuda, monkeypatch) -> None:
    made = plan(resnet18().eval(), torch.randn(1, 3, 32, 32))

    def captured(size: int) -> Program:
        x = torch.randn(1, 3, size, size)
        program = Program(made._engine.lowered, x)
        made._engine._capture(program, x)
        return program

    assert captured(32).graph is not None and captured(40).graph is not None
    with monkeypatch.context() as patch:
        patch.setattr(Program, "__call__", lambda self, x: fails() if cuda.underway else None)
        with pytest.warns(
            UserWarning, match="no CUDA graph .* not permitted when stream is capturing"
        ):
            assert captured(48).graph is None
    assert captured(56).graph is not None and cuda.current is DEFAULT
    (first, pool), (second, same), _, (third, other) = cuda.captures
    # one stream for a pool, or its graphs would share no memory
    assert first is second and pool is same and other is not pool
    assert first is not OWN and third is not OWN and first.device == made.device


def test_a_graph_that_was_made_in_inference_mode_serves_outside(cuda) -> None:
    made, x = (
        plan(resnet18().eval(), torch.randn(1, 3, 32, 32)),
        torch.randn(1, 3, 32, 32).contiguous(memory_format=torch.channels_last),
    )
    with torch.inference_mode():
        graph = Graph(Program(made._engine.lowered, x), x.clone(), object(), Stream())
    with torch.no_grad():
        graph.replay(2 * x)
    assert torch.equal(graph._static, 2 * x)


def test_a_graphs_input_is_laid_by_the_copy_into_it_alone(monkeypatch) -> None:
    x, seen = torch.randn(1, 3, 32, 32, dtype=torch.float64), []
    made = plan(resnet18().eval(), x, dtype=torch.float32)
    wanted = made(x)
    engine = made._engine
    assert torch.equal(engine.run(x), wanted)  # step by step
    engine.last_built.graph = "graph"
    monkeypatch.setattr(engine, "_replay", lambda graph, given: seen.append((graph, given)))
    engine.run(x)
    assert seen[0][0] == "graph" and seen[0][1] is x
    assert engine.run(x.new_ones(1, 3, 40, 40)).dtype == torch.float32  # and built so


def test_a_plans_gpu_is_the_current_one_while_it_runs(cuda) -> None:
    from resnet_fast.planning.engine import inference_settings

    with inference_settings(torch.device("cuda:1")):
        assert cuda.device == 1
    assert cuda.device == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_ops_gpu_is_the_current_one_while_its_kernel_runs(cuda, monkeypatch, count) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert on_device_of(lambda x: (x, cuda.device), torch.device("cuda:1"))(7) == (7, count - 1)
    assert on_device_of(fails, torch.device("cpu")) is fails


def test_without_memory_a_plan_raises_what_torch_does(registry) -> None:
    @kernel("experimental.greedy", op="conv_bn_act", supports=lambda problem: None)
    def greedy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    with (
        use("experimental.greedy"),
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
    ):
        plan(resnet18().eval(), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_that_cudnn_does_not_fuse_is_run_one_by_one(monkeypatch, residual) -> None:
    asked = []

    def refuses(*args):
        asked.append(args)
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, refuses)
    conv = folded.Folded(
        torch.randn(4, 3, 3, 3), torch.randn(4), ((1, 1), (1, 1), (1, 1), 1), "relu"
    )
    x, z = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5) if residual else None
    out = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    wanted = torch.relu(out if z is None else out + z)
    run = folded.cudnn(conv)
    for _ in range(2):
        assert torch.equal(run(x, z if z is None else z.clone()), wanted)
    assert len(asked) == 1

    def greedy(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        folded.cudnn(conv)(x)
