"""`Rows`: an operand as the rows that meet a weight's matrices."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._axes import Label
from ._factor import align
from ._products import OperandLabel


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a weight is multiplied by, its axes labelled.

    `x W` sums over the weight's `in` axes. Whatever else `x` has counts rows, or runs
    in parallel with axes of the weight.

    Attributes:
        array: the values.
        labels: of its axes: the weight's axis where the two share one (of a grouped
            kernel also `GROUP`), else a label of the operand's own.
        member: where rows belong to entries of a weight's axis that the operand does
            not have: which entry each row belongs to, along the axis `counted`. Rows
            with a number past the end belong to none.
        counted: the label of that axis of the operand.
        group: the weight's axis that `member` numbers.
        plain: whether the array is the operand itself, axis by axis.
    """

    array: jax.Array
    labels: tuple[OperandLabel, ...]
    member: jax.Array | None = None
    counted: OperandLabel | None = None
    group: Label | None = None
    plain: bool = True

    def arranged(
        self, parallel: Sequence[OperandLabel], inputs: Sequence[Label]
    ) -> jax.Array:
        """The rows of each matrix: shape `(parallel, rows, d_in)`, each flattened."""
        return self.laid(self.array, parallel, inputs)

    def laid(
        self,
        array: jax.Array,
        parallel: Sequence[OperandLabel],
        inputs: Sequence[Label],
    ) -> jax.Array:
        """Likewise an array with the operand's axes, of size 1 where it is constant."""
        free = [x for x in self.labels if x not in parallel and x not in inputs]
        order = [self.labels.index(x) for x in (*parallel, *free, *inputs)]
        array = jnp.transpose(array, order)
        sizes = array.shape
        ends = len(parallel), len(parallel) + len(free)
        shape = [
            math.prod(sizes[: ends[0]]),
            math.prod(sizes[ends[0] : ends[1]]),
            math.prod(sizes[ends[1] :]),
        ]
        return array.reshape(shape)

    def numbers(
        self, array: jax.Array, axes: Sequence[OperandLabel], inputs: Sequence[Label]
    ) -> jax.Array:
        """Numbers for each row, of an array along `axes`, some of which count rows.

        Returns:
            Shape `(rows, several)`: several where the array runs along axes that the
            operand does not have.
        """
        free = [x for x in self.labels if x not in inputs]
        sizes = [self.array.shape[self.labels.index(x)] for x in free]
        more = [x for x in axes if x not in free]
        array = align(array, axes, (*free, *more))
        behind = array.shape[len(free) :]
        return jnp.broadcast_to(array, (*sizes, *behind)).reshape(math.prod(sizes), -1)
