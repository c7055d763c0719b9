"""A module's forward as a flat list of steps, with conv → BN → (+ residual) → (ReLU) and (× gate) + residual → (ReLU)
as one step each.

The list is data: names of modules, values and functions, no code. ``accelerate`` runs it over the live modules,
``plan`` over a snapshot. A chain becomes one step only where that cannot be told from running its members one by one:
every inner value has one reader, nothing between its members writes what they read, and nobody writes a result that
autograd may have saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import fx, nn

from .facts import fresh, function_name, is_norm, kind, touched, writes
from .ir import Attribute, Schedule, Step, Value
from .trace import Traced, Untraceable, found_nodes, trace


def schedule(
    module: nn.Module,
    leaf: Callable[[str, nn.Module], bool],
    *,
    training: bool | None = None,
    fuse: bool = True,
    lone: bool = False,
    outputs: Iterable[str] | None = None,
) -> Schedule:
    """Trace ``module`` (see :func:`tracing.trace`) and fuse what may be fused.

    ``lone``: a convolution without batch norm is a fused step too; ``outputs``: module paths whose results are
    returned, as a dict, instead of the forward's own. Raises Untraceable.
    """
    traced = trace(module, leaf, training)
    if outputs is not None:
        _return(traced, outputs)
    return _Matcher(traced, lone).run(fuse)


def _return(traced: Traced, outputs: Iterable[str]) -> None:
    """Make the graph return what these modules returned, and drop what only its own output needed."""
    outputs = tuple(outputs)
    unknown = [path for path in outputs if path not in traced.returned]
    if unknown:
        known = ", ".join(path for path in traced.returned if path.count(".") < 2)
        raise Untraceable(f"calls no module {', '.join(map(repr, unknown))}; it calls {known}, …")
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
        """Let an Identity's readers read what it was given; the paths of those passed."""
        replaced: dict[fx.Node, fx.Node] = {}
        for node in list(self.traced.graph.nodes):
            if node.op == "call_module" and kind(node, self.modules) == "identity":
                replaced[node] = node.args[0]
                node.replace_all_uses_with(node.args[0])
                self.traced.graph.erase_node(node)
        self.traced.output = _map(self.traced.output, lambda n: replaced.get(n, n))
        self.traced.returned = {p: _map(r, lambda n: replaced.get(n, n)) for p, r in self.traced.returned.items()}
        return [node.target for node in replaced]

    def _memory(self) -> dict[fx.Node, fx.Node]:
        """For each value a representative of all that may share its memory. The inputs may be one tensor given
        twice.
        """
        parent = {n: n for n in self.nodes}

        def find(n: fx.Node) -> fx.Node:
            while parent[n] is not n:
                n = parent[n]
            return n

        for node in self.nodes:
            sharing = self.writes.get(node) or node.all_input_nodes  # an in-place operation returns what it writes to
            if node.op == "placeholder":
                sharing = self.traced.inputs
            for other in () if fresh(node, self.modules) else sharing:
                parent[find(node)] = find(other)
        return {n: find(n) for n in self.nodes}

    def run(self, fuse: bool) -> Schedule:
        for first, chain in (("conv", self._conv_chain), ("add", self._add_chain)) if fuse else ():
            for node in self.nodes:
                if self.kinds[node] == first and node not in self.chains:
                    found = chain(node)
                    self.chains.update((member, found) for member in found)
        calls = [n for n in self.nodes if n.op.startswith("call_") and n is self.chains.get(n, [n])[-1]]
        skipped = [n.target for chain in self.chains.values() for n in chain if n.op == "call_module"]
        read = [n.target.rpartition(".")[0] for n in self.nodes if n.op == "get_attr"]
        return Schedule(
            inputs=tuple(n.name for n in self.traced.inputs),
            steps=tuple(map(self._step, calls)),
            output=_map(self.traced.output, _reference),
            inlined=_distinct([*self.traced.inlined, *self.identities, *read]),
            idle=self._idle(),
            skipped=_distinct(skipped),
            opaque=dict(self.traced.opaque),
            left={n.target: why for n in self.nodes if n not in self.chains and (why := self._why_left(n))},
            returned={p: _map(r, _reference) for p, r in self.traced.returned.items()},
            writes_inputs=any(
                self.memory[w] is self.memory[n]
                for written in self.writes.values()
                for w in written
                for n in self.traced.inputs
            ),
            entangled=tuple(
                n.name
                for n in self.writes
                if n not in self.chains and not _is_opaque(n, self.modules) and self._seen_later(n)
            ),
        )

    def _idle(self) -> tuple[str, ...]:
        def inside(nodes: Iterable[fx.Node]) -> set[str]:
            scopes = {n.meta["scope"] + "." for n in nodes}
            return {scope[:end] for scope in scopes for end, c in enumerate(scope) if c == "."}

        return tuple(sorted(inside(self.nodes) & set(self.traced.inlined) - inside(self.chains)))

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
        """The only reader of the chain's value, if it is of the wanted kind and the chain may wait for it."""
        last = chain[-1]
        user = next(iter(last.users)) if len(last.users) == 1 and last not in self.results else None
        if user is None or self.kinds.get(user) != wanted or user in self.chains or user.args.count(last) != 1:
            return None
        return user if self._may_wait(chain, user) else None

    def _may_wait(self, chain: list[fx.Node], end: fx.Node) -> bool:
        """Whether running the whole chain where ``end`` stands reads what its members would have, and updates its
        statistics in turn.
        """
        members = {*chain, end}
        norms = {n.target for n in members if self.kinds[n] == "bn"}
        for member in chain:
            read = {self.memory[a] for a in member.all_input_nodes if a not in members}
            for node in self.nodes[self.position[member] + 1 : self.position[end]]:
                if node not in members and (
                    node.op == "call_module"
                    and node.target in norms
                    or any(self.memory[w] in read for w in self.writes.get(node, ()))
                ):
                    return False
        return True

    def _private(self, node: fx.Node) -> bool:
        """Whether nobody but the readers of its result can see what this node writes in place, the caller included."""
        lent = [n for n in self.nodes if n.op in ("placeholder", "get_attr")]
        return not self._seen_later(node) and not any(
            self.memory[w] is self.memory[n] for w in self.writes.get(node, ()) for n in lent
        )

    def _seen_later(self, node: fx.Node) -> bool:
        """Whether what this node writes in place is read later by another name than its result."""
        written = {self.memory[w] for w in self.writes.get(node, ())}
        return any(
            self.memory[value] in written
            and (value in self.results or any(self.position[user] > self.position[node] for user in value.users))
            for value in self.nodes[: self.position[node]]
        )

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
        kinds = [self.kinds[n] for n in chain]
        act = "relu" if kinds[-1] == "relu" else "none"
        paths = tuple(n.target for n in chain if n.op == "call_module")
        i = kinds.index("add") if "add" in kinds else None
        other = None if not i else next(Value(a.name) for a in chain[i].args if a is not chain[i - 1])
        if kinds[0] == "conv":
            modules = paths if "bn" in kinds else (paths[0], "", *paths[1:])
            x = Value(chain[0].args[0].name)
            return Step("conv_bn_act", chain[0].target, node.name, (x,), {}, modules, other, None, act)
        if kinds[0] == "mul":
            x, gate = (Value(a.name) for a in chain[0].args)
            return Step("add_act", chain[i].name, node.name, (x, other), {}, paths, None, gate, act)
        both = tuple(Value(a.name) for a in chain[0].args)
        return Step("add_act", chain[0].name, node.name, both, {}, paths, None, None, act)


def _is_opaque(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """A call of a module that is not torch's: nothing is known of what it writes."""
    return node.op == "call_module" and not type(modules[node.target]).__module__.startswith("torch.nn.")


def _plain_step(node: fx.Node) -> Step:
    args, kwargs = _map(tuple(node.args), _reference), _map(dict(node.kwargs), _reference)
    if node.op == "call_module":
        return Step("module", node.target, node.name, args, kwargs, (node.target,))
    name = f"Tensor.{node.target}" if node.op == "call_method" else function_name(node.target)
    return Step("function", name, node.name, args, kwargs)


def _reference(node: fx.Node) -> Value | Attribute:
    return Attribute(node.target) if node.op == "get_attr" else Value(node.name)


def _map(structure: Any, fn: Callable[[fx.Node], Any]) -> Any:
    """``structure`` with ``fn(node)`` for each node, in ordinary containers."""
    if isinstance(structure, fx.Node):
        return fn(structure)
    if isinstance(structure, (tuple, list)):
        base = tuple if isinstance(structure, tuple) else list
        return base(_map(part, fn) for part in structure)
    if isinstance(structure, dict):
        kept = type(structure) if type(structure).__module__ in ("builtins", "collections") else dict
        return kept((key, _map(part, fn)) for key, part in structure.items())
    if isinstance(structure, slice):
        return slice(_map(structure.start, fn), _map(structure.stop, fn), _map(structure.step, fn))
    return structure


def _distinct(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
