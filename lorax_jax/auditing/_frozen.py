"""The frozen step's stand-in for an adapter: one number where A and B would be."""

import dataclasses
from typing import Any

import jax

from ..adapters import Adapted, Fixed, Inner, Term, is_weight
from ..structure import AxisOp, Bilinear, Factor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shift(Term):
    r"""Adds a scalar to whatever the weight makes: $x W + t$.

    Its gradient, the sum of the cotangents of $x W$, needs what an adapter's gradient
    needs of the model (forward, and the way back to this weight) and nothing else. A
    step that trains shifts is the frozen step: what a model costs before any adapter.

    Attributes:
        term: the term it stands for, which knows how the weight is used; its factors
            take part in no computation.
        shift: the scalar.
    """

    term: Term
    shift: Factor

    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        y = inner(x)
        return y + self.shift.array.astype(y.dtype)

    def dense(self, weight: jax.Array) -> jax.Array:
        return weight  # what happens to a built weight is no part of a frozen step

    def looks_up(self, axis: int) -> bool:
        return self.term.looks_up(axis)

    def acts_in(self, use: Any) -> bool:
        return self.term.acts_in(use)

    def apply(self, op: AxisOp) -> "Shift":
        return Shift(self.term.apply(op), self.shift)


def shifted(bound: Any, fixed: dict[str, Fixed], shifts: dict[str, Any]) -> Any:
    """A bound tree with the terms of one adapter, the last bound, as `Shift`s."""
    by_path: dict[str, list[Any]] = {}
    for name, site in fixed.items():
        by_path.setdefault(site.role.path, []).append(shifts[name])

    def change(leaf):
        new = by_path.get(leaf.origin.path) if isinstance(leaf, Adapted) else None
        if not new:
            return leaf
        kept, last = leaf.terms[: -len(new)], leaf.terms[-len(new) :]
        pairs = zip(last, new, strict=True)
        stand_ins = tuple(Shift(term, Factor(shift, ())) for term, shift in pairs)
        return Adapted(leaf.base, (*kept, *stand_ins), leaf.origin)

    return jax.tree.map(change, bound, is_leaf=is_weight)
