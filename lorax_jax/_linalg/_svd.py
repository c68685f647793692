"""Truncated singular value decompositions, made of matrix products.

A full decomposition of a weight costs seconds, nearly all of them in LAPACK's
sequential parts. The few leading triplets need none of that: large products with a thin
block, and decompositions no wider than the block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ._filter import invariant
from ._products import (
    Products,
    check_count,
    dot,
    orthonormal,
    oversampling,
    positive,
    products,
    sized,
)
from ._signs import signs

# Where |W^T u - s v| is then above this share of the largest singular value, the matrix
# is decomposed in full.
ACCEPTED = 3e-5


class Svd(NamedTuple):
    r"""Leading singular triplets, $W \approx U \operatorname{diag}(S) V^\top$.

    Attributes:
        u: left vectors, shape `(n, k)`, orthonormal columns.
        s: singular values, descending, shape `(k,)`.
        v: right vectors, shape `(m, k)`. The largest entry of each is positive, which
            fixes the signs of both.
    """

    u: Float[Array, "n k"]
    s: Float[Array, " k"]
    v: Float[Array, "m k"]


def svd_top(w: Float[Array, "n m"], k: int) -> Svd:
    r"""The `k` leading singular triplets, as exact as float32 has them.

    Subspace iteration with Chebyshev polynomials (Zhou and Saad, 2007) on the Gram
    matrix $G$ of the smaller side, a block wider than `k`:

    1. $X \leftarrow p(G) X$, where $p$ is small on $[0, \theta]$ and grows fastest
       above it; $\theta$ is the smallest Ritz value of the block.
    2. $X$ is orthonormalized, and rotated to the eigenvectors of $X^\top G X$.

    until $\lVert G x - \theta x \rVert$ is below `TOLERANCE` times the largest Ritz
    value for the first `k`. At last the triplets are taken from $W X$ itself, since
    squaring costs digits. Where the block would be a large part of the matrix, the
    eigenvectors of $G$ take the iteration's place. Where $\lVert W^\top u - s v \rVert$
    then exceeds `ACCEPTED` $s_1$, or `w` has a rank below `k`, it is decomposed in
    full.

    The start of the block is fixed, so a matrix has one answer. Under `vmap` matrices
    are taken one after the other, each for as many rounds as it needs, and only one is
    held in float32 at a time.

    Args:
        w: the matrix, any floating dtype; computed in float32 at the highest precision.
        k: how many, at most `min(n, m)`.

    Returns:
        `Svd(u, s, v)`, float32.

    Raises:
        ValueError: if `k` exceeds `min(n, m)`.

    Example:
        >>> u, s, v = svd_top(jnp.diag(jnp.array([3.0, 1.0, 2.0])), 2)
        >>> s.round(4).tolist(), u.shape, v.shape
        ([3.0, 2.0], (3, 2), (3, 2))

    References:
        Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using
        Chebyshev-filtered subspace iteration", 2006.
    """
    check_count(w.shape, k)
    return _svd_top(k)(w)


def residual(w: Float[Array, "n m"], found: Svd) -> Float[Array, ""]:
    r"""How far triplets are from being singular: $\max(\lVert W v - s u \rVert,
    \lVert W^\top u - s v \rVert) / s_1$.

    Zero for an exact decomposition, a few roundings for a full one in float32. It
    bounds the distance of each `s` to a singular value, in shares of the largest.

    >>> w = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
    >>> bool(residual(w, svd_top(w, 2)) < 1e-6)
    True
    """
    w = w.astype(jnp.float32)
    times, turned = products(w)
    right = times(found.v) - found.u * found.s[None]
    left = turned(found.u) - found.v * found.s[None]
    worst = jnp.maximum(
        jnp.linalg.norm(right, axis=0).max(), jnp.linalg.norm(left, axis=0).max()
    )
    return worst / positive(found.s[0])


@functools.cache
def _svd_top(k: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w):
        w, size = sized(w.astype(jnp.float32))
        small, width = min(w.shape), k + oversampling(k)
        if 4 * width >= 3 * small:
            return _times(_full(w, k), size)
        gram = dot(w.T, w) if w.shape[1] == small else dot(w, w.T)
        if 3 * width >= small:
            block = jnp.linalg.eigh(gram)[1][:, small - width :]
        else:
            block = invariant(gram, width, k)
        found = within(products(w), w.shape, block, k)
        exact = (residual(w, found) <= ACCEPTED) & complete(found)
        found = lax.cond(exact, lambda w: found, lambda w: _full(w, k), w)
        return _times(found, size)

    return decompose


def _times(found: Svd, size: jax.Array) -> Svd:
    return found._replace(s=found.s * size)


def _full(w: jax.Array, k: int) -> Svd:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _signed(Svd(u[:, :k], s[:k], vt[:k].T))


def within(
    both: Products,
    shape: tuple[int, ...],
    block: jax.Array,
    k: int,
    image: jax.Array | None = None,
) -> Svd:
    """The best triplets whose vectors of the smaller side lie in the span of a block.

    Args:
        both: products with the matrix.
        shape: its shape, `(n, m)`.
        block: orthonormal columns, shape `(min(n, m), width)`.
        k: how many triplets, at most `width`.
        image: what the matrix makes of the block, `(max(n, m), width)`, if it is known.
    """
    if image is None:
        image = both.upright(shape).times(block)
    basis = orthonormal(orthonormal(image))
    u, s, vt = jnp.linalg.svd(dot(basis.T, image))
    larger, smaller = dot(basis, u[:, :k]), dot(block, vt[:k].T)
    tall = shape[0] >= shape[1]
    sides = (larger, smaller) if tall else (smaller, larger)
    return _signed(Svd(sides[0], s[:k], sides[1]))


def complete(found: Svd) -> jax.Array:
    """Whether all vectors are there, none zero."""
    both = jnp.concatenate([found.u, found.v])
    return jnp.all(jnp.linalg.norm(both, axis=0) > 1)  # sqrt(2) each, or 0


def _signed(found: Svd) -> Svd:
    """With the largest entry of each right vector positive."""
    sign = signs(found.v)
    return Svd(found.u * sign, found.s, found.v * sign)
