"""Truncated singular value decompositions, made of matrix products.

A full decomposition of a weight costs seconds, nearly all of them in LAPACK's
sequential parts. The few leading triplets need none of that: large products with a thin
block, and decompositions no wider than the block.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ._filter import (
    check_count,
    dot,
    invariant,
    orthonormal,
    oversampling,
    positive,
    powered,
    sized,
)

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


def svd_random(
    w: Float[Array, "n m"], k: int, *, iterations: int, key: PRNGKeyArray
) -> Svd:
    r"""`k` leading singular triplets, about: randomized, in a fixed number of passes.

    A Gaussian block of `k + p` columns, `p = oversampling(k)`, goes through
    $W p(W^\top W)$, with a polynomial of degree `iterations`: one power, then Chebyshev
    polynomials that are small where the block's own Ritz values say that nothing is
    wanted (as in `svd_top`). The basis $Q$ that it ends in has, in expectation,

    $$\lVert W - Q Q^\top W \rVert_2 \le \Bigl[ 1 + \rho \Bigl( \sqrt{\tfrac{k}{p - 1}}
      + \tfrac{e \sqrt{k + p}}{p} \sqrt{\min(n, m) - k} \Bigr) \Bigr] s_{k + 1} ,
      \qquad \rho = \max_{j > k} \left| \frac{p(s_j^2)}{p(s_k^2)} \right| \le 1 ,$$

    (Halko, Martinsson and Tropp, Theorem 9.1 and Corollary 10.10's proof), and keeping
    only `k` directions of $Q$ adds $s_{k+1}$ at most. `random_error` gives the bound.
    What was lost is known afterwards, to the digit:
    $\lVert W - U S V^\top \rVert_F^2 = \lVert W \rVert_F^2 - \sum_i s_i^2$.

    At equal `iterations` plain power iteration needs the same $2 q + 2$ passes through
    `w`; its filter grows with the power of $s_k / s_{k+p}$ that this one's grows with
    the exponential of.

    Args:
        w: the matrix, any floating dtype; computed in float32 at the highest precision.
        k: how many, at most `min(n, m)`.
        iterations: the degree of $p$, from 0 up.
        key: PRNG key of the block.

    Returns:
        `Svd(u, s, v)`, float32. `u` and `v` are orthonormal up to rounding where no
        singular value is zero; vectors of those that are zero are zero.

    Raises:
        ValueError: if `k` exceeds `min(n, m)`, or `iterations` is negative.

    Example:
        >>> w = jnp.diag(jnp.array([9.0, 1.0, 2.0]))
        >>> svd_random(w, 1, iterations=2, key=jax.random.key(0)).s.round(3).tolist()
        [9.0]

    References:
        Halko, Martinsson and Tropp, "Finding structure with randomness", 2011.
        https://arxiv.org/abs/0909.4061
    """
    check_count(w.shape, k)
    if iterations < 0:
        raise ValueError(f"`iterations` = {iterations}; a number from 0 up is meant.")
    return _svd_random(k, iterations)(w, key)


def random_error(n: int, m: int, k: int, ratio: float = 1.0) -> float:
    r"""Bound of `svd_random`'s expected spectral error, in multiples of the best one's.

    Args:
        n, m: the matrix's shape.
        k: how many triplets.
        ratio: the $\rho$ of `svd_random`; 1 for `iterations=0`.

    >>> round(random_error(1024, 1024, 16), 1)
    33.5
    >>> round(random_error(1024, 1024, 16, ratio=0.01), 1)
    2.3
    """
    p = min(oversampling(k), min(n, m) - k)
    if p < 2:
        return 1.0  # the block spans everything
    rest = math.sqrt(min(n, m) - k)
    spread = math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * rest
    return 2 + ratio * spread


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
    right = dot(w, found.v) - found.u * found.s[None]
    left = dot(found.u.T, w).T - found.v * found.s[None]
    worst = jnp.maximum(
        jnp.linalg.norm(right, axis=0).max(), jnp.linalg.norm(left, axis=0).max()
    )
    return worst / positive(found.s[0])


def captured(w: Float[Array, "n m"], found: Svd) -> Float[Array, ""]:
    r"""Energy that the left vectors hold, as a share of what `k` vectors can.

    $$\lVert U^\top W \rVert_F^2 \, / \textstyle\sum_{i \le k} s_i^2 ,$$

    with the singular values of a full decomposition: expensive, and for reports.

    >>> w = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
    >>> round(float(captured(w, svd_top(w, 2))), 4)
    1.0
    """
    w = w.astype(jnp.float32)
    best = jnp.linalg.svd(w, compute_uv=False)[: found.s.shape[0]]
    return jnp.sum(dot(found.u.T, w) ** 2) / positive(jnp.sum(best**2))


@functools.cache
def _svd_top(k: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w):
        w = w.astype(jnp.float32)
        n, m = w.shape
        if n < m:
            return _turned(decompose(w.T))
        w, size = sized(w)
        width = k + oversampling(k)
        if 4 * width >= 3 * m:
            return _times(_full(w, k), size)
        gram = dot(w.T, w)  # (m, m)
        if 3 * width >= m:
            block = jnp.linalg.eigh(gram)[1][:, m - width :].T
        else:
            block = invariant(gram, width, k)
        found = _within(w, block, k)
        exact = (residual(w, found) <= ACCEPTED) & _complete(found)
        found = lax.cond(exact, lambda w: found, lambda w: _full(w, k), w)
        return _times(found, size)

    return decompose


@functools.cache
def _svd_random(k: int, iterations: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w, key):
        w = w.astype(jnp.float32)
        n, m = w.shape
        if n < m:
            return _turned(decompose(w.T, key))
        w, size = sized(w)
        width = min(k + oversampling(k), m)
        block = jax.random.normal(key, (width, m), jnp.float32)
        if iterations:
            block = powered(lambda x: dot(dot(x, w.T), w), block, k, iterations)
        left = orthonormal(orthonormal(dot(block, w.T)))  # (width, n)
        return _times(_turned(_within(w.T, left, k)), size)

    return decompose


def _times(found: Svd, size: jax.Array) -> Svd:
    return found._replace(s=found.s * size)


def _full(w: jax.Array, k: int) -> Svd:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _signed(Svd(u[:, :k], s[:k], vt[:k].T))


def _within(w: jax.Array, block: jax.Array, k: int) -> Svd:
    """The best triplets with right vectors in the span of `block`, `(width, m)`."""
    image = dot(block, w.T)  # (width, n)
    left = orthonormal(orthonormal(image))
    u, s, vt = jnp.linalg.svd(dot(left, image.T))
    return _signed(Svd(dot(u[:, :k].T, left).T, s[:k], dot(vt[:k], block).T))


def _turned(found: Svd) -> Svd:
    """Of the transposed matrix."""
    return _signed(Svd(found.v, found.s, found.u))


def _complete(found: Svd) -> jax.Array:
    """Whether all vectors are there, none zero."""
    both = jnp.concatenate([found.u, found.v])
    return jnp.all(jnp.linalg.norm(both, axis=0) > 1)  # sqrt(2) each, or 0


def _signed(found: Svd) -> Svd:
    """With the largest entry of each right vector positive."""
    at = jnp.argmax(jnp.abs(found.v), axis=0)
    largest = jnp.take_along_axis(found.v, at[None], axis=0)
    sign = jnp.where(largest < 0, -1.0, 1.0).astype(jnp.float32)  # (1, k)
    return Svd(found.u * sign, found.s, found.v * sign)
