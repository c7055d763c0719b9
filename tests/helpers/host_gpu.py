"""csrc's CUDA kernels compiled by g++ and run on the CPU (host_cuda/), behind the flat signatures of the ops.

Every tensor a kernel sees lies in memory of its own that ends at an unreadable page; outputs start as NaN.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# as shim.cpp counts them
CONVOLUTIONS = (
    "conv",
    "pointwise",
    "pointwise_hopper",
    "conv_hopper",
    "conv_cluster_hopper",
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
EMULATION = ROOT / "tests" / "kernels" / "cuda" / "host_cuda"
# Undefined behaviour traps, which the emulation reports as the launch's error. No fortification: fibres change stacks.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fsanitize=undefined",
    "-fsanitize-undefined-trap-on-error",
    "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    f"-I{EMULATION}",
]


def compiler() -> str | None:
    """A g++ new enough to know _Float16 in C++."""
    path = shutil.which("g++")
    if path is None:
        return None
    command = [path, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"]
    probe = subprocess.run(command, input="_Float16 h;", text=True, capture_output=True)
    return path if probe.returncode == 0 else None


def build(into: Path, csrc: Path = ROOT / "csrc") -> Path:
    """Compile every kernel file and the shim into one library; two compilers at a time."""
    sources = [*sorted(csrc.glob("cuda/*.cu")), EMULATION / "shim.cpp"]

    def compile_one(source: Path) -> Path:
        target = into / f"{source.stem}.o"
        subprocess.run(
            [compiler(), *FLAGS, f"-I{csrc}", "-x", "c++", "-c", source, "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = into / "libhost.so"
    subprocess.run([compiler(), "-shared", *objects, "-o", library], check=True)
    return library


def built_once(root: Path) -> Path:
    """The library in a folder that test processes share, built by the first that asks."""
    library = root / "host_gpu" / "libhost.so"
    library.parent.mkdir(exist_ok=True)
    with open(root / "host_gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return library if library.is_file() else build(library.parent)


class HostGpu:
    """The pretended GPU.

    ``settings`` picks the thread order, the number of processors, when copies land, the first block that runs, and by
    how many elements every tensor misses its alignment.
    """

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.host_guarded.restype = ctypes.c_void_p
        self.lib.host_message.restype = ctypes.c_char_p
        for name in ("host_bn_workspace", "host_gate_workspace"):
            getattr(self.lib, name).restype = ctypes.c_int64
        self._memory: list[tuple[int, int]] = []
        self.settings()

    def settings(
        self,
        seed: int = 1,
        processors: int = 132,
        late_copies: bool = True,
        first_block: int = 0,
        slack: int = 0,
    ) -> None:
        self.lib.host_settings(seed, processors, int(late_copies), first_block)
        self._slack = slack

    # ------------------------------------------------------------ memory

    def _allocate(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        strides: tuple[int, ...] | None = None,
        poison: bool = True,
    ) -> Tensor:
        """Dense memory before an unreadable page, NaN (or zeros) inside; NHWC for four dimensions by default."""
        count = torch.Size(shape).numel()
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = (count + self._slack) * dtype.itemsize
        address = self.lib.host_guarded(ctypes.c_size_t(size), int(poison))
        self._memory.append((address, size))
        flat = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
        if strides is None and len(shape) == 4:
            strides = (
                torch.empty(shape, device="meta").to(memory_format=torch.channels_last).stride()
            )
        return flat.as_strided(shape, strides or torch.empty(shape, device="meta").stride())

    def _put(self, t: Tensor | None, strides: tuple[int, ...] | None = None) -> Tensor | None:
        return None if t is None else self._allocate(tuple(t.shape), t.dtype, strides).copy_(t)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Guarded memory lives for one call; after an error it stays, for a report of the error to show."""
        yield
        for address, size in self._memory:
            self.lib.host_release(ctypes.c_void_p(address), ctypes.c_size_t(size))
        self._memory.clear()

    def _launch(self, name: str, *args) -> None:
        flat = [
            ctypes.c_void_p(a.data_ptr())
            if isinstance(a, Tensor)
            else ctypes.c_void_p()
            if a is None
            else ctypes.c_float(a)
            if isinstance(a, float)
            else a
            for a in args
        ]
        error = getattr(self.lib, name)(*flat)
        if error:
            raise RuntimeError(f"{name}: error {error}: {self.lib.host_message().decode()}")

    # ------------------------------------------------------------ ops

    def pointwise(self, *args) -> Tensor:
        return self.conv(*args, kernel="pointwise")

    def pointwise_hopper(self, *args) -> Tensor:
        return self.conv(*args, kernel="pointwise_hopper")

    def conv_hopper(self, *args) -> Tensor:
        return self.conv(*args, kernel="conv_hopper")

    def conv_cluster_hopper(self, *args) -> Tensor:
        return self.conv(*args, kernel="conv_cluster_hopper")

    def conv(
        self,
        x,
        weight,
        scale,
        shift,
        residual,
        mean,
        var,
        eps,
        stride,
        padding,
        dilation,
        groups,
        act,
        *,
        kernel: str = "conv",
    ) -> Tensor:
        out_h, out_w = (
            (i + 2 * p - d * (f - 1) - 1) // t + 1
            for i, p, d, f, t in zip(
                x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
            )
        )
        with self._call():
            out = self._allocate((x.shape[0], weight.shape[0], out_h, out_w), x.dtype)
            self._conv(
                kernel,
                self._put(x),
                self._put(weight),
                (scale, shift, mean, var),
                eps,
                self._put(residual),
                (stride, padding, dilation),
                act,
                out,
            )
            return out.clone()

    def conv_last_image(
        self, image, images, weight, scale, shift, residual, padding, *, kernel: str
    ) -> Tensor:
        """The last image's output in a batch of ``images``, all zeros but the last, from the block that makes it."""
        with self._call():
            x, last, out = (
                self._allocate((images, *t.shape[1:]), t.dtype, poison=False)
                for t in (image, residual, residual)
            )
            x[-1], last[-1] = image[0], residual[0]
            self._conv(
                kernel,
                x,
                self._put(weight),
                (scale, shift, None, None),
                0.0,
                last,
                ((1, 1), padding, (1, 1)),
                "relu",
                out,
            )
            return out[-1:].clone()

    def _conv(self, kernel, x, weight, vectors, eps, residual, geometry, act, out) -> None:
        n, c, h, w = x.shape
        scale, shift, mean, var = map(self._put, vectors)
        forms = (
            (scale, shift, None, None, None, None)
            if mean is None
            else (None, None, scale, shift, mean, var)
        )
        affine = (ctypes.c_void_p * 6)(*(None if v is None else v.data_ptr() for v in forms))
        sizes = (ctypes.c_int64 * 9)(n, h, w, c, weight.shape[0], *weight.shape[2:], *out.shape[2:])
        numbers = (ctypes.c_int * 6)(*itertools.chain(*geometry))
        self._launch(
            "host_conv",
            CONVOLUTIONS.index(kernel),
            x,
            weight,
            residual,
            out,
            affine,
            float(eps),
            DTYPES[scale.dtype],
            sizes,
            numbers,
            DTYPES[x.dtype],
            int(act == "relu"),
        )

    def conv_tail_hopper(
        self, x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1
    ) -> tuple[Tensor, Tensor]:
        with self._call():
            y, z = (
                self._allocate((x.shape[0], w.shape[0], *x.shape[2:]), x.dtype)
                for w in (weight3, weight1)
            )
            self._tail(
                *map(
                    self._put,
                    (x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1),
                ),
                y,
                z,
            )
            return y.clone(), z.clone()

    def tail_of_last_image(self, args: tuple, images: int) -> tuple[Tensor, Tensor]:
        """Its y and z in a batch of ``images``, all zeros but the last, from the block that makes them."""
        with self._call():
            x, residual, y, z = (
                self._allocate((images, channels, *args[0].shape[2:]), args[0].dtype, poison=False)
                for channels in (
                    args[0].shape[1],
                    args[5].shape[1],
                    args[3].shape[0],
                    args[7].shape[0],
                )
            )
            x[-1], residual[-1] = args[0][0], args[5][0]
            self._tail(x, *map(self._put, args[1:5]), residual, *map(self._put, args[6:]), y, z)
            return y[-1:].clone(), z[-1:].clone()

    def _tail(
        self, x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1, y, z
    ) -> None:
        sizes = (ctypes.c_int64 * 8)(
            x.shape[0],
            *x.shape[2:],
            x.shape[1],
            *(w.shape[0] for w in (weight2, weight3)),
            0 if projection is None else projection.shape[1],
            weight1.shape[0],
        )
        self._launch(
            "host_tail",
            x,
            weight2,
            bias2,
            weight3,
            bias3,
            residual,
            projection,
            weight1,
            bias1,
            y,
            z,
            sizes,
            DTYPES[x.dtype],
        )

    def pointwise_pair_hopper(self, x, weight, x2, weight2, bias, stride2) -> Tensor:
        with self._call():
            out = self._allocate((x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype)
            self._pair(*map(self._put, (x, weight, x2, weight2)), bias, stride2, out)
            return out.clone()

    def pair_last_image(self, image, image2, images, weight, weight2, bias, stride2) -> Tensor:
        """The last image's output in a batch of ``images``, all zeros but the last, from the block that makes it."""
        with self._call():
            shape = images, weight.shape[0], *image.shape[2:]
            x, x2, out = (
                self._allocate((images, *s[1:]), image.dtype, poison=False)
                for s in (image.shape, image2.shape, shape)
            )
            x[-1], x2[-1] = image[0], image2[0]
            self._pair(x, self._put(weight), x2, self._put(weight2), bias, stride2, out)
            return out[-1:].clone()

    def _pair(self, x, weight, x2, weight2, bias, stride2, out) -> None:
        n, c, h, w = x.shape
        sizes = (ctypes.c_int64 * 8)(n, h, w, c, weight.shape[0], *x2.shape[2:], x2.shape[1])
        self._launch(
            "host_pair",
            x,
            weight,
            x2,
            weight2,
            self._put(bias),
            out,
            sizes,
            *stride2,
            DTYPES[x.dtype],
        )

    def bn_act(self, x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
        with self._call():
            y = self._allocate(tuple(x.shape), x.dtype)
            mean, var = (self._allocate((x.shape[1],), torch.float32) for _ in range(2))
            self._launch(
                "host_bn",
                *map(self._put, (x, residual, weight, bias)),
                y,
                mean,
                var,
                *self._bn_rest(x, weight, eps, act),
            )
            return y.clone(), mean.clone(), var.clone()

    def bn_act_backward(
        self, dy, x, y, weight, mean, var, eps, act, residual
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with self._call():
            dx, dresidual = (self._allocate(tuple(x.shape), x.dtype) for _ in range(2))
            dgamma, dbeta = (self._allocate((x.shape[1],), weight.dtype) for _ in range(2))
            self._launch(
                "host_bn_backward",
                *map(self._put, (dy, x, y, weight, mean, var)),
                dx,
                dresidual if residual else None,
                dgamma,
                dbeta,
                *self._bn_rest(x, weight, eps, act),
            )
            return (
                dx.clone(),
                dgamma.clone(),
                dbeta.clone(),
                dresidual.clone() if residual else x.new_empty(0),
            )

    def _bn_rest(self, x, weight, eps, act) -> tuple:
        """Workspace, sizes, eps, dtypes and activation: the end of both argument lists."""
        sizes = ctypes.c_int64(x.numel() // x.shape[1]), ctypes.c_int64(x.shape[1])
        workspace = self._allocate((self.lib.host_bn_workspace(*sizes),), torch.float32)
        return (
            workspace,
            *sizes,
            float(eps),
            DTYPES[x.dtype],
            DTYPES[weight.dtype],
            int(act == "relu"),
        )

    def add_act(self, x, y, gate, act) -> Tensor:
        rest = DTYPES[x.dtype], int(act == "relu")
        with self._call():
            out = self._allocate(tuple(x.shape), x.dtype, x.stride())
            inputs = self._put(x, x.stride()), self._put(y, x.stride())
            if gate is None:
                self._launch("host_add", 0, *inputs, out, ctypes.c_int64(x.numel()), *rest)
            else:
                self._launch("host_gate", *inputs, self._put(gate), out, *_images(x), *rest)
            return out.clone()

    def add_act_backward(self, dout, out, x, gate, act) -> tuple[Tensor, Tensor, Tensor]:
        rest = DTYPES[dout.dtype], int(act == "relu")
        with self._call():
            dy, dx = (self._allocate(tuple(dout.shape), dout.dtype) for _ in range(2))
            if gate is None:
                self._launch(
                    "host_add",
                    1,
                    self._put(dout),
                    self._put(out),
                    dy,
                    ctypes.c_int64(dout.numel()),
                    *rest,
                )
                return dy.clone(), dout.new_empty(0), dout.new_empty(0)
            dgate = self._allocate(tuple(gate.shape), gate.dtype)
            partial = self._allocate(
                (self.lib.host_gate_workspace(*_images(dout), rest[0]),), torch.float32
            )
            self._launch(
                "host_gate_backward",
                *map(self._put, (dout, out, x, gate)),
                dx,
                dy,
                dgate,
                partial,
                *_images(dout),
                *rest,
            )
            return dy.clone(), dx.clone(), dgate.clone()


def _images(x: Tensor) -> tuple:
    n, c, h, w = x.shape
    return ctypes.c_int64(n), ctypes.c_int64(h * w), ctypes.c_int64(c)
