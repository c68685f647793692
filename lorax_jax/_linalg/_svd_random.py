"""Randomized singular value decompositions: a few passes through the matrix."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from ._products import (
    check_count,
    dot,
    independent,
    orthonormal,
    positive,
    products,
    unit,
)
from ._svd import Svd, svd_top, within

# A Krylov space of more blocks is cut to its best one, with which the next begins.
_BLOCKS = 6


def svd_random(
    w: Float[Array, "n m"], k: int, *, iterations: int, key: PRNGKeyArray
) -> Svd:
    r"""`k` leading singular triplets, about: randomized, in a fixed number of passes.

    With $\Omega$ a Gaussian block of `k + spare(k)` columns, $Y_0 = W^\top \Omega$ and
    $G = W^\top W$, the best triplets are taken whose right vectors lie in the block
    Krylov space

    $$K = \operatorname{span} [\, Y_0, G Y_0, \dots, G^q Y_0 \,] , \qquad q =
    \text{iterations},$$

    on the smaller side of `w`; of every 6 blocks only the best one is kept for those
    that follow. Since $K$ holds $p(G) Y_0$ for each polynomial $p$ of degree $q$, the
    best basis $Q$ in it has, in expectation,

    $$\lVert W - W Q Q^\top \rVert_2 \le \Bigl[ 1 + \rho \Bigl( \sqrt{\tfrac{k}{p - 1}}
      + \tfrac{e \sqrt{k + p}}{p} \sqrt{\min(n, m) - k} \Bigr) \Bigr] s_{k + 1} ,
      \qquad \rho = \min_p \max_{i \le k < j} \left| \frac{p(s_j^2)}{p(s_i^2)} \right|
      \le 1 ,$$

    with $p$ = `spare(k)` outside $\rho$ (Halko, Martinsson and Tropp, Theorem 9.1 and
    the proof of Corollary 10.10), and keeping only `k` directions adds $s_{k+1}$ at
    most. `random_error` gives the bound. What was lost is known afterwards, to the
    digit: $\lVert W - U S V^\top \rVert_F^2 = \lVert W \rVert_F^2 - \sum_i s_i^2$.

    Power iteration takes the same $2 q + 2$ passes through `w`, and has the last block
    alone.

    Args:
        w: the matrix, any floating dtype; computed in float32 at the highest precision.
        k: how many, at most `min(n, m)`.
        iterations: $q$, from 0 up.
        key: PRNG key of the block. Where two blocks would be larger than `w`, nothing
            is random: the triplets are those of `svd_top`.

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
        Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster
        Approximate Singular Value Decomposition", 2015.
        https://arxiv.org/abs/1504.05477
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
    56.4
    >>> round(random_error(1024, 1024, 16, ratio=0.01), 1)
    2.5
    """
    p, smaller = spare(k), min(n, m)
    if 2 * (k + p) > smaller:
        return 1.0  # not random
    spread = math.sqrt(k / (p - 1)) + math.e * math.sqrt(k + p) / p * math.sqrt(
        smaller - k
    )
    return 2 + ratio * spread


def spare(k: int) -> int:
    """How many columns more than `k` a random block has."""
    return max(k // 2, 8)


@functools.cache
def _svd_random(k: int, iterations: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w, key):
        larger, smaller = max(w.shape), min(w.shape)
        width = k + spare(k)
        if 2 * width > smaller:
            return svd_top(w, k)
        w = w.astype(jnp.float32)
        start = jax.random.normal(key, (larger, width), jnp.float32)
        seen = products(w).upright(w.shape).turned(start)
        # With it in the denominator, squares of weights of any size are numbers.
        size = positive(jnp.abs(seen).max())
        both = products(w, size)
        there, back = both.upright(w.shape)
        block = orthonormal(orthonormal(seen / size))
        image, left = there(block), iterations
        while left:
            blocks = min(left, _BLOCKS - 1, smaller // width - 1)
            block, image = _krylov(there, back, block, image, blocks)
            left -= blocks
        found = within(both, w.shape, block, k)
        return found._replace(s=found.s * size)

    return decompose


def _krylov(
    there: Callable, back: Callable, block: jax.Array, image: jax.Array, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """The best block of a Krylov space, and its image.

    Args:
        there: products with the matrix.
        back: products with its transpose.
        block: orthonormal columns, with which the space begins.
        image: what `there` makes of them.
        blocks: how many more the space has.
    """
    width = block.shape[1]
    room = ((0, 0), (0, blocks * width))

    def longer(i, state):
        basis, images, image = state

        def beside(x):
            return x - dot(basis, dot(basis.T, x))

        block = independent(beside(unit(back(image))))
        block = orthonormal(beside(block))  # where little is new, once is not enough
        image = there(block)
        basis = lax.dynamic_update_slice_in_dim(basis, block, i * width, axis=1)
        images = lax.dynamic_update_slice_in_dim(images, image, i * width, axis=1)
        return basis, images, image

    # A loop over columns that are there from the start compiles once for all blocks.
    first = jnp.pad(block, room), jnp.pad(image, room), image
    basis, images, _ = lax.fori_loop(1, blocks + 1, longer, first)
    best = jnp.linalg.eigh(dot(images.T, images))[1][:, ::-1][:, :width]
    return dot(basis, best), dot(images, best)
