"""What structure-only operations do to a weight, axis by axis.

A model may transpose, reshape, slice, pad or rescale a weight before it multiplies
with it. Each such operation is described once, by an *axis operation* on the weight's
shape; whoever holds pieces of the weight (factors of a low-rank term, codes and scales
of a quantized base, a probe that only watches) applies the description to its pieces.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax

# An axis of a piece: the position of a weight's axis, or a name for an axis that the
# weight does not have.
Label = int | str
RANK = "rank"
GROUP = "group"


@dataclasses.dataclass(frozen=True)
class Cast:
    """The weight changes its floating dtype; pieces keep their storage dtype."""

    dtype: jax.typing.DTypeLike


@dataclasses.dataclass(frozen=True)
class Transpose:
    """New axis `j` is old axis `permutation[j]`."""

    permutation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """Old axes that together become new axes, in row-major order."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Axes split or merge within groups; old axes in no group had size 1."""

    groups: tuple[Group, ...]


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """Old axis `i` becomes new axis `positions[i]` of `shape`; the others are new.

    JAX's `vmap` leaves NumPy integers among the positions.
    """

    positions: tuple[SupportsIndex, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Along:
    """A linear map along one axis: a slice, a gather, a pad with zeros.

    Attributes:
        axis: the weight's axis.
        map: `map(array, axis)` transforms one axis of an array and leaves the others.
        fills: whether the map makes entries that are zero whatever the input was. A
            piece that is constant along the axis cannot express that.
        among: whether entries of other weights stand where zeros are filled in.
    """

    axis: int
    map: Callable[[jax.Array, int], jax.Array]
    fills: bool = False
    among: bool = False


@dataclasses.dataclass(frozen=True)
class Pick:
    """A gather: some axes give way to those of the indices into them.

    Attributes:
        axes: the old axes that are indexed, together.
        map: `map(array, at, columns)` gathers along the axes `at` of an array by these
            columns of the indices; the axes of the indices come first in the result.
        ids: the new positions of the axes of the indices.
        kept: pairs (old, new) for the axes that are not indexed.
        ones: pairs (old, new) for indexed axes that leave one of size 1 behind.
        fills: whether an index out of range gives a value that is the same for every
            weight. A piece that is constant along an indexed axis cannot express that.
    """

    axes: tuple[int, ...]
    map: Callable[[jax.Array, Sequence[int], Sequence[int]], jax.Array]
    ids: tuple[int, ...]
    kept: tuple[tuple[int, int], ...]
    ones: tuple[tuple[int, int], ...] = ()
    fills: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """Multiplication (or division) by a scalar or a vector along some axes.

    Attributes:
        map: `map(array, values)`, an elementwise product or quotient.
        values: the multiplier, one axis for each of `axes`; `None` where only types
            are known.
        axes: the weight's axes, ascending; empty for a scalar.
    """

    map: Callable[[jax.Array, Any], jax.Array]
    values: Any
    axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """The weight moves to another layout over a mesh, and its pieces with it.

    Attributes:
        map: `map(array, axes)` lays out an array whose axes run along these axes of
            the weight.
    """

    map: Callable[[jax.Array, tuple[Label, ...]], jax.Array]


AxisOp = Cast | Transpose | Reshape | Broadcast | Along | Pick | Scale | Place


class Unstructured(Exception):
    """An operation mixes axes that a piece cannot hold apart. Caught by the rules."""


def reshape(old: tuple[int, ...], new: tuple[int, ...]) -> Reshape:
    """Groups the axes of a row-major reshape from shape `old` to shape `new`.

    Each group is the smallest run of old axes whose size equals that of a run of new
    axes. Axes of size 1 pair with each other where they meet and belong to no group
    elsewhere, for they hold nothing.

    >>> reshape((2, 12), (2, 3, 4)).groups
    (Group(old=(0,), new=(0,), sizes=(2,)), Group(old=(1,), new=(1, 2), sizes=(3, 4)))
    """
    if math.prod(old) == 0:
        raise Unstructured("an empty weight is reshaped")
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and j < len(new) and old[i] == new[j]:
            groups.append(Group((i,), (j,), (new[j],)))
            i, j = i + 1, j + 1
        elif i < len(old) and old[i] == 1:
            i += 1
        elif j < len(new) and new[j] == 1:
            j += 1
        else:
            start_i, start_j = i, j
            left, right = old[i], new[j]
            i, j = i + 1, j + 1
            while left != right:
                if left < right:
                    left, i = left * old[i], i + 1
                else:
                    right, j = right * new[j], j + 1
            groups.append(
                Group(
                    tuple(k for k in range(start_i, i) if old[k] != 1),
                    tuple(range(start_j, j)),
                    tuple(new[start_j:j]),
                )
            )
    return Reshape(tuple(groups))
