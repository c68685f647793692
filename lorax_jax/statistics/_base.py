"""The protocol that every statistic follows."""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float


class Statistic(Protocol):
    """What is kept of the rows that reach a weight: a frozen, hashable dataclass.

    With $x_1, x_2, \\dots$ the inputs of one weight, a statistic is a state that takes
    them in, a batch at a time:

        state = stat.init(size)
        for batch in batches:
            context = stat.context(state)
            sums = stat.observe(rows, weights, context)  # one use of the weight
            state = stat.update(state, sums)             # one call of the model

    All five methods are pure and traced. States and sums are pytrees of arrays, so that
    a stack of layers is `vmap` over them.

    To add a statistic, write a file with these methods; its state has a method
    `principal(k)` where it knows principal directions, and `second_moment()` where it
    knows $E[x x^\\top]$. A NaN among the rows must show in the state: an adapter that
    would start from it is refused.
    """

    def init(self, size: int) -> Any:
        """The state before any row, for rows of `size` values."""
        ...

    def context(self, state: Any) -> Any:
        """What `observe` needs of the state, as arrays: a mean to shift by, or `()`."""
        ...

    def observe(
        self,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        context: Any,
    ) -> Any:
        """The sums of some rows.

        Sums are float32 arrays that add over the uses of a weight, over devices, and
        over pieces of a batch that were observed with one context.

        Args:
            rows: of any floating dtype.
            weights: 1 for rows that count, 0 for those that do not, whatever they
                hold; `None` counts all.
            context: of the state that the sums will update.
        """
        ...

    def update(self, state: Any, sums: Any) -> Any:
        """The state with one batch taken in."""
        ...

    def merge(self, state: Any, other: Any) -> Any:
        """The state of both, for rows that were gathered apart."""
        ...


class Principal(NamedTuple):
    """The directions along which rows vary most, centred at their mean.

    Attributes:
        vectors: orthonormal columns, shape `(d_in, k)`, the most varying first. The
            entry of largest size of each is positive.
        variances: the variance along each, shape `(k,)`: a mean over rows, not divided
            by one less than their number.
        total: the variance along all directions together, shape `()`. So
            `variances / total` is the explained variance.
        count: how many rows there were, shape `()`.
    """

    vectors: Float[Array, "d_in k"]
    variances: Float[Array, " k"]
    total: Float[Array, ""]
    count: Float[Array, ""]
