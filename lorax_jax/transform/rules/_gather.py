"""`gather`: the lookup of an embedding, or the choice of a part of a weight."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...adapters import Adapted
from ...structure import Pick, Take, Unstructured
from .. import _jaxpr
from .._registry import rule


def pick(eqn: Any, shape: tuple[int, ...], indices: Any) -> Pick:
    """What a gather does to the axes of a weight of this `shape`.

    Raises:
        Unstructured: if it takes slices that are neither whole nor single entries.
    """
    numbers = eqn.params["dimension_numbers"]
    sizes, mode = eqn.params["slice_sizes"], eqn.params["mode"]
    parallel = tuple(map(int, numbers.operand_batching_dims))
    gone = {*map(int, numbers.collapsed_slice_dims), *parallel}
    clamped = mode != lax.GatherScatterMode.FILL_OR_DROP
    columns = {}  # indexed axis -> its column of the indices
    for column, axis in enumerate(map(int, numbers.start_index_map)):
        if sizes[axis] == 1 and (axis in gone or shape[axis] > 1):
            columns[axis] = column
        elif sizes[axis] != shape[axis] or not clamped:
            raise Unstructured("the indices take partial slices of the weight")
        # else: a whole axis, which can start nowhere but at 0
    for axis, size in enumerate(shape):
        if axis not in columns and axis not in gone and sizes[axis] != size:
            raise Unstructured("the indices take partial slices of the weight")
    offsets = tuple(map(int, numbers.offset_dims))
    remain = (axis for axis in range(len(shape)) if axis not in gone)
    left = tuple(zip(remain, offsets, strict=True))
    out_ndim = len(eqn.outvars[0].aval.shape)
    fill = eqn.params["fill_value"]
    return Pick(
        axes=(*parallel, *columns),
        map=functools.partial(
            _entries,
            indices=indices,
            columns=tuple(columns.values()),
            parallel=tuple(map(int, numbers.start_indices_batching_dims)),
            mode=mode,
        ),
        ids=tuple(i for i in range(out_ndim) if i not in offsets),
        kept=tuple((old, new) for old, new in left if old not in columns),
        ones=tuple((old, new) for old, new in left if old in columns),
        # Entries that are no number make none of whatever is added to them.
        fills=not clamped and fill is not None and not math.isnan(fill),
    )


def _entries(
    array: jax.Array,
    at: Sequence[int],
    which: Sequence[int],
    *,
    indices: jax.Array,
    columns: tuple[int, ...],
    parallel: tuple[int, ...],
    mode: Any,
) -> jax.Array:
    """Entries of `array` along its axes `at`, shape `(*ids, *rest)`.

    The columns to choose from are first the positions along the `parallel` axes of the
    indices, then `columns` of the indices themselves.
    """
    ids = indices.shape[:-1]
    index = jnp.stack(
        [
            lax.broadcasted_iota(indices.dtype, ids, parallel[i])
            if i < len(parallel)
            else indices[..., columns[i - len(parallel)]]
            for i in which
        ],
        axis=-1,
    )
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(ids), len(ids) + array.ndim - len(at))),
        collapsed_slice_dims=tuple(sorted(at)),
        start_index_map=tuple(at),
    )
    sizes = tuple(1 if i in at else n for i, n in enumerate(array.shape))
    # Where the model's own gather fills, zeros are added to what it fills with.
    return lax.gather(array, index, numbers, sizes, mode=mode, fill_value=0)


class Lookup(NamedTuple):
    """A gather that looks rows up.

    Attributes:
        take: what it does, with indices of one column.
        column: which column of the gather's own indices that is. The others, if any,
            are those of whole axes, as `vmap` of a slice makes them.
        ones: axes of the result that hold one entry of the looked-up axis each.
    """

    take: Take
    column: int
    ones: tuple[int, ...]


def lookup(eqn: Any, op: Pick) -> Lookup | None:
    """The gather as a lookup of rows, or `None` if it indexes no single axis."""
    numbers = eqn.params["dimension_numbers"]
    if len(op.axes) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = op.axes
    ones = tuple(new for _, new in op.ones)
    places = {new: old for old, new in op.kept}
    ids = iter(range(len(op.ids)))
    labels = tuple(
        places[i] if i in places else ("x", next(ids))
        for i in range(len(eqn.outvars[0].aval.shape))
        if i not in ones
    )
    take = Take(
        axis=axis,
        labels=labels,
        mode=eqn.params["mode"],
        sorted=eqn.params["indices_are_sorted"],
        unique=eqn.params["unique_indices"],
    )
    return Lookup(take, numbers.start_index_map.index(axis), ones)


@rule("gather", policy="native", note="`W[ids] + s A[ids] B`, or a part of the weight")
def _gather(run, eqn, values):
    weight, indices = values
    if isinstance(indices, Adapted):
        raise Unstructured("a weight is used as an index")
    op = pick(eqn, weight.shape, indices)

    def entries(ids):
        return _jaxpr.bind(eqn, [weight.base, ids])[0]

    rows = lookup(eqn, op)
    if rows is not None and weight.looks_up(rows.take.axis):
        return [_looked_up(weight, indices, rows, entries)]
    return [weight.apply(None if weight.is_packed else entries(indices), op)]


def _looked_up(
    weight: Adapted, indices: jax.Array, rows: Lookup, entries: Callable
) -> jax.Array:
    count = indices.shape[-1]
    columns = jnp.split(indices, count, axis=-1) if count > 1 else [indices]

    def base(ids: jax.Array) -> jax.Array:
        whole = [ids if i == rows.column else x for i, x in enumerate(columns)]
        found = entries(jnp.concatenate(whole, -1) if len(whole) > 1 else ids)
        return lax.squeeze(found, rows.ones) if rows.ones else found

    found = weight.consume(columns[rows.column], rows.take, base)
    return lax.expand_dims(found, rows.ones) if rows.ones else found
