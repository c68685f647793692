"""Leading eigenvectors of a covariance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .._linalg import eigh_top, signs


def leading(
    matrix: Float[Array, "d d"], k: int
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    r"""The `k` largest eigenvalues and their vectors, of a covariance.

    A vector is known to within float32's precision times
    $\lambda_1 / (\lambda_j - \lambda_{j+1})$.

    Args:
        matrix: symmetric and positive semidefinite, shape `(d, d)`.
        k: how many, at most `d`.

    Returns:
        Eigenvalues in descending order, never negative, shape `(k,)`; vectors as
        columns, shape `(d, k)`, the entry of largest size of each positive.

    Example:
        >>> values, vectors = leading(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> values.tolist(), vectors[:, 0].tolist()
        ([3.0, 2.0], [0.0, 1.0, 0.0])
    """
    values, vectors = eigh_top(matrix, k)
    return jnp.maximum(values, 0), upright(vectors)


def upright(vectors: Float[Array, "d k"]) -> Float[Array, "d k"]:
    """The columns with signs such that the entry of largest size is positive."""
    return vectors * signs(vectors)


def random_columns(d: int, k: int, *, seed: int) -> Float[Array, "d k"]:
    """Orthonormal columns, shape `(d, k)`, that follow from the seed."""
    drawn = jax.random.normal(jax.random.key(seed), (d, k), jnp.float32)
    return jnp.linalg.qr(drawn)[0]
