"""`Term`: what every kind of adapter answers when a rule asks for its contribution."""

import abc
from collections.abc import Callable

import jax

from ..structure import (
    Along,
    AxisOp,
    Bilinear,
    Factor,
    Pick,
    Scale,
    Unstructured,
    Use,
    is_factor,
)

# What the weight did before a term came: `x -> op(x, W)`.
Inner = Callable[[jax.Array], jax.Array]


class Term(abc.ABC):
    """One adapter's part of one adapted weight: a pytree of `Factor`s.

    With $W$ the weight so far and $t$ the term, the adapted weight is $t(W)$; for LoRA,
    $W + s A B$. No method but `dense` may build an array of the weight's shape.

    To add a kind of adapter:

    1. Subclass `Term` as a frozen dataclass registered as a pytree, its arrays
       `Factor`s (so that transposing, slicing or scanning the weight reaches them).
    2. Implement `act` and `dense`; override `rescale` if the kind commutes with
       multiplying the weight by a vector; override `apply` for whatever else the
       default would get wrong.
    3. Register with `kind` how it is built from an adapter's arrays.
    4. List it in `tests/exam/kinds.py`: the exam does the rest.
    """

    use: Use | None = None

    @abc.abstractmethod
    def act(self, x: jax.Array, op: Bilinear, inner: Inner) -> jax.Array:
        """`op(x, t(W))`.

        Args:
            x: the other operand.
            op: the operation that consumes the weight.
            inner: gives `op(x', W)` for an operand `x'`, with the terms before this
                one; an array with axes `op.out_labels`.

        Returns:
            An array of the shape and dtype that `inner` gives.
        """

    @abc.abstractmethod
    def dense(self, weight: jax.Array) -> jax.Array:
        """`t(weight)` as a dense array, for merging and on request only."""

    @abc.abstractmethod
    def looks_up(self, axis: int) -> bool:
        """Whether a gather along the weight's `axis` is the lookup it adapts.

        Otherwise such a gather only selects a part of the weight, as when a model
        picks one layer of a stack.
        """

    def acts_in(self, use: Use) -> bool:
        """Whether the term takes part in this use of the weight (see `tie`)."""
        return self.use is None or self.use == use

    def rescale(self, op: Scale) -> "Term":
        """The term of a weight multiplied by a scalar or vector."""
        raise Unstructured(f"{type(self).__name__} does not commute with a product")

    def apply(self, op: AxisOp) -> "Term":
        """The term of the weight that `op` makes of this term's weight.

        Raises:
            Unstructured: where the result has no such form.
        """
        if isinstance(op, Scale):
            return self.rescale(op)
        filled: tuple[int, ...] = ()
        if isinstance(op, Along | Pick) and op.fills:
            filled = (op.axis,) if isinstance(op, Along) else op.axes
        for axis in filled:
            if not any(factor.holds(axis) for factor in self.factors()):
                raise Unstructured("a padded axis is one that no factor runs along")
        return jax.tree.map(lambda f: f.apply(op), self, is_leaf=is_factor)

    def factors(self) -> list[Factor]:
        """All factors of the term, in order."""
        return jax.tree.leaves(self, is_leaf=is_factor)
