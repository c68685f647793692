"""The walk over a jaxpr that follows parameters to the operations that consume them.

A value of the walk is either a weight, as the `Probes` that say what each of its axes
was in the parameter, or a plain array, as the `Flow` that it depends on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import _paths
from ..structure import AxisOp, Broadcast, Reshape, Scale, Transpose, Unstructured
from . import _jaxpr
from ._consumers import INPUT, AxisRole, Consumer, Flow, Leaf
from ._registry import RULES, Operand
from .rules import _dot_general, _gather


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a leaf has become after some structure-only operations.

    Attributes:
        leaf: the leaf's path.
        axes: for each axis of the value, the leaf's axes that it is made of.
        chosen: leaf's axes of which constant indices have chosen entries: positions
            looked up in a table, or a permutation of what a product will consume.
    """

    leaf: str
    axes: tuple[frozenset[int], ...]
    chosen: frozenset[int] = frozenset()

    def apply(self, op: AxisOp) -> "Probe":
        """What the leaf becomes under one more operation."""
        axes = self.axes
        match op:
            case Transpose(permutation):
                axes = tuple(axes[i] for i in permutation)
            case Broadcast(positions, shape):
                new = [frozenset()] * len(shape)
                for old, position in enumerate(positions):
                    new[position] = axes[old]
                axes = tuple(new)
            case Reshape(groups):
                count = 1 + max((i for g in groups for i in g.new), default=-1)
                new = [frozenset()] * count
                for group in groups:
                    whole = frozenset().union(*(axes[i] for i in group.old))
                    for i in group.new:
                        new[i] = whole
                axes = tuple(new)
        return dataclasses.replace(self, axes=axes)

    def pad(self, ndim: int) -> "Probe":
        """The probe with as many axes as the value has; new ones come last."""
        missing = (frozenset(),) * (ndim - len(self.axes))
        return dataclasses.replace(self, axes=self.axes + missing)


Probes = tuple[Probe, ...]


def whole(leaf: Leaf) -> Probes:
    """A leaf as it enters the function: every axis is one of its own."""
    return (Probe(leaf.path, tuple(frozenset([i]) for i in range(len(leaf.shape)))),)


def _is_weight(value: Any) -> bool:
    return isinstance(value, tuple)


class Walk:
    """One pass over a jaxpr and the jaxprs inside it."""

    def __init__(self, found: dict[str, Leaf]):
        self.found = found
        # Leaves that are read layer by layer together, by what reads them.
        self.read_together: dict[Any, dict[str, int]] = {}
        # The line of the innermost enclosing call: see `_interpreter.source`.
        self.source = ""
        # How often indexed leaves were read, by size: see `index_group`.
        self.indexed_reads: dict[Any, list[dict[str, int]]] = {}
        # The calls that enclose the walk: one function called twice reads twice.
        self.calls: tuple[int, ...] = ()

    def jaxpr(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list:
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, values, strict=True))
        makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}

        def read(atom):
            return frozenset() if _jaxpr.is_literal(atom) else env[atom]

        def producer(atom):
            return None if _jaxpr.is_literal(atom) else makers.get(atom)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(_is_weight(value) for value in operands):
                results = self.equation(eqn, operands, producer)
            else:
                results = [frozenset().union(*operands)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any], producer: Any) -> list[Any]:
        before = self.source, self.calls
        self.source = _jaxpr.source(eqn) or self.source
        if eqn.primitive.name in _INNER:
            self.calls = (*self.calls, id(eqn))
        try:
            return self._equation(eqn, operands, producer)
        finally:
            self.source, self.calls = before

    def _equation(self, eqn: Any, operands: list[Any], producer: Any) -> list[Any]:
        name = eqn.primitive.name
        if name == "dot_general":
            return [self.product(eqn, operands)]
        if name == "gather" and _is_weight(operands[0]):
            return [self.gather(eqn, *operands)]
        if name in ("device_put", "optimization_barrier"):
            return operands
        if name in ("concatenate", "stop_gradient"):
            weights = [p for v in operands if _is_weight(v) for p in v]
            if name == "stop_gradient":
                for probe in weights:
                    self.found[probe.leaf].stopped = True
            return [tuple(weights)]
        if name in _INNER:
            return getattr(self, _INNER[name])(eqn, operands)
        rule = RULES.get(name)
        at = [i for i, value in enumerate(operands) if _is_weight(value)]
        if len(at) == 2 and name in ("mul", "div"):
            at = self.rescaled(eqn, operands)
        if rule is not None and rule.axes is not None and len(at) == 1:
            try:
                return self.structural(eqn, rule, at[0], operands, producer)
            except Unstructured:
                pass
        return self.other(eqn, operands)

    def rescaled(self, eqn: Any, operands: list[Any]) -> list[int]:
        """Which of two parameters in a product is the weight: the one that fills it."""
        sizes = eqn.outvars[0].aval.shape
        full = [
            all(p.axes[i] for p in probes for i, n in enumerate(sizes) if n > 1)
            and eqn.invars[at].aval.shape == sizes
            for at, probes in enumerate(operands)
        ]
        if full[0] == full[1]:
            return []
        for probe in operands[full.index(False)]:
            self.note(probe, self.used(eqn.primitive.name, "other"))
        return [full.index(True)]

    def structural(self, eqn, rule, at, operands, producer) -> list[Any]:
        shape = eqn.invars[at].aval.shape
        operand = Operand(eqn, at, shape, [None] * len(operands), producer)
        described = rule.axes(operand)
        if any(isinstance(op, Scale) for ops in described for op in ops):
            self.check_scaled(operands[at], shape, described[0])
        results = []
        for ops, var in zip(described, eqn.outvars, strict=True):
            probes = operands[at]
            for op in ops:
                probes = tuple(probe.apply(op) for probe in probes)
            probes = tuple(probe.pad(len(var.aval.shape)) for probe in probes)
            self.indexed(operands[at], probes)
            results.append(probes)
        return results

    def check_scaled(self, probes: Probes, shape: tuple[int, ...], ops: Any) -> None:
        """Tells a rescaled weight from activations that a weight rescales."""
        large = {i for i, n in enumerate(shape) if n > 1}
        stretched = any(not probe.axes[i] for probe in probes for i in large)
        full = len(large) > 1 and large <= set(ops[0].axes)
        if stretched or full:
            raise Unstructured("a product with activations")

    def indexed(self, before: Probes, after: Probes) -> None:
        """Notes the axes that an index has removed: a layer chosen from a stack."""
        for old, new in zip(before, after, strict=True):
            gone = frozenset().union(*old.axes) - frozenset().union(*new.axes)
            leaf = self.found[new.leaf]
            for axis in gone:
                if leaf.shape[axis] > 1:
                    group = self.index_group(leaf, axis)
                    self.read_together.setdefault(group, {})[leaf.path] = axis

    def index_group(self, leaf: Leaf, axis: int) -> tuple[Any, ...]:
        """Which stack an indexed leaf belongs to.

        A loop over layers reads every leaf of a layer, then those of the next: leaves
        first read after another stack of the size was read to its end begin a new one.
        """
        size = leaf.shape[axis]
        reads = self.indexed_reads.setdefault((size, self.calls), [{}])
        for generation, counts in enumerate(reads):
            if leaf.path in counts:
                counts[leaf.path] += 1
                return ("index", size, self.calls, generation)
        finished = all(count >= size for count in reads[-1].values())
        if reads[-1] and finished and len(reads[-1]) > 1:
            reads.append({})
        reads[-1][leaf.path] = 1
        return ("index", size, self.calls, len(reads) - 1)

    def product(self, eqn: Any, operands: list[Any]) -> Any:
        reached: set[tuple[str, Consumer]] = set()
        for at, value in enumerate(operands):
            if not _is_weight(value):
                continue
            dims = _dot_general.read(eqn, at)
            roles: dict[int, AxisRole] = {w: "in" for _, w in dims.contract}
            roles |= {w: "batch" for _, w in dims.batch}
            for probe in value:
                reached.add(self.consume(probe, "dot_general", "product", roles))
        return frozenset(reached | {INPUT})

    def gather(self, eqn: Any, probes: Probes, indices: Any) -> Any:
        shape = eqn.invars[0].aval.shape
        try:
            rows = _gather.read(eqn, shape, None)
        except Unstructured:
            return self.other(eqn, [probes])[0]
        many = len(eqn.invars[1].aval.shape) > 1
        if many and INPUT in indices:  # rows of a table: activations from here on
            roles: dict[int, AxisRole] = {rows.axis: "in"}
            return frozenset(
                {self.consume(p, "gather", "lookup", roles) for p in probes} | {INPUT}
            )
        out = tuple(
            Probe(
                p.leaf,
                tuple(
                    p.axes[x] if isinstance(x, int) else p.axes[rows.axis]
                    for x in rows.out_labels
                ),
                p.chosen | (p.axes[rows.axis] if many else frozenset()),
            )
            for p in probes
        )
        self.indexed(probes, out)
        return out

    def consume(
        self, probe: Probe, primitive: str, kind: Any, roles: dict[int, AxisRole]
    ) -> tuple[str, Consumer]:
        leaf = self.found[probe.leaf]
        found: dict[int, AxisRole] = {}
        problem = None
        for i, axes in enumerate(probe.axes):
            for axis in axes:
                role = roles.get(i, "out")
                if found.setdefault(axis, role) != role:
                    problem = (
                        f"axis {axis} is split, and its parts have the roles "
                        f"`{found[axis]}` and `{role}`"
                    )
        axes = tuple(found.get(i, "batch") for i in range(len(leaf.shape)))
        return self.note(probe, self.used(primitive, kind, axes, problem))

    def looked_up(self, probe: Probe, primitive: str) -> tuple[str, Consumer]:
        """A lookup at constant positions, known as one now that no product came."""
        roles: dict[int, AxisRole] = {
            i: "in" for i, axes in enumerate(probe.axes) if axes & probe.chosen
        }
        return self.consume(probe, primitive, "lookup", roles)

    def result(self, value: Any) -> Flow:
        """What one result of the function depends on."""
        if not _is_weight(value):
            return value
        chosen = [probe for probe in value if probe.chosen]
        return frozenset(self.looked_up(probe, "gather") for probe in chosen)

    def used(
        self, primitive: str, kind: Any, axes: Any = (), problem: str | None = None
    ) -> Consumer:
        return Consumer(kind, axes, primitive, self.source, problem)

    def note(self, probe: Probe, consumer: Consumer) -> tuple[str, Consumer]:
        leaf = self.found[probe.leaf]
        if consumer not in leaf.consumers:
            leaf.consumers.append(consumer)
        return leaf.path, consumer

    def other(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        flow: Flow = frozenset()
        for value in operands:
            if _is_weight(value):
                for probe in value:
                    if probe.chosen:
                        flow |= {self.looked_up(probe, name)}
                    else:
                        self.note(probe, self.used(name, "other"))
            else:
                flow |= value
        return [flow] * len(eqn.outvars)

    # Control flow: the same walk inside.

    def call(self, eqn: Any, operands: list[Any]) -> list[Any]:
        params = eqn.params
        name = next(n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
        return self.inside(params[name], operands)

    def inside(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        inner, consts = _jaxpr.closed(jaxpr)
        return self.jaxpr(inner, [frozenset()] * len(consts), operands)

    def cond(self, eqn: Any, operands: list[Any]) -> list[Any]:
        branches = [self.inside(b, operands[1:]) for b in eqn.params["branches"]]
        return [self.join(values, "cond") for values in zip(*branches, strict=True)]

    def while_loop(self, eqn: Any, operands: list[Any]) -> list[Any]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = operands[n : n + m], operands[n + m :]
        self.inside(eqn.params["cond_jaxpr"], [*operands[:n], *carry])
        return self.repeat("while", eqn.params["body_jaxpr"], consts, carry, [])

    def scan(self, eqn: Any, operands: list[Any]) -> list[Any]:
        n, m = _jaxpr.scan_counts(eqn)
        xs = [self.unstack(eqn, x) for x in operands[n + m :]]
        consts, carry = operands[:n], operands[n : n + m]
        return self.repeat("scan", eqn.params["jaxpr"], consts, carry, xs)

    def unstack(self, eqn: Any, x: Any) -> Any:
        if not _is_weight(x):
            return x
        for probe in x:
            for axis in probe.axes[0]:
                instance = ("scan", id(eqn), self.calls)
                group = self.read_together.setdefault(instance, {})
                group[probe.leaf] = axis
        return tuple(dataclasses.replace(p, axes=p.axes[1:]) for p in x)

    def repeat(
        self, name: str, jaxpr: Any, consts: list, carry: list, xs: list
    ) -> list[Any]:
        """Walks a loop's body until what flows around the loop stays the same."""
        while True:
            outs = self.inside(jaxpr, [*consts, *carry, *xs])
            pairs = zip(carry, outs[: len(carry)], strict=True)
            joined = [self.join(pair, name) for pair in pairs]
            if joined == carry:
                return outs
            carry = joined

    def join(self, values: Sequence[Any], primitive: str) -> Any:
        """What a value is if it may be any of these."""
        first = values[0]
        if all(value == first for value in values):
            return first
        flow: Flow = frozenset()
        for value in values:
            if _is_weight(value):  # a weight in one case only: no operand to follow
                for probe in value:
                    self.note(probe, self.used(primitive, "other"))
            else:
                flow |= value
        return flow

    def place_stacks(self) -> None:
        """Finds where in the path each stack lives: what its leaves have in common."""
        for group in self.read_together.values():
            depth = _paths.common_depth(list(group))
            for path, axis in group.items():
                self.found[path].stacks.setdefault(axis, depth)


_INNER = {
    "jit": "call",
    "pjit": "call",
    "closed_call": "call",
    "core_call": "call",
    "remat2": "call",
    "remat": "call",
    "checkpoint": "call",
    "custom_jvp_call": "call",
    "custom_vjp_call": "call",
    "custom_vjp_call_jaxpr": "call",
    "shard_map": "call",
    "cond": "cond",
    "while": "while_loop",
    "scan": "scan",
}
