"""The uncentred second moment, as CorDA takes it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._rows import at_least_one, counted, product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SecondMomentState:
    """The products of all rows with themselves. `observe` gives one of these as sums.

    Attributes:
        calls: how often the weight was used, shape `()`.
        products: the sum, shape `(d_in, d_in)`.

    Both are float32, behind the same leading axes: those of a stack.
    """

    calls: Any
    products: Any

    def second_moment(self) -> Float[Array, "d_in d_in"]:
        """The products divided by the number of uses."""
        return self.products / at_least_one(self.calls)


@dataclasses.dataclass(frozen=True)
class SecondMoment:
    r"""CorDA's covariance: a sum over the rows of a use, a mean over uses.

    $$C = \frac1c \sum_{j=1}^{c} \tilde X_j^\top \tilde X_j , \qquad
    \tilde X_j = X_j / \left| \max X_j \right| ,$$

    with $X_j$ the rows of one use of the weight. It is the size of the *signed* maximum
    that they are divided by, as in PEFT, and not the largest size: where negative
    entries are the largest, rows stay above 1. CorDA's product $A_0 B_0$ does not
    depend on the size of $C$, and uses with larger activations weigh no more than
    others. `Moments` divides by no maximum: there they do.

    A use that no row of weight reaches is not counted. Rows whose maximum is 0 are left
    as they are; PEFT divides by it.

    A use is one call of `observe`. Where the rows of a use are observed in pieces, in
    a `shard_map`, each piece counts as a use, with a maximum of its own;
    `normalize=False` does without maxima, and $C$ is then the same but for its size.

    Attributes:
        normalize: divide by the maximum.

    Example:
        >>> stat = SecondMoment()
        >>> sums = stat.observe(jnp.array([[2.0, -8.0]]), None, ())
        >>> stat.update(stat.init(2), sums).second_moment().tolist()
        [[1.0, -4.0], [-4.0, 16.0]]

    References:
        Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language
        Models", 2024. https://arxiv.org/abs/2406.05223
    """

    normalize: bool = True

    def init(self, size: int) -> SecondMomentState:
        """The state before any row."""
        return SecondMomentState(
            jnp.zeros((), jnp.float32), jnp.zeros((size, size), jnp.float32)
        )

    def context(self, state: SecondMomentState) -> tuple[()]:
        """Nothing is needed."""
        del state
        return ()

    def observe(
        self,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        context: tuple[()] = (),
    ) -> SecondMomentState:
        """The products of the rows of one use."""
        del context
        rows, weights = counted(rows, weights)
        used = (weights > 0).any()
        if self.normalize:
            seen = jnp.where(weights[:, None] > 0, rows, -jnp.inf)
            largest = jnp.abs(seen.max(initial=-jnp.inf))
            # Rows of zeros have no size to divide by, and stay zeros.
            rows = rows / jnp.where(used & (largest > 0), largest, 1)
        products = product((weights[:, None] * rows).T, rows)
        return SecondMomentState(used.astype(jnp.float32), products)

    def update(
        self, state: SecondMomentState, sums: SecondMomentState
    ) -> SecondMomentState:
        """The state with one batch taken in."""
        return self.merge(state, sums)

    def merge(
        self, state: SecondMomentState, other: SecondMomentState
    ) -> SecondMomentState:
        """The state of both."""
        return SecondMomentState(
            state.calls + other.calls, state.products + other.products
        )
