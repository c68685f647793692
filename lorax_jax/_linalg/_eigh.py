"""Leading eigenvectors of positive semidefinite matrices."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._filter import invariant, rotated
from ._products import check_count, dot, oversampling, sized

# `eigh_top` goes on until each |G x - t x| is below this share of its own t.
RELATIVE = 1e-4


def eigh_top(
    matrix: Float[Array, "m m"], k: int
) -> tuple[Float[Array, " k"], Float[Array, "m k"]]:
    r"""The `k` largest eigenvalues of a positive semidefinite matrix, and vectors.

    The iteration of `svd_top`, until $\lVert G x - \theta x \rVert$ is below
    `RELATIVE` $\theta$ for each of them, or a few roundings of the largest: spectra of
    activations fall by orders of magnitude. Where the block would be a large part of
    the matrix, it is diagonalized in full. Under `vmap` one after the other.

    Args:
        matrix: symmetric, positive semidefinite.
        k: how many, at most `m`.

    Returns:
        Values, descending, and vectors as columns, float32.

    Example:
        >>> values, vectors = eigh_top(jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
        >>> values.tolist(), abs(vectors[:, 0]).tolist()
        ([3.0, 2.0], [0.0, 1.0, 0.0])
    """
    check_count(matrix.shape, k)
    return _eigh_top(k)(matrix)


@functools.cache
def _eigh_top(k: int):
    @jax.custom_batching.sequential_vmap
    def decompose(matrix):
        m, width = len(matrix), k + oversampling(k)
        matrix, size = sized((matrix + matrix.T) / 2)
        if 3 * width >= m:
            values, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
            return values[::-1][:k] * size, vectors[:, ::-1][:, :k]
        block = invariant(matrix, width, k, RELATIVE)
        ritz = rotated(lambda x: dot(matrix, x), block)
        return ritz.values[:k] * size, ritz.block[:, :k]

    return decompose
