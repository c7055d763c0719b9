"""Tracing: a module's forward as a torch.fx graph.

The forward runs once on stand-ins of its modules, so no hook fires, no state changes and nothing global is patched.
Proxies and graph are torch.fx's. Its Tracer is not used: while it traces it replaces ``nn.Module.__call__`` for the
whole process and runs users' hooks, and it silently fixes what a forward decides by the type of its input, by random
numbers or under ``no_grad``.
"""

from __future__ import annotations

import inspect
import operator
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Scope, TracerBase

_STATE = frozenset(nn.Module().__dict__) | {"_path", "_trace"}


class Untraceable(Exception):
    """A forward cannot be written as a list of calls. The message says why, in one sentence."""


@dataclass
class Traced:
    """One forward as torch.fx nodes, in the order in which they run. Paths are relative to the traced module.

    ``inlined``: the modules whose forward was traced into (the root, "", first). ``opaque``: those that could not be
    traced into, and why. ``returned``: what the last call of each module returned, as nodes.
    """

    modules: dict[str, nn.Module]
    graph: fx.Graph = field(default_factory=fx.Graph)
    inputs: list[fx.Node] = field(default_factory=list)
    output: Any = None
    inlined: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    returned: dict[str, Any] = field(default_factory=dict)


def trace(
    root: nn.Module, leaf: Callable[[str, nn.Module], bool], training: bool | None = None
) -> Traced:
    """Run ``type(root).forward`` on stand-ins. Raises Untraceable.

    A call of a module becomes one node if ``leaf(path, module)`` is true. ``training`` replaces every module's flag.
    """
    return _Trace(root, leaf, training).run(root)


class _Trace(TracerBase):
    def __init__(
        self, root: nn.Module, leaf: Callable[[str, nn.Module], bool], training: bool | None
    ) -> None:
        super().__init__()
        self.traced = Traced(dict(root.named_modules()))
        self.graph = self.traced.graph
        self.leaf = leaf
        self.training = training
        self.scope = Scope("", None)
        self.module_stack = OrderedDict()
        self.node_name_to_scope = {}
        self._classes: dict[type, type] = {}
        self._twins: dict[int, nn.Module] = {}
        self._stack: list[str] = []
        self._mode: tuple | None = None

    def run(self, root: nn.Module) -> Traced:
        with torch.inference_mode(False), torch.enable_grad():
            self._mode = _mode()
            args = [self.create_proxy("placeholder", name, (), {}) for name in _required(root)]
            self.traced.inputs = [a.node for a in args]
            reason = None
            try:
                result = self._inline(self._twin(root, ""), tuple(args), {})
            except Exception as error:  # a forward that is run on stand-ins may raise anything
                reason = _sentence(error)
            finally:
                self._dissolve()
            if reason is not None:
                raise Untraceable(reason)
        self.traced.output = _nodes(result)
        self.graph.output(tuple(found_nodes(self.traced.output)))
        return self.traced

    def _dissolve(self) -> None:
        """Break the cycle of stand-ins and trace, which would keep the model alive until the next collection."""
        for twin in self._twins.values():
            twin.__dict__.clear()
        self._twins.clear()

    # ------------------------------------------------------------ modules

    def _twin(self, module: nn.Module, path: str) -> nn.Module:
        """A stand-in with the module's class and attributes; its call is recorded, its tensors are proxies."""
        twin = self._twins.get(id(module))
        if twin is None:
            twin = self._twins[id(module)] = object.__new__(self._class(type(module)))
            twin.__dict__.update(
                (k, _shallow(v)) for k, v in module.__dict__.items() if k != "forward"
            )
            prefix = f"{path}." if path else ""
            twin.__dict__.update(
                _path=path,
                _trace=self,
                _parameters=_Tensors(self, prefix, module._parameters),
                _buffers=_Tensors(self, prefix, module._buffers),
                _modules={
                    k: m if m is None else self._twin(m, prefix + k)
                    for k, m in module._modules.items()
                },
            )
            if self.training is not None:
                twin.__dict__["training"] = self.training
        return twin

    def _class(self, cls: type) -> type:
        base = nn.Module if issubclass(cls, torch.jit.ScriptModule) else cls
        if cls not in self._classes:
            metaclass: Any = type(base)
            attributes = {"__call__": _called, "__module__": cls.__module__}
            self._classes[cls] = metaclass(cls.__name__, (base,), attributes)
        return self._classes[cls]

    def call(self, twin: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Trace into a module's call; a leaf, or a module that cannot be traced, becomes one node."""
        path = twin.__dict__["_path"]
        traced = self.traced
        result = None
        if not self.leaf(path, traced.modules[path]) and path not in traced.opaque:
            last, inlined = next(iter(reversed(self.graph.nodes))), len(traced.inlined)
            try:
                result = self._inline(twin, args, kwargs)
            # as above: then this module is one node and the rest may still be traced
            except Exception as error:
                self._rewind(last)
                del traced.inlined[inlined:]
                traced.opaque[path] = _sentence(error)
        if path in traced.opaque or result is None:
            result = self.create_proxy("call_module", path, args, kwargs)
        traced.returned[path] = _nodes(result, strict=False)
        return result

    def _inline(self, twin: nn.Module, args: tuple, kwargs: dict) -> Any:
        path = twin.__dict__["_path"]
        module = self.traced.modules[path]
        if path not in self.traced.inlined:
            self.traced.inlined.append(path)
        random_state, depth = _random_state(), len(self._stack)
        self._stack.append(path)
        try:
            result = type(module).forward(twin, *args, **kwargs)
        finally:
            del self._stack[depth:]
            drew = _restore_random_state(random_state)
        if drew:
            raise Untraceable("draws random numbers outside its modules")
        changed = _changed(module, twin)
        if changed:
            raise Untraceable(f"changes its own attribute {changed!r}")
        return result

    def _rewind(self, last: fx.Node) -> None:
        """Forget every node after ``last``."""
        for node in reversed(self.graph.nodes):
            if node is last:
                return
            self.graph.erase_node(node)

    # ------------------------------------------------------------ torch.fx

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None) -> fx.Node:
        if _mode() != self._mode:
            raise Untraceable(
                "switches gradients, autocast, inference mode or checkpointing inside its forward"
            )
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["scope"] = self._stack[-1] if self._stack else ""
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(type(a), type) and issubclass(type(a), (Tensor, nn.Module)):
            raise Untraceable(
                f"uses a {type(a).__name__} that is not among its own parameters, buffers and modules"
            )
        return super().create_arg(a)


class _Proxy(fx.Proxy):
    @property  # type: ignore[misc]  # object's stub lets __class__ be assigned, as no one does to a proxy
    def __class__(self) -> type:
        # ``isinstance`` calls this. A forward that decides by the type of its input would do something else for a proxy
        # than for a tensor, so it is refused.
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("torch.fx", __name__)):
            return _Proxy
        raise Untraceable("asks for the type of its input")


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)

    def call(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


# torch.fx records x += y as x = x + y; other names for x would then miss the sum.
for _name in (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
):
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


def _called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    trace: _Trace = self.__dict__["_trace"]
    return trace.call(self, args, kwargs)


class _Tensors(dict):
    """A stand-in's parameters or buffers. Each becomes a proxy when it is read."""

    def __init__(self, trace: _Trace, prefix: str, tensors: dict[str, Tensor | None]) -> None:
        super().__init__(tensors)
        self._trace = trace
        self._prefix = prefix

    def __getitem__(self, name: str) -> fx.Proxy | None:
        if super().__getitem__(name) is None:
            return None
        return self._trace.create_proxy("get_attr", self._prefix + name, (), {})


# ---------------------------------------------------------------- effects that a trace would miss


def _mode() -> tuple:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        depth,
        torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    )


def _random_state() -> tuple:
    return random.getstate(), torch.get_rng_state()


def _restore_random_state(before: tuple) -> bool:
    """Put Python's and torch's generators back. Returns whether one had changed."""
    if random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1]):
        return False
    random.setstate(before[0])
    torch.set_rng_state(before[1])
    return True


def _shallow(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _changed(module: nn.Module, twin: nn.Module) -> str | None:
    """The name of an attribute that the forward set, or of a container that it changed."""
    before = {name: value for name, value in module.__dict__.items() if name not in _STATE}
    before.pop("forward", None)
    after = {name: value for name, value in twin.__dict__.items() if name not in _STATE}
    for name in before.keys() | after.keys():
        in_both = name in before and name in after
        if not in_both or not _same(before[name], after[name]):
            return name
    return None


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if type(a) not in (list, dict, set):
        return a is b
    values_a, values_b = _elements(a), _elements(b)
    return len(values_a) == len(values_b) and all(map(operator.is_, values_a, values_b))


def _elements(container: Any) -> list[Any]:
    """The elements of a list or set, the values of a dict."""
    return list(container.values()) if type(container) is dict else list(container)


# ---------------------------------------------------------------- signatures, results, sentences


def _required(module: nn.Module) -> list[str]:
    """The names of the inputs without a default. The others keep their defaults; the graph is not for other values."""
    signature = inspect.signature(type(module).forward)
    parameters = list(signature.parameters.values())[1:]  # without self
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    return [p.name for p in required]


def _nodes(result: Any, strict: bool = True) -> Any:
    """A forward's result with nodes in place of proxies. ``strict``: raise Untraceable for what no graph returns."""
    kind: Any = type(result)
    if issubclass(kind, fx.Proxy):
        return result.node
    if kind in (tuple, list):
        return kind(_nodes(r, strict) for r in result)
    if kind in (dict, OrderedDict):
        return kind((k, _nodes(r, strict)) for k, r in result.items())
    if strict and kind not in (type(None), bool, int, float, str):
        raise Untraceable(f"returns a {kind.__name__}")
    return result


def found_nodes(structure: Any) -> Iterator[fx.Node]:
    """Every node in a nested result."""
    if isinstance(structure, fx.Node):
        yield structure
    elif isinstance(structure, (tuple, list, dict)):
        for part in structure.values() if isinstance(structure, dict) else structure:
            yield from found_nodes(part)


def _sentence(error: Exception) -> str:
    if isinstance(error, Untraceable):
        return str(error)
    if isinstance(error, fx.proxy.TraceError):
        return "decides by the values or the shape of its input"
    text = (str(error).splitlines() or [""])[0]
    return f"cannot be run on stand-ins: {type(error).__name__}: {text}"[:160]
