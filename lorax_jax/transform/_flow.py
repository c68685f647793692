"""Marks that travel along a jaxpr: what every value is computed from.

Shapes do not say what a value is; where it comes from does. The caller marks the
inputs, and every value carries the marks of all that it was computed from, through
inner jaxprs and around loops until nothing changes any more.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from . import _jaxpr

Marks = frozenset[Hashable]
NONE: Marks = frozenset()


@dataclasses.dataclass(frozen=True)
class Visit:
    """One equation without a body, with the marks of its operands and results.

    Attributes:
        eqn: the equation.
        operands: the marks of each operand.
        results: the marks of each result.
        source: the line of the user's program, its own or that of an enclosing call.
        scopes: the named scopes around it, those of enclosing calls included.
    """

    eqn: Any
    operands: tuple[Marks, ...]
    results: tuple[Marks, ...]
    source: str
    scopes: str

    @property
    def primitive(self) -> str:
        """The name of the operation."""
        return self.eqn.primitive.name

    def made(self) -> list[tuple[Any, Marks]]:
        """The type and the marks of each result."""
        kinds = [var.aval for var in self.eqn.outvars]
        return list(zip(kinds, self.results, strict=True))


class Flow:
    """Follows marks through a jaxpr.

    Args:
        const: the marks of a captured constant.
        emit: more marks for the results of an equation, given all else about it; they
            may depend on the marks of operands, but only ever add.

    Attributes:
        visits: the equations in program order, those in bodies included; a loop's body
            once, with the marks that it has in the end.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jnp.ones(2)
        >>> jaxpr = jax.make_jaxpr(lambda a, b, c: (a * b, jnp.sin(c)))(x, x, x)
        >>> flow = Flow()
        >>> [sorted(m) for m in flow.run(jaxpr, [{"a"}, {"b"}, {"c"}])]
        [['a', 'b'], ['c']]
        >>> [visit.primitive for visit in flow.visits]
        ['mul', 'sin']
    """

    def __init__(
        self,
        const: Callable[[Any], Marks] = lambda value: NONE,
        emit: Callable[[Visit], Marks] = lambda visit: NONE,
    ):
        self.const = const
        self.emit = emit
        self.visits: list[Visit] = []
        # What encloses the equation at hand.
        self._source = ""
        self._scopes = ""

    def run(self, jaxpr: Any, inputs: Sequence[Any]) -> list[Marks]:
        """Follows the marks of `inputs`; returns those of the results."""
        inner, consts = _jaxpr.closed(jaxpr)
        env: dict[Any, Marks] = {}
        env.update(zip(inner.constvars, map(self.const, consts), strict=True))
        env.update(zip(inner.invars, map(frozenset, inputs), strict=True))

        def read(atom):
            return NONE if _jaxpr.is_literal(atom) else env[atom]

        for eqn in inner.eqns:
            results = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in inner.outvars]

    def _equation(self, eqn: Any, operands: list[Marks]) -> Sequence[Marks]:
        before = self._source, self._scopes
        self._source = _jaxpr.source(eqn) or self._source
        self._scopes = f"{self._scopes}/{_jaxpr.scopes(eqn)}"
        try:
            body = _BODIES.get(eqn.primitive.name, Flow._call)
            results = body(self, eqn, operands)
            return self._visit(eqn, operands) if results is None else results
        finally:
            self._source, self._scopes = before

    def _visit(self, eqn: Any, operands: list[Marks]) -> tuple[Marks, ...]:
        name = eqn.primitive.name
        if name in _ONE_TO_ONE:
            results = tuple(operands)
        else:
            marks = NONE.union(*_values(eqn, operands))
            results = (marks,) * len(eqn.outvars)
        place = self._source or "(unknown line)", self._scopes
        visit = Visit(eqn, tuple(operands), results, *place)
        more = self.emit(visit)
        if more:
            results = tuple(marks | more for marks in results)
            visit = dataclasses.replace(visit, results=results)
        self.visits.append(visit)
        return results

    # Bodies. Each gives the results' marks, or `None` where there is none to look into.

    def _call(self, eqn: Any, operands: list[Marks]) -> list[Marks] | None:
        for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            body = eqn.params.get(name)
            if body is None:
                continue
            inner = _jaxpr.closed(body)[0]
            counts = len(inner.invars), len(inner.outvars)
            if counts == (len(eqn.invars), len(eqn.outvars)):
                return self.run(body, operands)
        return None  # a kernel, say, whose body is about references to memory

    def _cond(self, eqn: Any, operands: list[Marks]) -> list[Marks]:
        branches = [self.run(b, operands[1:]) for b in eqn.params["branches"]]
        return [NONE.union(*marks) for marks in zip(*branches, strict=True)]

    def _while(self, eqn: Any, operands: list[Marks]) -> list[Marks]:
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = operands[n : n + m], operands[n + m :]
        carry = self._repeat(eqn.params["body_jaxpr"], consts, carry, [])
        self.run(eqn.params["cond_jaxpr"], [*operands[:n], *carry])
        return carry

    def _scan(self, eqn: Any, operands: list[Marks]) -> list[Marks]:
        n, m = _jaxpr.scan_counts(eqn)
        consts, carry, xs = operands[:n], operands[n : n + m], operands[n + m :]
        return self._repeat(eqn.params["jaxpr"], consts, carry, xs)

    def _repeat(self, jaxpr: Any, consts: list, carry: list, xs: list) -> list[Marks]:
        """A loop's body, until what flows around the loop stays the same.

        The results hold the carry that went in as well: a loop may not turn at all.
        """
        while True:
            seen = len(self.visits)
            outs = self.run(jaxpr, [*consts, *carry, *xs])
            joined = [x | y for x, y in zip(carry, outs, strict=False)]
            if joined == carry:
                return [*joined, *outs[len(carry) :]]
            del self.visits[seen:]  # of a turn that knew too little
            carry = joined


_BODIES = {"cond": Flow._cond, "while": Flow._while, "scan": Flow._scan}

# Primitives that hand each operand on by itself.
_ONE_TO_ONE = ("optimization_barrier", "device_put")


def _values(eqn: Any, operands: list[Marks]) -> list[Marks]:
    """The operands whose values are in the result, not those that only say where.

    An index that picks one layer or one expert leaves a weight a weight. Many indices
    at once are a lookup: its result lies along them and counts as computed from them.
    """
    name = eqn.primitive.name
    if name == "dynamic_slice":
        return operands[:1]
    if name == "dynamic_update_slice":
        return operands[:2]
    if name == "select_n":
        return operands[1:]
    if name == "gather" and len(eqn.invars[1].aval.shape) == 1:
        return operands[:1]
    return operands
