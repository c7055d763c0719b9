"""Engines outside PyTorch as peers: OpenVINO, ONNX Runtime, TensorRT, cudnn-frontend. Each is imported only when built.

Each function has the signature of ``Provider.build``. None of them has been run on a GPU by this project: TensorRT and
cudnn-frontend follow their documentation.
"""

from __future__ import annotations

import copy
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import folded

# Module → argument of pip install; engines that run on a CPU are in the extra ``bench``.
PACKAGES = {
    **dict.fromkeys(("openvino", "onnxruntime", "onnx", "onnxscript"), "'resnet_fast[bench]'"),
    "torch_tensorrt": "torch-tensorrt",
    "cudnn": "nvidia-cudnn-frontend",
}


def missing(*modules: str) -> Callable[[], str | None]:
    """Return a check that says which of the modules are not installed, and what to install."""

    def unavailable() -> str | None:
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if not absent:
            return None
        packages = dict.fromkeys(PACKAGES[name] for name in absent)
        return f"not installed: pip install {' '.join(packages)}"

    return unavailable


def openvino(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """OpenVINO on the CPU, for latency, in the inference precision asked for."""
    import openvino as ov

    converted = ov.convert_model(torch.export.export(copy.deepcopy(model), (example.float(),)))
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = ov.Core().compile_model(converted, "CPU", settings)
    request = compiled.create_infer_request()

    def run(x: Tensor) -> Tensor:
        request.infer([x.float().numpy()], share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def onnxruntime(
    model: nn.Module, example: Tensor, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime on the example's device, all graph optimisations on."""
    session = _onnx_session(copy.deepcopy(model).to(dtype), example)
    if example.device.type == "cpu":
        return _onnx_on_cpu(session)
    binding = session.io_binding()
    classes = model.get_parameter("fc.weight").shape[0]
    out = torch.empty(example.shape[0], classes, device=example.device, dtype=dtype)
    element = {torch.float32: 1, torch.float16: 10}[dtype]  # TensorProto.FLOAT, TensorProto.FLOAT16

    def run(x: Tensor) -> Tensor:
        binding.bind_input("x", "cuda", x.get_device(), element, tuple(x.shape), x.data_ptr())
        binding.bind_output(
            "y", "cuda", out.get_device(), element, tuple(out.shape), out.data_ptr()
        )
        session.run_with_iobinding(binding)
        return out

    return run


def _onnx_on_cpu(session: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        (out,) = session.run(None, {"x": x.numpy()})
        return torch.from_numpy(out)

    return run


def _onnx_session(model: nn.Module, example: Tensor) -> Any:
    """Return an ONNX Runtime session of the exported model; its input is "x", its output "y"."""
    import onnxruntime as ort

    exported: Any = io.BytesIO()
    program = torch.onnx.export(
        model, (example,), input_names=["x"], output_names=["y"], dynamo=True, verbose=False
    )
    program.save(exported)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin on into whatever is timed next: eager after it took 107 ms instead of 63 (two cores,
    # November 2026).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    wanted = "CUDAExecutionProvider" if example.device.type == "cuda" else "CPUExecutionProvider"
    session = ort.InferenceSession(exported.getvalue(), options, providers=[wanted])
    if wanted not in session.get_providers():
        raise RuntimeError(
            f"ONNX Runtime offers {session.get_providers()}, not {wanted}: install onnxruntime-gpu"
        )
    return session


def tensorrt(model: nn.Module, example: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """TensorRT through torch-tensorrt, weights and activations in ``dtype``, replayed as a CUDA graph."""
    import torch_tensorrt

    net = copy.deepcopy(model).to(dtype)
    compiled = torch_tensorrt.compile(
        net, ir="dynamo", inputs=[example], use_explicit_typing=True, require_full_compilation=True
    )
    with torch.no_grad():
        return folded.graphed(compiled, example)


def cudnn_frontend(
    model: nn.Module, example: Tensor, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Folded convolutions, each one cudnn-frontend graph (convolution, bias, residual, ReLU), all in a CUDA graph."""
    import cudnn

    handle = cudnn.create_handle()
    net = folded.FoldedNet(model, dtype, lambda conv: _CudnnConv(conv, dtype, handle))

    def on_stream(x: Tensor) -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        return net(x)

    return folded.graphed(on_stream, example)


class _CudnnConv:
    """A folded convolution as one cudnn-frontend graph, built for its first input."""

    def __init__(self, conv: folded.Folded, dtype: torch.dtype, handle: Any) -> None:
        self.conv, self.dtype, self.handle = conv, dtype, handle
        self.bias = None
        if conv.bias is not None:
            self.bias = conv.bias.view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
        self.graph: Any = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        operands = (x, self.conv.weight, self.bias, residual)
        tensors = [t for t in operands if t is not None]
        if self.graph is None:
            self._build(x, residual, tensors)
        bindings = dict(zip(self.inputs, tensors, strict=True))
        bindings[self.output] = self.out
        self.graph.execute(bindings, self.workspace, handle=self.handle)
        return self.out

    def _build(self, x: Tensor, residual: Tensor | None, tensors: list[Tensor]) -> None:
        import cudnn

        kind = {torch.float16: cudnn.data_type.HALF, torch.bfloat16: cudnn.data_type.BFLOAT16}[
            self.dtype
        ]
        graph = cudnn.pygraph(
            io_data_type=kind,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self.handle,
        )
        inputs = [graph.tensor_like(t) for t in tensors]
        stride, padding, dilation, _ = self.conv.geometry  # groups follow from the shapes
        y = graph.conv_fprop(
            image=inputs[0],
            weight=inputs[1],
            padding=list(padding),
            stride=list(stride),
            dilation=list(dilation),
        )
        if self.bias is not None:
            y = graph.bias(input=y, bias=inputs[2])
        if residual is not None:
            y = graph.add(a=y, b=inputs[-1])
        if self.conv.act == "relu":
            y = graph.relu(input=y)
        # Run once by torch for the result's shape and strides.
        out = torch.nn.functional.conv2d(x, self.conv.weight, None, *self.conv.geometry)
        y.set_output(True).set_data_type(kind).set_dim(list(out.shape)).set_stride(
            list(out.stride())
        )
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph, self.inputs, self.output, self.out = graph, inputs, y, out
        self.workspace = torch.empty(graph.get_workspace_size(), device=x.device, dtype=torch.uint8)
