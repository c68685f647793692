"""Mean and covariance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._base import Principal
from ._eigen import leading
from ._rows import Shifted, at_least_one, between


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MomentsState:
    r"""How many rows there were, their mean, and their products about it.

    Attributes:
        count: $n$, shape `()`.
        mean: $\mu$, shape `(d_in,)`.
        scatter: $\sum_i (x_i - \mu)(x_i - \mu)^\top$, shape `(d_in, d_in)`.

    All are float32, behind the same leading axes: those of a stack.
    """

    count: Any
    mean: Any
    scatter: Any

    def covariance(self) -> Float[Array, "d_in d_in"]:
        """The scatter divided by the number of rows; zeros where there were none."""
        return self.scatter / at_least_one(self.count)

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        """The mean of the rows' products with themselves, not centred."""
        return self.covariance() + jnp.outer(self.mean, self.mean)

    def principal(self, k: int) -> Principal:
        """The `k` principal directions of the covariance, by `leading`."""
        covariance = self.covariance()
        values, vectors = leading(covariance, k)
        return Principal(vectors, values, jnp.trace(covariance), self.count)


@dataclasses.dataclass(frozen=True)
class Moments:
    r"""Mean and covariance of all rows: `d_in * d_in` numbers for each weight.

    $$\mu = \frac1n \sum_i x_i, \qquad
    C = \frac1n \sum_i (x_i - \mu)(x_i - \mu)^\top .$$

    Nothing is forgotten: in exact arithmetic the state does not depend on the order of
    the batches, nor on how rows were spread over them, over devices, and over states
    that were merged.

    Each batch is summed about the mean of those before it, so that a mean far from
    zero costs no precision.

    Example:
        >>> stat, rows = Moments(), jnp.array([[1.0, 0.0], [3.0, 0.0]])
        >>> state = stat.init(2)
        >>> state = stat.update(state, stat.observe(rows, None, stat.context(state)))
        >>> state.mean.tolist(), state.covariance().tolist()
        ([2.0, 0.0], [[1.0, 0.0], [0.0, 0.0]])

    References:
        Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for
        Computing Sample Variances", 1979.
    """

    def init(self, size: int) -> MomentsState:
        """The state before any row."""
        return MomentsState(
            jnp.zeros((), jnp.float32),
            jnp.zeros(size, jnp.float32),
            jnp.zeros((size, size), jnp.float32),
        )

    def context(self, state: MomentsState) -> Float[Array, " d_in"]:
        """The mean: what rows are shifted by."""
        return state.mean

    def observe(
        self,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        context: Float[Array, " d_in"],
    ) -> Shifted:
        """Count, sum and products of the rows less the mean of those before."""
        return Shifted.of(rows, weights, context)

    def update(self, state: MomentsState, sums: Shifted) -> MomentsState:
        """The state with one batch taken in; `sums` are about the state's mean."""
        return _joined(state, sums.count, sums.mean, sums.scatter)

    def merge(self, state: MomentsState, other: MomentsState) -> MomentsState:
        """The state of both."""
        return _joined(state, other.count, other.mean - state.mean, other.scatter)


def _joined(
    state: MomentsState,
    count: Float[Array, ""],
    gap: Float[Array, " d_in"],
    scatter: Float[Array, "d_in d_in"],
) -> MomentsState:
    """With other rows, whose mean is `gap` away."""
    total = state.count + count
    return MomentsState(
        total,
        state.mean + gap * (count / at_least_one(total)),
        state.scatter + scatter + between(state.count, count) * jnp.outer(gap, gap),
    )
