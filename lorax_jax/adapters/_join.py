"""The terms of several weights as the terms of one that is made of them."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..structure import RANK, Factor, Label, Unstructured
from ._base import Term
from ._dora import Dora
from ._lora import LowRank

# Puts arrays together along their leading axis: side by side, or one into another.
Combine = Callable[[list[jax.Array]], jax.Array]
Row = Sequence[Term | None]


def join(
    terms: Sequence[Sequence[Term]], axis: int, sizes: Sequence[int], combine: Combine
) -> tuple[Term, ...]:
    """The terms of a weight that is put together from others along one axis.

    Layers that a model stacks before it scans over them are the usual case. Padding
    every term with zeros where the other weights stand would give as many terms as
    there are weights, each as large as the stack; here the n-th terms of all weights
    make one.

    Args:
        terms: those of each weight, in order; none for a plain array.
        axis: along which the weights are put together. Either all factors of a term run
            along it (a batch axis) or none does (a new axis).
        sizes: of each weight along `axis`.
        combine: what is done to the arrays along it.

    Raises:
        Unstructured: if the terms differ in more than values and rank.
    """
    rows = itertools.zip_longest(*terms)
    return tuple(joins(_first(row), row, axis, sizes, combine) for row in rows)


@functools.singledispatch
def joins(
    first: Term, row: Row, axis: int, sizes: Sequence[int], combine: Combine
) -> Term:
    """One term in place of a row of them, `None` where a weight has none."""
    raise Unstructured(f"{type(first).__name__} cannot be joined along an axis")


@joins.register
def _low_rank(
    first: LowRank, row: Row, axis: int, sizes: Sequence[int], combine: Combine
) -> LowRank:
    terms: list[LowRank] = [t for t in row if isinstance(t, LowRank)]
    if len(terms) < sum(term is not None for term in row):
        raise Unstructured("adapters of different kinds are joined along an axis")
    if any(term.a.holds(axis) != term.b.holds(axis) for term in terms):
        raise Unstructured("they are joined along an axis that one factor runs along")
    for what, values in {
        "factors that run along different axes": [
            (frozenset(t.a.axes) - {axis}, frozenset(t.b.axes) - {axis}) for t in terms
        ],
        "dropout on some only": [t.key is None for t in terms],
        "different uses of a tied weight": [(t.lookup, t.use) for t in terms],
    }.items():
        if len(set(values)) > 1:
            raise Unstructured(f"the weights that are joined have {what}")
    rank = max(term.a.array.shape[term.a.axes.index(RANK)] for term in terms)

    def joined(name: str, missing: Any = None) -> Factor:
        present = [None if t is None else getattr(t, name) for t in row]
        return together(present, axis, sizes, combine, rank, missing)

    dropped = first.key is not None
    return LowRank(
        a=joined("a"),
        b=joined("b"),
        scale=joined("scale"),
        bias=joined("bias") if any(term.bias for term in terms) else None,
        # A weight without a term adds nothing, so any key will do for it.
        key=joined("key", first.key) if dropped else None,
        dropout=joined("dropout", first.dropout) if dropped else None,
        lookup=first.lookup,
        use=first.use,
    )


@joins.register
def _dora(
    first: Dora, row: Row, axis: int, sizes: Sequence[int], combine: Combine
) -> Dora:
    terms = [t for t in row if isinstance(t, Dora)]
    if len(terms) < sum(term is not None for term in row):
        raise Unstructured("adapters of different kinds are joined along an axis")
    lows = [term.low if isinstance(term, Dora) else None for term in row]
    # A weight without magnitudes stays as it is: its gain is 1.
    one = Factor(jnp.ones((), first.gain.array.dtype), ())
    gains = [term.gain if isinstance(term, Dora) else None for term in row]
    low = _low_rank(first.low, lows, axis, sizes, combine)
    return Dora(
        low=low,  # pyright: ignore  (a singledispatch method forgets its result)
        gain=together(gains, axis, sizes, combine, missing=one),
    )


def together(
    factors: Sequence[Factor | None],
    axis: int,
    sizes: Sequence[int],
    combine: Combine,
    rank: int = 0,
    missing: Factor | None = None,
) -> Factor:
    """One factor in place of several, with `axis` in front."""
    given = [missing if factor is None else factor for factor in factors]
    known: dict[Label, int] = {}
    for factor in filter(None, given):
        for label, n in zip(factor.axes, factor.array.shape, strict=True):
            known[label] = max(n, known.get(label, n))
    known |= {RANK: rank} if RANK in known else {}
    axes = (axis, *(label for label in known if label != axis))
    some, *others = {factor.array.dtype for factor in filter(None, given)}
    dtype = functools.reduce(jnp.promote_types, others, some)
    arrays = []
    for factor, size in zip(given, sizes, strict=True):
        shape = (size, *(known[label] for label in axes[1:]))
        if factor is None:
            arrays.append(jnp.zeros(shape, dtype))
            continue
        array = factor.aligned(axes)
        if factor.holds(RANK):
            at = axes.index(RANK)
            short = rank - array.shape[at]
            array = jnp.pad(array, [(0, short * (i == at)) for i in range(array.ndim)])
        if array.dtype != dtype:
            array = array.astype(dtype)
        arrays.append(jnp.broadcast_to(array, shape))
    return Factor(combine(arrays), axes)


def _first(row: Row) -> Term:
    return next(term for term in row if term is not None)
