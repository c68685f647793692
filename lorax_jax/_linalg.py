"""Truncated singular value decompositions, made of matrix products.

A full decomposition of a weight costs seconds, nearly all of them in LAPACK's
sequential parts. The few leading triplets need none of that: large products with a thin
block, and decompositions no wider than the block.

Blocks of vectors lie on their side here, `(width, m)`: so products with them are
fastest.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

# `svd_top` iterates until |G x - t x| is below this share of the largest eigenvalue t
# of the Gram matrix G: under a hundred roundings of float32.
TOLERANCE = 1e-5

# Where |W^T u - s v| is then above this share of the largest singular value, the matrix
# is decomposed in full.
ACCEPTED = 3e-5

# A filter may blow the leading direction up by this much over the last one wanted:
# more, and the last one drowns in float32's rounding of the first.
_AMPLIFIED = 1e4
_DEGREE = 12
_ROUNDS = 40


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
    _check(w.shape, k)
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
    _check(w.shape, k)
    if iterations < 0:
        raise ValueError(f"`iterations` = {iterations}; a number from 0 up is meant.")
    return _svd_random(k, iterations)(w, key)


def oversampling(k: int) -> int:
    """How many columns more than `k` the blocks of this file have."""
    return max(k, 8)


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
    right = _dot(w, found.v) - found.u * found.s[None]
    left = _dot(found.u.T, w).T - found.v * found.s[None]
    worst = jnp.maximum(
        jnp.linalg.norm(right, axis=0).max(), jnp.linalg.norm(left, axis=0).max()
    )
    return worst / _positive(found.s[0])


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
    return jnp.sum(_dot(found.u.T, w) ** 2) / _positive(jnp.sum(best**2))


@functools.cache
def _svd_top(k: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w):
        w = w.astype(jnp.float32)
        n, m = w.shape
        if n < m:
            return _turned(decompose(w.T))
        w, size = _sized(w)
        width = k + oversampling(k)
        if 4 * width >= 3 * m:
            return _times(_full(w, k), size)
        gram = _dot(w.T, w)  # (m, m)
        if 3 * width >= m:
            block = jnp.linalg.eigh(gram)[1][:, m - width :].T
        else:
            block = _invariant(gram, width, k)
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
        w, size = _sized(w)
        width = min(k + oversampling(k), m)
        block = jax.random.normal(key, (width, m), jnp.float32)
        if iterations:
            block = _powered(lambda x: _dot(_dot(x, w.T), w), block, k, iterations)
        left = _orthonormal(_orthonormal(_dot(block, w.T)))  # (width, n)
        return _times(_turned(_within(w.T, left, k)), size)

    return decompose


def _sized(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The matrix with entries up to 1, whose squares are numbers, and its size."""
    size = _positive(jnp.abs(w).max())
    return w / size, size


def _times(found: Svd, size: jax.Array) -> Svd:
    return found._replace(s=found.s * size)


def _full(w: jax.Array, k: int) -> Svd:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return _signed(Svd(u[:, :k], s[:k], vt[:k].T))


def _within(w: jax.Array, block: jax.Array, k: int) -> Svd:
    """The best triplets with right vectors in the span of `block`, `(width, m)`."""
    image = _dot(block, w.T)  # (width, n)
    left = _orthonormal(_orthonormal(image))
    u, s, vt = jnp.linalg.svd(_dot(left, image.T))
    return _signed(Svd(_dot(u[:, :k].T, left).T, s[:k], _dot(vt[:k], block).T))


def _invariant(gram: jax.Array, width: int, k: int) -> jax.Array:
    """A block that spans the `k` leading eigenvectors of a Gram matrix."""

    def times(x):
        return _dot(x, gram)

    def going_on(state):
        ritz, rounds = state
        apart = jnp.linalg.norm(ritz.image - ritz.block * ritz.values[:, None], axis=1)
        unlike = apart[:k].max() > TOLERANCE * ritz.values[0]
        return unlike & (rounds < _ROUNDS)

    def once(state):
        ritz, rounds = state
        block = _filtered(times, ritz, _degree(ritz, k))
        return _rotated(times, _orthonormal(_orthonormal(block))), rounds + 1

    start = jax.random.normal(jax.random.key(0), (width, gram.shape[0]), jnp.float32)
    first = _rotated(times, _orthonormal(_orthonormal(times(start))))
    ritz, _ = lax.while_loop(going_on, once, (first, jnp.zeros((), jnp.int32)))
    return ritz.block


def _powered(times: Callable, block: jax.Array, k: int, applications: int) -> jax.Array:
    """The block after a polynomial of degree `applications` in a Gram matrix."""

    def once(state):
        block, left = state
        ritz = _rotated(times, block)
        degree = jnp.minimum(_degree(ritz, k), left)
        return _orthonormal(_filtered(times, ritz, degree)), left - degree

    first = _orthonormal(times(block)), jnp.asarray(applications - 1, jnp.int32)
    return lax.while_loop(lambda state: state[1] > 0, once, first)[0]


class _Ritz(NamedTuple):
    """Ritz vectors of a Gram matrix in a block, what it makes of them, their values."""

    block: jax.Array
    image: jax.Array
    values: jax.Array


def _rotated(times: Callable, block: jax.Array) -> _Ritz:
    """The Ritz vectors in the span of an orthonormal block, leading ones first."""
    image = times(block)
    values, vectors = jnp.linalg.eigh(_dot(block, image.T))
    turn = vectors[:, ::-1].T
    return _Ritz(_dot(turn, block), _dot(turn, image), values[::-1])


def _damped(values: jax.Array) -> jax.Array:
    """Half of the interval from 0 that a filter damps: up to the last Ritz value."""
    floor = jnp.finfo(jnp.float32).eps * values[0]
    return _positive(jnp.maximum(values[-1], floor) / 2)


def _degree(ritz: _Ritz, k: int) -> jax.Array:
    """The largest degree that does not drown the last wanted direction in the first."""
    place = jnp.maximum(ritz.values / _damped(ritz.values) - 1, 1)
    growth = jnp.arccosh(place)  # T_d(x) is about exp(d arccosh(x)) / 2
    most = math.log(_AMPLIFIED) / _positive(growth[0] - growth[k - 1])
    return jnp.clip(most, 1, _DEGREE).astype(jnp.int32)


def _filtered(times: Callable, ritz: _Ritz, degree: jax.Array) -> jax.Array:
    r"""A Chebyshev polynomial of a Gram matrix, times a block.

    With $c$ half of what is damped, $T_d((G - c) / c)$ scaled to 1 at the largest Ritz
    value: the scaled recurrence of Zhou et al., in which nothing overflows.
    """
    half = _damped(ritz.values)
    first = 1 / jnp.maximum(ritz.values[0] / half - 1, 1)

    def step(_, state):
        before, now, ratio = state
        further = 1 / (2 / first - ratio)
        then = (times(now) / half - now) * (2 * further) - before * (ratio * further)
        return now, then, further

    second = (ritz.image / half - ritz.block) * first
    return lax.fori_loop(1, degree, step, (ritz.block, second, first))[1]


def _orthonormal(x: jax.Array) -> jax.Array:
    """Nearly orthonormal rows with the span of `x`'s; zero rows where it has less.

    Through eigenvectors of the small Gram matrix, which takes products where a QR
    decomposition is sequential. Twice makes them orthonormal to the last digit.
    """
    x = x / _positive(jnp.linalg.norm(x, axis=1, keepdims=True))
    values, vectors = jnp.linalg.eigh(_dot(x, x.T))
    there = values > jnp.finfo(jnp.float32).eps * len(values) * values[-1]
    return _dot(
        (vectors * jnp.where(there, lax.rsqrt(_positive(values)), 0)[None]).T, x
    )


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


def _positive(x: jax.Array) -> jax.Array:
    """`x`, or 1 where it is not positive: a divisor."""
    return jnp.where(x > 0, x, 1)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, precision=lax.Precision.HIGHEST)


def _check(shape: tuple[int, ...], k: int) -> None:
    if not 1 <= k <= min(shape):
        raise ValueError(
            f"{k} singular triplets are asked of a matrix of shape {shape}, which has "
            f"{min(shape)}."
        )
