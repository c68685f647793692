"""Leading eigenvectors of a covariance."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._rows import product


def leading(
    matrix: Float[Array, "d d"], k: int, *, steps: int | None = None
) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    r"""The `k` largest eigenvalues and their vectors, of a covariance.

    With `steps`, and where `2 k < d`, from subspace iteration: a fixed random block of
    `2 k` columns is multiplied by the matrix and orthonormalized, `steps` times, and
    then diagonalized within its span. What it misses of the $j$-th direction falls as
    $(\lambda_{2k+1} / \lambda_j)^{steps}$. Otherwise all of them are computed.

    In either case a vector is known to within float32's precision times
    $\lambda_1 / (\lambda_j - \lambda_{j+1})$.

    Args:
        matrix: symmetric and positive semidefinite, shape `(d, d)`.
        k: how many, at most `d`.
        steps: of subspace iteration; `None` computes all eigenvectors.

    Returns:
        Eigenvalues in descending order, never negative, shape `(k,)`; vectors as
        columns, shape `(d, k)`, the entry of largest size of each positive.

    Example:
        >>> values, vectors = leading(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> values.tolist(), vectors[:, 0].tolist()
        ([3.0, 2.0], [0.0, 1.0, 0.0])
    """
    d = len(matrix)
    if steps is None or 2 * k >= d:
        values, vectors = _eigh(matrix)
    else:
        block = random_columns(d, 2 * k, seed=42)
        for _ in range(steps):
            block = jnp.linalg.qr(product(matrix, block))[0]  # (d, 2 k)
        values, within = _eigh(product(block.T, product(matrix, block)))
        vectors = product(block, within)
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    return jnp.maximum(values, 0), upright(vectors)


def upright(vectors: Float[Array, "d k"]) -> Float[Array, "d k"]:
    """The columns with signs such that the entry of largest size is positive."""
    at = jnp.abs(vectors).argmax(0)
    largest = jnp.take_along_axis(vectors, at[None], axis=0)  # (1, k)
    return vectors * jnp.where(largest < 0, -1.0, 1.0)


def random_columns(d: int, k: int, *, seed: int) -> Float[Array, "d k"]:
    """Orthonormal columns, shape `(d, k)`, that follow from the seed."""
    drawn = jax.random.normal(jax.random.key(seed), (d, k), jnp.float32)
    return jnp.linalg.qr(drawn)[0]


def _eigh(matrix: Array) -> tuple[Array, Array]:
    """Ascending, of the symmetric part."""
    return jnp.linalg.eigh((matrix + matrix.T) / 2, symmetrize_input=False)
