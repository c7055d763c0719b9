"""Fusion: a module's forward as a flat list of steps.

conv → BN → (+ residual) → (ReLU) becomes one step, and so does (× gate) + residual → (ReLU). The list is data: names of
modules, values and functions, no code. ``accelerate`` runs it over the live modules, ``plan`` over a snapshot.

A chain becomes one step only where the result is the same as that of its members one by one: every inner value has one
reader, nothing between the members writes what they read, and nothing writes a result that autograd may have saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from .facts import (
    called_module,
    fresh,
    function_name,
    is_norm,
    kind,
    module_path,
    operands,
    touched,
    writes,
)
from .ir import Attribute, Schedule, Step, Value
from .trace import Traced, Untraceable, found_nodes, trace
from .tree import mapped


def schedule(
    module: nn.Module,
    leaf: Callable[[str, nn.Module], bool],
    *,
    training: bool | None = None,
    fuse: bool = True,
    lone: bool = False,
    outputs: Iterable[str] | None = None,
) -> Schedule:
    """Trace ``module`` (see :func:`trace`) and fuse what may be fused. Raises Untraceable.

    ``lone``: a convolution without batch norm is a fused step too. ``outputs``: module paths whose results are
    returned, as a dict, instead of the forward's own.
    """
    traced = trace(module, leaf, training)
    if outputs is not None:
        _return_modules(traced, outputs)
    return _Matcher(traced, lone).run(fuse)


def _return_modules(traced: Traced, outputs: Iterable[str]) -> None:
    """Make the graph return what these modules returned, and drop what only its own output needed."""
    outputs = tuple(outputs)
    unknown = [path for path in outputs if path not in traced.returned]
    if unknown:
        called = ", ".join(path for path in traced.returned if path.count(".") < 2)
        raise Untraceable(f"calls no module {', '.join(map(repr, unknown))}; it calls {called}, …")
    traced.output = {path: traced.returned[path] for path in outputs}
    graph = traced.graph
    graph.erase_node(next(iter(reversed(graph.nodes))))
    graph.output(tuple(found_nodes(traced.output)))
    for node in list(reversed(graph.nodes))[1:]:
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


# ---------------------------------------------------------------- matching


class _Matcher:
    """Finds the chains of one graph and writes the steps."""

    def __init__(self, traced: Traced, lone: bool) -> None:
        self.traced = traced
        self.modules = traced.modules
        self.lone = lone
        self.identities = self._pass_identities()
        self.nodes = [node for node in traced.graph.nodes if node.op != "output"]
        self.position = {node: i for i, node in enumerate(traced.graph.nodes)}
        self.kinds = {node: kind(node, self.modules) for node in self.nodes}
        written = {node: writes(node, self.modules) for node in self.nodes}
        self.writes = {node: arguments for node, arguments in written.items() if arguments}
        self.memory = self._memory()
        self.results = set(found_nodes(traced.output))
        self.chains: dict[fx.Node, list[fx.Node]] = {}

    def _pass_identities(self) -> list[str]:
        """Let an Identity's readers read its input instead. Returns the paths of the identities."""
        replaced: dict[fx.Node, fx.Node] = {}
        for node in list(self.traced.graph.nodes):
            if node.op == "call_module" and kind(node, self.modules) == "identity":
                (given,) = operands(node)
                replaced[node] = given
                node.replace_all_uses_with(given)
                self.traced.graph.erase_node(node)

        def followed(part: Any) -> Any:
            return replaced.get(part, part) if isinstance(part, fx.Node) else part

        self.traced.output = mapped(self.traced.output, followed)
        self.traced.returned = {
            path: mapped(result, followed) for path, result in self.traced.returned.items()
        }
        return [module_path(node) for node in replaced]

    def _memory(self) -> dict[fx.Node, fx.Node]:
        """For each value one value that represents all that may share its memory.

        The inputs may be one tensor, given twice.
        """
        parent = {n: n for n in self.nodes}

        def find(n: fx.Node) -> fx.Node:
            while parent[n] is not n:
                n = parent[n]
            return n

        for node in self.nodes:
            if fresh(node, self.modules):
                continue
            # an in-place operation returns what it writes to
            sharing = self.writes.get(node) or node.all_input_nodes
            if node.op == "placeholder":
                sharing = self.traced.inputs
            for other in sharing:
                parent[find(node)] = find(other)
        return {n: find(n) for n in self.nodes}

    def run(self, fuse: bool) -> Schedule:
        """Find the chains, if ``fuse``, and return the schedule."""
        if fuse:
            self._find_chains("conv", self._conv_chain)
            self._find_chains("add", self._add_chain)
        return Schedule(
            inputs=tuple(node.name for node in self.traced.inputs),
            steps=tuple(self._step(node) for node in self._calls()),
            output=mapped(self.traced.output, _reference),
            inlined=self._inlined_modules(),
            idle=self._idle_modules(),
            skipped=self._skipped_modules(),
            opaque=dict(self.traced.opaque),
            left=self._unfused_convolutions(),
            returned={
                path: mapped(result, _reference) for path, result in self.traced.returned.items()
            },
            writes_inputs=self._writes_an_input(),
            entangled=self._entangled_steps(),
        )

    def _find_chains(self, first: str, chain: Callable[[fx.Node], list[fx.Node]]) -> None:
        """Find the chains whose first node is of that kind."""
        for node in self.nodes:
            if self.kinds[node] == first and node not in self.chains:
                found = chain(node)
                self.chains.update((member, found) for member in found)

    def _calls(self) -> list[fx.Node]:
        """The nodes that become steps: of each chain the last, and every other call."""
        calls = [node for node in self.nodes if node.op.startswith("call_")]
        return [node for node in calls if node is self._chain(node)[-1]]

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """The chain that a node is part of; of a node outside of chains itself alone."""
        return self.chains.get(node) or [node]

    def _inlined_modules(self) -> tuple[str, ...]:
        """The modules whose forward was traced into, whose attributes were read, or that are an Identity."""
        attributes = [module_path(node) for node in self.nodes if node.op == "get_attr"]
        owners = [path.rpartition(".")[0] for path in attributes]
        return _distinct([*self.traced.inlined, *self.identities, *owners])

    def _idle_modules(self) -> tuple[str, ...]:
        """The inlined modules with calls inside but no fused step."""
        with_calls = _scopes(self.nodes)
        with_fused_steps = _scopes(self.chains)
        idle = with_calls & set(self.traced.inlined) - with_fused_steps
        return tuple(sorted(idle))

    def _skipped_modules(self) -> tuple[str, ...]:
        """The modules that no step calls, because a fused one replaces them."""
        paths: list[str] = []
        for chain in self.chains.values():
            paths += _module_paths(chain)
        return _distinct(paths)

    def _unfused_convolutions(self) -> dict[str, str]:
        """The convolutions with a batch norm that are not fused, by path, and why."""
        unfused = [
            node for node in self.nodes if node.op == "call_module" and node not in self.chains
        ]
        reasons = {module_path(node): self._why_left(node) for node in unfused}
        return {path: why for path, why in reasons.items() if why}

    def _writes_an_input(self) -> bool:
        """Whether a node writes memory that the caller passed in."""
        inputs = {self.memory[node] for node in self.traced.inputs}
        return any(not inputs.isdisjoint(self._written_by(node)) for node in self.writes)

    def _entangled_steps(self) -> tuple[str, ...]:
        """The steps of known effect that write in place what is read later under another name."""
        unfused = [node for node in self.writes if node not in self.chains]
        known = [node for node in unfused if not _is_opaque(node, self.modules)]
        return tuple(node.name for node in known if self._seen_later(node))

    def _written_by(self, node: fx.Node) -> set[fx.Node]:
        """The memory that a node writes, by its representatives."""
        return {self.memory[written] for written in self.writes.get(node, ())}

    # ------------------------------------------------------------ chains

    def _conv_chain(self, conv: fx.Node) -> list[fx.Node]:
        chain = [conv]
        bn = self._next(chain, "bn")
        if bn is not None:
            chain.append(bn)
        elif not self.lone:
            return []
        add = self._next(chain, "add")
        # An in-place addition may write the chain's own value, nobody else's.
        if add is not None and all(written is chain[-1] for written in self.writes.get(add, ())):
            chain.append(add)
        relu = self._next(chain, "relu")
        return chain if relu is None else [*chain, relu]

    def _add_chain(self, add: fx.Node) -> list[fx.Node]:
        """(× gate) + residual → ReLU."""
        chain = [add]
        for operand in operands(add):
            if self._is_gated(operand, add):
                chain = [operand, add]
        relu = self._next(chain, "relu") if self._private(add) else None
        return [] if relu is None else [*chain, relu]

    def _is_gated(self, product: fx.Node, add: fx.Node) -> bool:
        """Whether this is a product that may be part of the addition's chain."""
        if self.kinds[product] != "mul" or self._next([product], "add") is not add:
            return False
        return self._private(product)

    def _next(self, chain: list[fx.Node], wanted: str) -> fx.Node | None:
        """The only reader of the chain's value, if it is of the wanted kind and may be part of the chain."""
        last = chain[-1]
        if len(last.users) != 1 or last in self.results:
            return None
        (user,) = last.users
        if self.kinds.get(user) != wanted or user in self.chains:
            return None
        reads_it_once = user.args.count(last) == 1
        return user if reads_it_once and self._may_wait(chain, user) else None

    def _may_wait(self, chain: list[fx.Node], end: fx.Node) -> bool:
        """Whether the chain, run in the place of ``end``, reads and updates the same as its members one by one."""
        members = {*chain, end}
        norms = {node.target for node in members if self.kinds[node] == "bn"}
        for member in chain:
            read = {self.memory[value] for value in member.all_input_nodes if value not in members}
            between = self.nodes[self.position[member] + 1 : self.position[end]]
            for node in between:
                if node in members:
                    continue
                updates_statistics = node.op == "call_module" and node.target in norms
                if updates_statistics or not read.isdisjoint(self._written_by(node)):
                    return False
        return True

    def _private(self, node: fx.Node) -> bool:
        """Whether only the readers of its result, and not the caller, can see what this node writes in place."""
        if self._seen_later(node):
            return False
        callers = [value for value in self.nodes if value.op in ("placeholder", "get_attr")]
        callers_memory = {self.memory[value] for value in callers}
        return callers_memory.isdisjoint(self._written_by(node))

    def _seen_later(self, node: fx.Node) -> bool:
        """Whether what this node writes in place is read later under another name than its result."""
        written = self._written_by(node)
        earlier = self.nodes[: self.position[node]]
        overwritten = [value for value in earlier if self.memory[value] in written]
        return any(value in self.results or self._read_after(value, node) for value in overwritten)

    def _read_after(self, value: fx.Node, node: fx.Node) -> bool:
        position = self.position[node]
        return any(self.position[user] > position for user in value.users)

    def _why_left(self, conv: fx.Node) -> str | None:
        """Why a convolution that a batch norm reads is not fused with it; None for any other module's call."""
        if not isinstance(called_module(conv, self.modules), nn.Conv2d):
            return None
        calls = [user for user in conv.users if user.op == "call_module"]
        norms = [call for call in calls if is_norm(called_module(call, self.modules))]
        if not norms:
            return None
        for node, wanted in ((conv, "conv"), (norms[0], "bn")):
            if self.kinds[node] != wanted:
                m = called_module(node, self.modules)
                why = (
                    "has hooks or a forward of its own"
                    if touched(m)
                    else "is of a form that no op states"
                )
                return f"its {type(m).__name__} {why}"
        if len(conv.users) > 1:
            return "its result is read twice"
        return "something between it and its batch norm writes what it reads"

    # ------------------------------------------------------------ steps

    def _step(self, node: fx.Node) -> Step:
        chain = self.chains.get(node)
        if chain is None:
            return _plain_step(node)
        return self._conv_step(chain) if self.kinds[chain[0]] == "conv" else self._add_step(chain)

    def _conv_step(self, chain: list[fx.Node]) -> Step:
        conv, last = chain[0], chain[-1]
        kinds = [self.kinds[node] for node in chain]
        modules = _module_paths(chain)
        if "bn" not in kinds:
            modules.insert(1, "")
        (x,) = operands(conv)
        return Step(
            op="conv_bn_act",
            target=module_path(conv),
            output=last.name,
            args=(_value(x),),
            modules=tuple(modules),
            residual=self._residual(chain, kinds),
            act="relu" if kinds[-1] == "relu" else "none",
        )

    def _add_step(self, chain: list[fx.Node]) -> Step:
        first, last = chain[0], chain[-1]
        kinds = [self.kinds[node] for node in chain]
        add, gate = first, None
        x, y = map(_value, operands(first))
        if kinds[0] == "mul":
            add, gate = chain[1], y
            y = self._residual(chain, kinds)
        return Step(
            op="add_act",
            target=add.name,
            output=last.name,
            args=(x, y),
            modules=tuple(_module_paths(chain)),
            gate=gate,
            act="relu" if kinds[-1] == "relu" else "none",
        )

    def _residual(self, chain: list[fx.Node], kinds: list[str]) -> Value | None:
        """The other operand of the chain's addition, if it has one."""
        if "add" not in kinds:
            return None
        i = kinds.index("add")
        add, before = chain[i], chain[i - 1]
        others = [operand for operand in operands(add) if operand is not before]
        return _value(others[0])


def _scopes(nodes: Iterable[fx.Node]) -> set[str]:
    """The paths of the modules in which these nodes are computed, and of the modules around those."""
    found: set[str] = set()
    for scope in {node.meta["scope"] for node in nodes}:
        parts = scope.split(".")
        found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return found


def _is_opaque(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A call of a module that is not torch's: nothing is known of what it writes."""
    if node.op != "call_module":
        return False
    m = called_module(node, modules)
    return not type(m).__module__.startswith("torch.nn.")


def _module_paths(chain: Iterable[fx.Node]) -> list[str]:
    """The modules that these nodes call."""
    return [module_path(node) for node in chain if node.op == "call_module"]


def _plain_step(node: fx.Node) -> Step:
    args = mapped(tuple(node.args), _reference)
    kwargs = mapped(dict(node.kwargs), _reference)
    if node.op == "call_module":
        path = module_path(node)
        return Step("module", path, node.name, args, kwargs, modules=(path,))
    return Step("function", _called_name(node), node.name, args, kwargs)


def _called_name(node: fx.Node) -> str:
    """The name of a node's function, by which :func:`facts.function` finds it."""
    if callable(node.target):
        return function_name(node.target)
    return f"Tensor.{node.target}"


def _reference(part: Any) -> Any:
    """A node as a reference; constants stay."""
    if not isinstance(part, fx.Node):
        return part
    if part.op == "get_attr":
        return Attribute(module_path(part))
    return _value(part)


def _value(node: fx.Node) -> Value:
    return Value(node.name)


def _distinct(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
