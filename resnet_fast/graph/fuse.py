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

from .facts import fresh, function_name, is_norm, kind, touched, writes
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
        self.traced, self.modules, self.lone = traced, traced.modules, lone
        self.identities = self._pass_identities()
        self.nodes = [n for n in traced.graph.nodes if n.op != "output"]
        self.position = {n: i for i, n in enumerate(traced.graph.nodes)}
        self.kinds = {n: kind(n, self.modules) for n in self.nodes}
        self.writes = {n: w for n in self.nodes if (w := writes(n, self.modules))}
        self.memory = self._memory()
        self.results = set(found_nodes(traced.output))
        self.chains: dict[fx.Node, list[fx.Node]] = {}

    def _pass_identities(self) -> list[str]:
        """Let an Identity's readers read its input instead. Returns the paths of the identities."""
        replaced: dict[fx.Node, fx.Node] = {}
        for node in list(self.traced.graph.nodes):
            if node.op == "call_module" and kind(node, self.modules) == "identity":
                replaced[node] = node.args[0]
                node.replace_all_uses_with(node.args[0])
                self.traced.graph.erase_node(node)

        def followed(part: Any) -> Any:
            return replaced.get(part, part) if isinstance(part, fx.Node) else part

        self.traced.output = mapped(self.traced.output, followed)
        self.traced.returned = {path: mapped(result, followed) for path, result in self.traced.returned.items()}
        return [node.target for node in replaced]

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
            sharing = self.writes.get(node) or node.all_input_nodes  # an in-place operation returns what it writes to
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
            returned={path: mapped(result, _reference) for path, result in self.traced.returned.items()},
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
        return [node for node in calls if node not in self.chains or node is self.chains[node][-1]]

    def _inlined_modules(self) -> tuple[str, ...]:
        """The modules whose forward was traced into, whose attributes were read, or that are an Identity."""
        read = [node.target.rpartition(".")[0] for node in self.nodes if node.op == "get_attr"]
        return _distinct([*self.traced.inlined, *self.identities, *read])

    def _idle_modules(self) -> tuple[str, ...]:
        """The inlined modules with calls inside but no fused step."""
        with_calls, with_fused_steps = _scopes(self.nodes), _scopes(self.chains)
        return tuple(sorted(with_calls & set(self.traced.inlined) - with_fused_steps))

    def _skipped_modules(self) -> tuple[str, ...]:
        """The modules that no step calls, because a fused one replaces them."""
        targets = []
        for chain in self.chains.values():
            targets += [node.target for node in chain if node.op == "call_module"]
        return _distinct(targets)

    def _unfused_convolutions(self) -> dict[str, str]:
        """The convolutions with a batch norm that are not fused, by path, and why."""
        reasons = {node.target: self._why_left(node) for node in self.nodes if node not in self.chains}
        return {path: why for path, why in reasons.items() if why}

    def _writes_an_input(self) -> bool:
        """Whether a node writes memory that the caller passed in."""
        inputs = {self.memory[node] for node in self.traced.inputs}
        return any(not inputs.isdisjoint(self._written_by(node)) for node in self.writes)

    def _entangled_steps(self) -> tuple[str, ...]:
        """The steps of known effect that write in place what is read later under another name."""
        unfused = [node for node in self.writes if node not in self.chains and not _is_opaque(node, self.modules)]
        return tuple(node.name for node in unfused if self._seen_later(node))

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
        if add is not None and all(w is chain[-1] for w in self.writes.get(add, ())):
            chain.append(add)
        relu = self._next(chain, "relu")
        return chain if relu is None else [*chain, relu]

    def _add_chain(self, add: fx.Node) -> list[fx.Node]:
        """(× gate) + residual → ReLU."""
        chain = [add]
        for product in add.args:
            if self.kinds[product] == "mul" and self._next([product], "add") is add and self._private(product):
                chain = [product, add]
        relu = self._next(chain, "relu") if self._private(add) else None
        return [] if relu is None else [*chain, relu]

    def _next(self, chain: list[fx.Node], wanted: str) -> fx.Node | None:
        """The only reader of the chain's value, if it is of the wanted kind and may be part of the chain."""
        last = chain[-1]
        user = next(iter(last.users)) if len(last.users) == 1 and last not in self.results else None
        if user is None or self.kinds.get(user) != wanted or user in self.chains or user.args.count(last) != 1:
            return None
        return user if self._may_wait(chain, user) else None

    def _may_wait(self, chain: list[fx.Node], end: fx.Node) -> bool:
        """Whether the chain, run in the place of ``end``, reads and updates the same as its members one by one."""
        members = {*chain, end}
        norms = {n.target for n in members if self.kinds[n] == "bn"}
        for member in chain:
            read = {self.memory[a] for a in member.all_input_nodes if a not in members}
            for node in self.nodes[self.position[member] + 1 : self.position[end]]:
                if node in members:
                    continue
                updates_statistics = node.op == "call_module" and node.target in norms
                if updates_statistics or not read.isdisjoint(self._written_by(node)):
                    return False
        return True

    def _private(self, node: fx.Node) -> bool:
        """Whether only the readers of its result, and not the caller, can see what this node writes in place."""
        lent = {self.memory[n] for n in self.nodes if n.op in ("placeholder", "get_attr")}
        return not self._seen_later(node) and lent.isdisjoint(self._written_by(node))

    def _seen_later(self, node: fx.Node) -> bool:
        """Whether what this node writes in place is read later under another name than its result."""
        written = self._written_by(node)
        earlier = [value for value in self.nodes[: self.position[node]] if self.memory[value] in written]
        return any(value in self.results or self._read_after(value, node) for value in earlier)

    def _read_after(self, value: fx.Node, node: fx.Node) -> bool:
        return any(self.position[user] > self.position[node] for user in value.users)

    def _why_left(self, conv: fx.Node) -> str | None:
        """Why a convolution that a batch norm reads is not fused with it; None if none does."""
        if conv.op != "call_module" or not isinstance(self.modules[conv.target], nn.Conv2d):
            return None
        norms = [u for u in conv.users if u.op == "call_module" and is_norm(self.modules[u.target])]
        if not norms:
            return None
        for node, wanted in ((conv, "conv"), (norms[0], "bn")):
            m = self.modules[node.target]
            if self.kinds[node] != wanted:
                why = "has hooks or a forward of its own" if touched(m) else "is of a form that no op states"
                return f"its {type(m).__name__} {why}"
        if len(conv.users) > 1:
            return "its result is read twice"
        return "something between it and its batch norm writes what it reads"

    # ------------------------------------------------------------ steps

    def _step(self, node: fx.Node) -> Step:
        chain = self.chains.get(node)
        if chain is None:
            return _plain_step(node)
        first, kinds = chain[0], [self.kinds[n] for n in chain]
        paths = tuple(n.target for n in chain if n.op == "call_module")
        act = "relu" if kinds[-1] == "relu" else "none"
        if kinds[0] == "conv":
            modules = paths if "bn" in kinds else (paths[0], "", *paths[1:])
            x, residual = _value(first.args[0]), self._residual(chain, kinds)
            return Step("conv_bn_act", first.target, node.name, (x,), {}, modules, residual, None, act)
        if kinds[0] == "mul":
            x, gate = map(_value, first.args)
            args = x, self._residual(chain, kinds)
            return Step("add_act", chain[1].name, node.name, args, {}, paths, None, gate, act)
        return Step("add_act", first.name, node.name, tuple(map(_value, first.args)), {}, paths, None, None, act)

    def _residual(self, chain: list[fx.Node], kinds: list[str]) -> Value | None:
        """The other operand of the chain's addition, if it has one."""
        if "add" not in kinds:
            return None
        i = kinds.index("add")
        return next(_value(a) for a in chain[i].args if a is not chain[i - 1])


def _scopes(nodes: Iterable[fx.Node]) -> set[str]:
    """The paths of the modules in which these nodes are computed, and of the modules around those."""
    found: set[str] = set()
    for scope in {node.meta["scope"] for node in nodes}:
        parts = scope.split(".")
        found.update(".".join(parts[: i + 1]) for i in range(len(parts)))
    return found


def _is_opaque(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A call of a module that is not torch's: nothing is known of what it writes."""
    return node.op == "call_module" and not type(modules[node.target]).__module__.startswith("torch.nn.")


def _plain_step(node: fx.Node) -> Step:
    args, kwargs = mapped(tuple(node.args), _reference), mapped(dict(node.kwargs), _reference)
    if node.op == "call_module":
        return Step("module", node.target, node.name, args, kwargs, (node.target,))
    name = f"Tensor.{node.target}" if node.op == "call_method" else function_name(node.target)
    return Step("function", name, node.name, args, kwargs)


def _reference(part: Any) -> Any:
    """A node as a reference; constants stay."""
    if not isinstance(part, fx.Node):
        return part
    return Attribute(part.target) if part.op == "get_attr" else _value(part)


def _value(node: fx.Node) -> Value:
    return Value(node.name)


def _distinct(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
