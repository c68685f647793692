"""Products with a matrix and its transpose, and what blocks of vectors need."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Products(NamedTuple):
    """Products of tall blocks with a matrix `(n, m)` and with its transpose.

    Attributes:
        times: `x -> W x`, from `(m, width)` to `(n, width)`.
        turned: `y -> W^T y`, from `(n, width)` to `(m, width)`.
    """

    times: Callable[[jax.Array], jax.Array]
    turned: Callable[[jax.Array], jax.Array]

    def upright(self, shape: tuple[int, ...]) -> "Products":
        """Those of the matrix or of its transpose, whichever is not wide."""
        return self if shape[0] >= shape[1] else Products(self.turned, self.times)


def products(w: jax.Array, size: jax.Array | float = 1.0) -> Products:
    """Products with `w / size`.

    Neither is rewritten into one that transposes `w`, which XLA would do to save the
    transposition of a block, at several times the cost of the product: a barrier
    stands between.
    """

    def times(x):
        return lax.optimization_barrier(dot(w, x)) / size

    def turned(y):
        return lax.optimization_barrier(dot(y.T, w)).T / size

    return Products(times, turned)


def oversampling(k: int) -> int:
    """How many columns more than `k` the blocks have that are filtered to the end."""
    return max(k, 8)


def orthonormal(x: jax.Array) -> jax.Array:
    """Nearly orthonormal columns with the span of `x`'s; zeros where it has fewer.

    Twice makes them orthonormal to the last digit.
    """
    return independent(unit(x))


def unit(x: jax.Array) -> jax.Array:
    """The columns divided by their lengths."""
    return x / positive(jnp.linalg.norm(x, axis=0, keepdims=True))


def independent(x: jax.Array) -> jax.Array:
    """As `orthonormal`, of columns no longer than 1: zeros for what is short beside 1.

    Through eigenvectors of the small Gram matrix, which takes products where a QR
    decomposition is sequential.
    """
    values, vectors = jnp.linalg.eigh(dot(x.T, x))
    least = jnp.finfo(jnp.float32).eps * len(values) * jnp.maximum(values[-1], 1)
    scales = jnp.where(values > least, lax.rsqrt(positive(values)), 0)
    return dot(x, vectors * scales[None])


def sized(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrix with entries up to 1, whose squares are numbers, and its size."""
    size = positive(jnp.abs(w).max())
    return w / size, size


def positive(x: jax.Array) -> jax.Array:
    """`x`, or 1 where it is not positive: a divisor."""
    return jnp.where(x > 0, x, 1)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` in full float32 on every device."""
    return jnp.dot(x, y, precision=lax.Precision.HIGHEST)


def check_count(shape: tuple[int, ...], k: int) -> None:
    """Raises unless a matrix of this shape has `k` singular triplets."""
    if not 1 <= k <= min(shape):
        raise ValueError(
            f"{k} singular triplets are asked of a matrix of shape {shape}, which has "
            f"{min(shape)}."
        )
