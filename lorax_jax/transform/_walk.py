"""The walk over a jaxpr that follows parameters to the operations that consume them.

A value of the walk is either a weight, as the `Probes` that say what each of its axes
was in the parameter, or a plain array, as the `Flow` that it depends on.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .. import _paths
from ..structure import AxisOp, AxisRole, Bilinear, Scale, Unstructured
from . import _jaxpr
from ._consumers import INPUT, Consumer, Flow, Leaf
from ._probe import Probe, Probes, is_weight
from ._registry import RULES, Operand
from ._walk_inner import INNER
from .rules import _concatenate, _gather, _write

# What puts a value together from others, side by side or one into another.
_TOGETHER = ("concatenate", "stack", "dynamic_update_slice", "scatter")


def _is_expert(probe: Probe, op: Bilinear) -> bool:
    """Whether a product may consume experts that indices have chosen.

    A token's expert is a matrix: of the leaf's axes behind the indices some are summed
    over and some are free. A row of a table is a vector. The axes of the indices run
    in parallel or, as the second of `top_k`, are free; a sum over them is one of rows.
    """
    parallel = {axis for axis, role in op.roles.items() if role == "batch"}
    summed = {axis for axis, role in op.roles.items() if role == "in"}
    has_in = has_out = False
    for i, axes in enumerate(probe.axes):
        if axes & probe.chosen:
            if i in summed:
                return False
        elif axes:
            has_in |= i in summed
            has_out |= i not in summed and i not in parallel
    return has_in and has_out


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
            if any(is_weight(value) for value in operands):
                results = self.equation(eqn, operands, producer)
            else:
                results = [frozenset().union(*operands)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Any], producer: Any) -> list[Any]:
        before = self.source, self.calls
        self.source = _jaxpr.source(eqn) or self.source
        if eqn.primitive.name in INNER:
            self.calls = (*self.calls, id(eqn))
        try:
            return self._equation(eqn, operands, producer)
        finally:
            self.source, self.calls = before

    def _equation(self, eqn: Any, operands: list[Any], producer: Any) -> list[Any]:
        name = eqn.primitive.name
        rule = RULES.get(name)
        if rule is not None and rule.read is not None:
            return [self.product(eqn, rule, operands, producer)]
        if name == "gather" and is_weight(operands[0]):
            return [self.gather(eqn, *operands)]
        if name in ("device_put", "optimization_barrier"):
            return operands
        if name in _TOGETHER:
            return [self.together(eqn, [self.settled(value) for value in operands])]
        if name == "stop_gradient":
            for probe in operands[0]:
                self.found[probe.leaf].stopped = True
            return operands
        if name in INNER:
            return INNER[name](self, eqn, operands)
        at = [i for i, value in enumerate(operands) if is_weight(value)]
        if len(at) == 2 and name in ("mul", "div"):
            at = self.rescaled(eqn, operands)
        if rule is not None and rule.axes is not None and len(at) == 1:
            try:
                return self.structural(eqn, rule, at[0], operands, producer)
            except Unstructured:
                pass
        return self.other(eqn, operands)

    def together(self, eqn: Any, operands: list[Any]) -> Any:
        """A value that is put together from others: a weight if any of them is."""
        if not any(map(is_weight, operands)):
            return frozenset().union(*operands)
        name, ndim = eqn.primitive.name, len(eqn.outvars[0].aval.shape)
        ops: list[tuple[AxisOp, ...]] = [()] * len(operands)
        if name == "stack":
            shape = eqn.invars[0].aval.shape
            ops = [(_concatenate.new_axis(shape, eqn.params["axis"]),)] * len(operands)
        elif name != "concatenate":
            try:
                how = _write.read(eqn, [None] * len(operands))
            except Unstructured:
                return self.other(eqn, operands)[0]
            ops[2 if name == "scatter" else 1] = how.ops
        found: list[Probe] = []
        for value, mine in zip(operands, ops, strict=True):
            for probe in value if is_weight(value) else ():
                for op in mine:
                    probe = probe.apply(op)
                found.append(probe.pad(ndim))
        return tuple(dict.fromkeys(found))

    def settled(self, value: Any) -> Any:
        """`value`, or if it is rows of tables, what these depend on."""
        if is_weight(value) and all(probe.routed for probe in value):
            return frozenset().union(*(self.looked_up(probe) for probe in value))
        return value

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
            if new.routed:  # one of the tokens: no layer
                continue
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

    def product(self, eqn: Any, rule: Any, operands: list[Any], producer: Any) -> Any:
        """An operation that consumes weights."""
        unknown = [None] * len(operands)
        ops: dict[int, Bilinear] = {}
        for at, value in enumerate(operands):
            if is_weight(value):
                shape = eqn.invars[at].aval.shape
                try:
                    operand = Operand(eqn, at, shape, unknown, producer)
                    ops[at], _ = rule.read(operand)
                except Unstructured as error:
                    return self.other(eqn, operands, str(error))[0]
        routed = {at for at in ops if any(p.routed for p in operands[at])}
        experts = {
            at for at in routed if all(_is_expert(p, ops[at]) for p in operands[at])
        }
        # Experts multiply activations: beside a weight, or two of a kind, what could be
        # experts are rows of tables.
        rows = {
            at
            for at in routed
            if at not in experts
            or any(o in experts or o not in routed for o in ops if o != at)
        }
        reached: Flow = frozenset()
        for at, op in ops.items():
            for probe in operands[at]:
                if at in rows:
                    reached |= self.looked_up(probe)
                else:
                    # An expert's indices run in parallel, wherever they stand.
                    chosen = probe.chosen if probe.routed else frozenset()
                    roles: dict[int, AxisRole] = dict(op.roles)
                    for i, axes in enumerate(probe.axes):
                        if axes & chosen:
                            roles[i] = "batch"
                    used = self.consume(
                        probe, eqn.primitive.name, "product", roles, op.groups
                    )
                    reached |= {self.note(probe, used)}
        return reached | {INPUT}

    def gather(self, eqn: Any, probes: Probes, indices: Any) -> Any:
        try:
            op = _gather.pick(eqn, eqn.invars[0].aval.shape, None)
        except Unstructured:
            return self.other(eqn, [probes, indices])[0]
        ndim = len(eqn.outvars[0].aval.shape)
        out = tuple(probe.apply(op).pad(ndim) for probe in probes)
        if not op.ids:  # one entry, and its axis is gone
            self.indexed(probes, out)
            return out
        found = []
        for old, new in zip(probes, out, strict=True):
            picked = frozenset().union(*(old.axes[axis] for axis in op.axes))
            rows = old.rows
            if rows is None and len(op.axes) == 1:
                roles: dict[int, AxisRole] = {op.axes[0]: "in"}
                rows = self.consume(old, "gather", "lookup", roles)
            elif rows is None:
                rows = self.used("gather", "other")
            found.append(
                dataclasses.replace(
                    new,
                    chosen=old.chosen | picked,
                    routed=old.routed or INPUT in indices,
                    rows=rows,
                )
            )
        return tuple(found)

    def consume(
        self,
        probe: Probe,
        primitive: str,
        kind: Any,
        roles: dict[int, AxisRole],
        groups: int = 1,
    ) -> Consumer:
        """The consumer that gives the axes of `probe` these roles, `out` by default."""
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
        return self.used(primitive, kind, axes, problem, groups)

    def looked_up(self, probe: Probe) -> Flow:
        """Settles that what indices have chosen were rows of a table."""
        assert probe.rows is not None
        flow = frozenset([self.note(probe, probe.rows)])
        return flow | {INPUT} if probe.routed else flow

    def result(self, value: Any) -> Flow:
        """What one result of the function depends on."""
        if not is_weight(value):
            return value
        flows = [self.looked_up(probe) for probe in value if probe.rows]
        return frozenset().union(*flows)

    def used(
        self,
        primitive: str,
        kind: Any,
        axes: Any = (),
        problem: str | None = None,
        groups: int = 1,
    ) -> Consumer:
        return Consumer(kind, axes, primitive, self.source, problem, groups)

    def note(self, probe: Probe, consumer: Consumer) -> tuple[str, Consumer]:
        leaf = self.found[probe.leaf]
        if consumer not in leaf.consumers:
            leaf.consumers.append(consumer)
        return leaf.path, consumer

    def other(
        self, eqn: Any, operands: list[Any], problem: str | None = None
    ) -> list[Any]:
        name = eqn.primitive.name
        flow: Flow = frozenset()
        for value in operands:
            if is_weight(value):
                for probe in value:
                    if probe.rows:
                        flow |= self.looked_up(probe)
                    else:
                        self.note(probe, self.used(name, "other", problem=problem))
            else:
                flow |= value
        return [flow] * len(eqn.outvars)

    # What the walks inside an equation need of the whole: see `_walk_inner`.

    def inside(self, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        """The same walk through an inner jaxpr."""
        inner, consts = _jaxpr.closed(jaxpr)
        return self.jaxpr(inner, [frozenset()] * len(consts), operands)

    def join(self, values: Sequence[Any], primitive: str) -> Any:
        """What a value is if it may be any of these."""
        first = values[0]
        if all(value == first for value in values):
            return first
        flow: Flow = frozenset()
        for value in values:
            if is_weight(value):  # a weight in one case only: no operand to follow
                for probe in value:
                    if probe.rows:
                        flow |= self.looked_up(probe)
                    else:
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
