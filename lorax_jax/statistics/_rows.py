"""Sums over rows, about a fixed point."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float


def counted(
    rows: Float[Array, "n d_in"], weights: Float[Array, " n"] | None
) -> tuple[Float[Array, "n d_in"], Float[Array, " n"]]:
    """Rows in float32, and their weights; rows of no weight are zeros.

    They may hold anything: attention over padding alone gives NaN, and 0 times NaN is
    NaN.

    Example:
        >>> rows, weights = jnp.array([[1.0], [jnp.nan]]), jnp.array([1.0, 0.0])
        >>> counted(rows, weights)[0].tolist()
        [[1.0], [0.0]]
    """
    rows = rows.astype(jnp.float32)
    if weights is None:
        return rows, jnp.ones(rows.shape[0], jnp.float32)
    return jnp.where(weights[:, None] > 0, rows, 0), weights


def product(x: Array, y: Array) -> Array:
    """`x @ y` in full float32 on every device."""
    return jnp.matmul(x, y, precision=Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shifted:
    r"""Sums of rows about a point $c$, with $y_i = x_i - c$ and weights $w_i$.

    Attributes:
        count: $\sum_i w_i$, shape `()`.
        total: $\sum_i w_i y_i$, shape `(d_in,)`.
        products: $\sum_i w_i y_i y_i^\top$, shape `(d_in, d_in)`.

    Centred products are what is left of `products` without the mean's: with $m$ the
    mean of $y$, $\sum_i w_i y_i y_i^\top - n\,m m^\top$. The difference loses
    $m^2 / \sigma^2$ times the precision of float32, so $c$ should be near the mean: it
    is that of the rows before. The first batch, which has none, is summed about zero.
    """

    count: Any
    total: Any
    products: Any

    @classmethod
    def of(
        cls,
        rows: Float[Array, "n d_in"],
        weights: Float[Array, " n"] | None,
        point: Float[Array, " d_in"],
    ) -> "Shifted":
        """The sums of `rows` about `point`."""
        rows, weights = counted(rows, weights)
        moved = rows - point[None]  # (n, d_in)
        weighted = weights[:, None] * moved
        return cls(weights.sum(), weighted.sum(0), product(weighted.T, moved))

    @property
    def mean(self) -> Float[Array, " d_in"]:
        """The mean of the rows less the point."""
        return self.total / at_least_one(self.count)

    @property
    def scatter(self) -> Float[Array, "d_in d_in"]:
        """The products of the rows less their mean."""
        return self.products - self.count * jnp.outer(self.mean, self.mean)


def at_least_one(count: Float[Array, ""]) -> Float[Array, ""]:
    """A divisor: `count`, or 1 where nothing was counted."""
    return jnp.where(count > 0, count, 1)


def between(one: Float[Array, ""], other: Float[Array, ""]) -> Float[Array, ""]:
    r"""$n_1 n_2 / (n_1 + n_2)$: what the gap of two means adds to a scatter.

    For two sets of rows with means $\mu_1$ and $\mu_2$ and $\delta = \mu_2 - \mu_1$,

    $$S = S_1 + S_2 + \frac{n_1 n_2}{n_1 + n_2}\, \delta \delta^\top .$$
    """
    return one * other / at_least_one(one + other)
