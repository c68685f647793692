"""`gather`: the lookup of an embedding, or the choice of a part of a weight."""

import functools
import math

import jax.numpy as jnp
from jax.lax import GatherScatterMode

from ...adapters import Adapted
from ...structure import Along, Group, Reshape, Take, Unstructured
from .. import _jaxpr
from .._registry import rule


def read(eqn, shape: tuple[int, ...]) -> Take:
    """A gather along one axis of a weight.

    Raises:
        Unstructured: if it indexes several axes, or takes partial slices.
    """
    numbers = eqn.params["dimension_numbers"]
    sizes = eqn.params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        raise Unstructured("the indices run over several axes of the weight at once")
    axis = numbers.start_index_map[0]
    whole = all(sizes[i] == shape[i] for i in range(len(shape)) if i != axis)
    if not whole or tuple(numbers.collapsed_slice_dims) != (axis,):
        raise Unstructured("the indices take partial slices of the weight")
    out_ndim = len(eqn.outvars[0].aval.shape)
    rest = iter(i for i in range(len(shape)) if i != axis)
    ids = iter(range(out_ndim))
    labels = tuple(
        next(rest) if i in numbers.offset_dims else ("x", next(ids))
        for i in range(out_ndim)
    )
    return Take(
        axis=axis,
        labels=labels,
        mode=eqn.params["mode"],
        sorted=eqn.params["indices_are_sorted"],
        unique=eqn.params["unique_indices"],
    )


@rule("gather", policy="native", note="along one axis: `W[ids] + s A[ids] B`")
def _gather(run, eqn, values):
    weight, indices = values
    if isinstance(indices, Adapted):
        raise Unstructured("a weight is used as an index")
    rows = read(eqn, weight.shape)

    def lookup(ids):
        return _jaxpr.bind(eqn, [weight.base, ids])[0]

    if weight.looks_up(rows.axis):
        return [weight.consume(indices, rows, lookup)]
    base = None if weight.is_packed else lookup(indices)
    # By default NaN is filled in, which nothing that is added can change.
    fill = eqn.params["fill_value"]
    fills = rows.mode == GatherScatterMode.FILL_OR_DROP
    fills = fills and not (fill is None or math.isnan(fill))
    map = functools.partial(_rows, rows=rows, indices=indices)
    choose = Along(rows.axis, map, fills)
    ids = jnp.ndim(indices) - 1
    if ids == 0:  # one index, and the axis is gone
        kept = [i for i in range(weight.ndim) if i != rows.axis]
        groups = (
            Group((old,), (new,), (weight.shape[old],)) for new, old in enumerate(kept)
        )
        return [weight.apply(base, choose, Reshape(tuple(groups)))]
    if ids > 1 or rows.out_labels.index(("x", 0)) != rows.axis:
        raise Unstructured("the indices choose parts of the weight into several axes")
    return [weight.apply(base, choose)]


def _rows(array, axis, *, rows: Take, indices):
    if indices.ndim == 1:
        return jnp.expand_dims(rows.rows(indices, array, axis), axis)
    return jnp.moveaxis(rows.rows(indices, array, axis), 0, axis)
