"""`dynamic_update_slice` and `scatter`: a part of an array is written anew."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ...adapters import Adapted
from ...structure import Along, AxisOp, Transpose, Unstructured
from .. import _jaxpr
from .._registry import rule
from ._concatenate import dense_bases, new_axis, origin_of, terms_of, together


@dataclasses.dataclass(frozen=True)
class Write:
    """An update that replaces entries along one axis of a buffer, whole otherwise.

    Attributes:
        axis: the buffer's axis.
        ops: what brings the update's axes into the buffer's order.
        block: how many entries along `axis` are written.
        write: `write(buffer, update, at)` does the same to other arrays along `at`.
    """

    axis: int
    ops: tuple[AxisOp, ...]
    block: int
    write: Callable[[jax.Array, jax.Array, int], jax.Array]


def read(eqn: Any, values: list[Any]) -> Write:
    """What an equation writes; `values` may be `None`s where only types are known.

    Raises:
        Unstructured: if it writes along several axes, or perhaps twice.
    """
    if eqn.primitive.name == "scatter":
        return _scatter(eqn, values[1])
    buffer, update = (atom.aval.shape for atom in eqn.invars[:2])
    cut = [i for i, n in enumerate(buffer) if update[i] != n]
    if len(cut) != 1:
        raise Unstructured("what is written is smaller than the weight on several axes")
    start = values[2 + cut[0]]

    def write(buffer, update, at):
        return lax.dynamic_update_slice_in_dim(buffer, update, start, at)

    return Write(cut[0], (), update[cut[0]], write)


def _scatter(eqn: Any, indices: Any) -> Write:
    buffer, index, update = (atom.aval.shape for atom in eqn.invars)
    numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
    if len(numbers.scatter_dims_to_operand_dims) != 1 or numbers.operand_batching_dims:
        raise Unstructured("what is written lies along several axes of the weight")
    if len(index) > 1 and not eqn.params["unique_indices"]:
        raise Unstructured(
            "the indices may repeat, and the factors could not agree on which entry "
            "stays; promise that they do not: `.at[...].set(..., unique_indices=True)`"
        )
    axis = int(numbers.scatter_dims_to_operand_dims[0])
    inserted = tuple(map(int, numbers.inserted_window_dims))
    windows = tuple(map(int, numbers.update_window_dims))
    entries = inserted == (axis,)  # single entries at the indices, not one slice
    whole = [n for i, n in enumerate(buffer) if i != axis]
    beside = [update[w] for w in windows]
    if not entries and not inserted:
        del beside[axis]
    if whole != beside or len(index) > 2 or (len(index) > 1 and not entries):
        raise Unstructured("what is written is smaller than the weight on several axes")
    ops: tuple[AxisOp, ...] = ()
    if entries and len(index) == 1:
        ops = (new_axis(update, axis),)
    elif entries:
        (ids,) = (i for i in range(len(update)) if i not in windows)
        order = [i for i in range(len(update)) if i != ids]
        ops = (Transpose((*order[:axis], ids, *order[axis:])),)

    def write(buffer, update, at):
        dims = range(buffer.ndim)
        return lax.scatter(
            buffer,
            indices.reshape(-1, 1) if entries else indices,
            update,
            lax.ScatterDimensionNumbers(
                update_window_dims=tuple(i for i in dims if not entries or i != at),
                inserted_window_dims=(at,) if entries else (),
                scatter_dims_to_operand_dims=(at,),
            ),
            indices_are_sorted=eqn.params["indices_are_sorted"],
            unique_indices=eqn.params["unique_indices"],
            mode=mode,
        )

    block = (index[0] if len(index) > 1 else 1) if entries else update[axis]
    return Write(axis, ops, block, write)


@rule(
    "dynamic_update_slice",
    "scatter",
    policy="passes",
    note="along one axis: as `concatenate`",
)
def _write(run, eqn, operands):
    del run
    how = read(eqn, operands)
    axis, write, size = how.axis, how.write, eqn.invars[0].aval.shape[how.axis]
    base = _jaxpr.bind(eqn, dense_bases(operands))[0]
    update = operands[2] if eqn.primitive.name == "scatter" else operands[1]
    rows = [terms_of(operands[0]), terms_of(update, *how.ops)]

    def blank(array, at, size):
        shape = (*array.shape[:at], size, *array.shape[at + 1 :])
        return jnp.zeros(shape, array.dtype)

    def clear(array, at):
        return write(array, blank(array, at, how.block), at)

    def place(array, at):
        return write(blank(array, at, size), array, at)

    def combine(arrays):
        buffer, update = arrays
        return write(buffer, update, 0)

    alone = [
        Along(axis, clear, fills=True, among=True),
        Along(axis, place, fills=True, among=True),
    ]
    terms = together(rows, [size, how.block], axis, combine, alone)
    return [Adapted(base, terms, origin_of(operands))]
