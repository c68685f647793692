"""`concatenate` and `stack`: weights put together at run time."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from ...adapters import Adapted, Origin, Term, join
from ...structure import Along, AxisOp, Broadcast, Unstructured
from .. import _jaxpr
from .._registry import rule
from ._shape import fill


def dense_bases(operands: Sequence[Any]) -> list[Any]:
    """The operands with the dense bases of weights in their places."""
    if any(isinstance(v, Adapted) and v.is_packed for v in operands):
        raise Unstructured("a packed base cannot be put together with other arrays")
    return [v.base if isinstance(v, Adapted) else v for v in operands]


def together(
    rows: Sequence[Sequence[Term]],
    sizes: Sequence[int],
    axis: int,
    combine: Callable[[list[jax.Array]], jax.Array],
    alone: Sequence[Along],
) -> tuple[Term, ...]:
    """The terms of a weight that is made of weights and arrays along one axis.

    Along a batch axis, or one that is new, the terms of all become one term. Along an
    axis that one factor runs along, they stay apart and zeros stand for the others.

    Args:
        rows: the terms of each operand, none for an array.
        sizes: of each operand along `axis`.
        axis: the axis.
        combine: what is done to arrays along it, in front.
        alone: for each operand, what it is in the whole with zeros for the others.
    """
    try:
        return join(rows, axis, sizes, combine)
    except Unstructured as reason:
        try:
            return tuple(
                term.apply(op)
                for row, op in zip(rows, alone, strict=True)
                for term in row
            )
        except Unstructured as apart:
            raise Unstructured(f"{reason}; and kept apart, {apart}") from None


def terms_of(operand: Any, *ops: AxisOp) -> tuple[Term, ...]:
    """The terms of an operand after some operations: none for an array."""
    terms = operand.terms if isinstance(operand, Adapted) else ()
    for op in ops:
        terms = tuple(term.apply(op) for term in terms)
    return terms


def new_axis(shape: tuple[int, ...], axis: int) -> Broadcast:
    """A weight of this `shape` gets a new axis of size 1."""
    kept = tuple(i for i in range(len(shape) + 1) if i != axis)
    return Broadcast(kept, (*shape[:axis], 1, *shape[axis:]))


def _side_by_side(eqn, operands, axis, sizes, *ops):
    base = _jaxpr.bind(eqn, dense_bases(operands))[0]
    rows = [terms_of(operand, *ops) for operand in operands]
    alone, before = [], 0
    for size in sizes:
        config = (before, base.shape[axis] - before - size, 0)
        alone.append(
            Along(axis, functools.partial(fill, config=config), fills=True, among=True)
        )
        before += size
    combine = functools.partial(lax.concatenate, dimension=0)
    terms = together(rows, sizes, axis, combine, alone)
    return [Adapted(base, terms, origin_of(operands))]


def origin_of(operands: Sequence[Any]) -> Origin:
    """The name of the first weight among the operands, for messages."""
    return next(v.origin for v in operands if isinstance(v, Adapted))


@rule("concatenate", policy="passes", note="one term along batch axes, or zeros beside")
def _concatenate(run, eqn, operands):
    del run
    axis = eqn.params["dimension"]
    sizes = [atom.aval.shape[axis] for atom in eqn.invars]
    return _side_by_side(eqn, operands, axis, sizes)


@rule("stack", policy="passes", note="one term along the new axis")
def _stack(run, eqn, operands):
    del run
    axis = eqn.params["axis"]
    widen = new_axis(eqn.invars[0].aval.shape, axis)
    return _side_by_side(eqn, operands, axis, [1] * len(operands), widen)
