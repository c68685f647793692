"""`Bilinear`: what every operation that consumes a weight has in common."""

import abc
from typing import Any, ClassVar, Literal

import jax

from ._axes import Unstructured
from ._factor import Factor
from ._products import OperandLabel
from ._rows import Rows

AxisRole = Literal["in", "out", "batch"]
Use = Literal["lookup", "head"]


class Bilinear(abc.ABC):
    r"""An operation on an operand $x$ and a weight $W$ that is linear in the weight.

    Matrix products, convolutions, ragged products and lookups are such operations, and
    low-rank terms live on what they have in common:

    $$\mathrm{op}(x, W + s A B) = \mathrm{op}(x, W) + \mathrm{op}(x, s A B),$$

    where the second part goes through the rank: `x` meets the factor that holds the
    summed axes first.

    To add an operation: subclass this as a frozen dataclass; implement the methods;
    register how it is read off an equation in `transform/rules`; list its layouts in
    `tests/exam/layouts.py`.
    """

    # The use of a tied weight that this operation is.
    use: ClassVar[Use] = "head"
    # Whether `x` selects entries of the weight instead of multiplying it.
    selects: ClassVar[bool] = False
    # In how many runs the outputs see inputs of their own; see `_groups`.
    groups: int = 1

    @property
    @abc.abstractmethod
    def x_labels(self) -> tuple[OperandLabel, ...]:
        """Labels of the operand: the weight's axis where shared, else its own."""

    @property
    @abc.abstractmethod
    def out_labels(self) -> tuple[OperandLabel, ...]:
        """Labels of the result: the weight's axis where it has one, else `x`'s."""

    @property
    @abc.abstractmethod
    def roles(self) -> dict[int, AxisRole]:
        """What the weight's axes are; those that are not named are `"out"`."""

    @abc.abstractmethod
    def dense(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """`op(x, W)` for a dense weight."""

    def per_output(self, factor: Factor) -> jax.Array | None:
        """Values along the outputs, laid out to multiply the result.

        `None` where the factor runs along an axis that the result does not have.
        """
        if not set(factor.axes) <= set(self.out_labels):
            return None
        return factor.aligned(self.out_labels)

    def as_rows(self, x: jax.Array) -> Rows:
        """The operand as rows that are multiplied by the weight's matrices.

        Raises:
            Unstructured: if it multiplies none.
        """
        return Rows(x, self.x_labels)

    @abc.abstractmethod
    def low_rank(self, x: jax.Array, a: Factor, b: Factor, like: Any) -> jax.Array:
        """`op(x, A B)` through the rank.

        Args:
            x: the operand.
            a: one factor, in its storage dtype; axes as in `LowRank`.
            b: the other, scaled.
            like: gives shape and dtype of the result.
        """


def down_and_up(a: Factor, b: Factor, summed: set[int]) -> tuple[Factor, Factor]:
    """Sorts two factors: the one that holds the summed axes, then the other.

    A transposed use of a weight sums over what B runs along, so B comes first there.

    Raises:
        Unstructured: if each factor holds some of them.
    """
    for first, second in ((a, b), (b, a)):
        held = {axis for axis in second.axes if axis in summed}
        if not held:
            return first, second
    raise Unstructured("both factors run along an axis that is summed over")
