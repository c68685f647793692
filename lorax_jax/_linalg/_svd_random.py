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
from ._svd import Svd, complete, svd_top, within

# A Krylov space of more blocks is cut to its best one, with which the next begins.
_BLOCKS = 6

# Of singular values below this share of the first, products in float32 know too little.
_RANGE = 1 / 300


def svd_random(
    w: Float[Array, "n m"], k: int, *, iterations: int, key: PRNGKeyArray
) -> Svd:
    r"""`k` leading singular triplets, about: randomized, in a fixed number of passes.

    With $\Omega$ a Gaussian block of `k + spare(k)` columns, $Y_0 = W^\top \Omega$ and
    $G = W^\top W$, the best triplets are taken whose right vectors lie in the block
    Krylov space

    $$K = \operatorname{span} [\, Y_0, G Y_0, \dots, G^q Y_0 \,] , \qquad q =
    \text{iterations},$$

    on the smaller side of `w`. Since $K$ holds $p(G) Y_0$ for each polynomial $p$ of
    degree $q$, the best basis $Q$ in it has, in expectation, with $l$ = `spare(k)`,

    $$\lVert W - W Q Q^\top \rVert_2 \le \Bigl[ 1 + \rho \Bigl( \sqrt{\tfrac{k}{l - 1}}
      + \tfrac{e \sqrt{k + l}}{l} \sqrt{\min(n, m) - k} \Bigr) \Bigr] s_{k + 1} ,
      \qquad \rho = \min_p \max_{i \le k < j} \left| \frac{p(s_j^2)}{p(s_i^2)} \right|
      \le 1$$

    (Halko, Martinsson and Tropp, Theorem 9.1 and the proof of Corollary 10.10), and
    keeping only `k` directions adds $s_{k+1}$ at most. `random_error` gives the bound.
    What was lost is known afterwards, to the digit:
    $\lVert W - U S V^\top \rVert_F^2 = \lVert W \rVert_F^2 - \sum_i s_i^2$.

    A space of more than 6 blocks, or of more columns than `w` has, is begun anew with
    its best block: $q$ then counts products with $G$, and $\rho$ is that of the first
    space at worst.

    The space is kept in float32 by products of its blocks with each other, which see no
    singular value below a few thousandths of the first. Where one of the `k` is, the
    triplets are those of `svd_top`.

    Power iteration takes the same $2 q + 2$ passes through `w`, and has the last block
    alone.

    Args:
        w: the matrix, any floating dtype; computed in float32 at the highest precision.
        k: how many, at most `min(n, m)`.
        iterations: $q$, from 0 up.
        key: PRNG key of the block. Where two blocks would be wider than the smaller
            side of `w`, nothing is random: the triplets are those of `svd_top`.

    Returns:
        `Svd(u, s, v)`, float32, `u` and `v` orthonormal up to rounding.

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
    if not is_random((n, m), k):
        return 1.0
    more, rest = spare(k), math.sqrt(min(n, m) - k)
    spread = math.sqrt(k / (more - 1)) + math.e * math.sqrt(k + more) / more * rest
    return 2 + ratio * spread


def is_random(shape: tuple[int, ...], k: int) -> bool:
    """Whether a matrix has room for two random blocks, as `svd_random` asks."""
    return 2 * (k + spare(k)) <= min(shape)


def spare(k: int) -> int:
    """How many columns more than `k` a random block has."""
    return max(k // 2, 8)


@functools.cache
def _svd_random(k: int, iterations: int):
    @jax.custom_batching.sequential_vmap
    def decompose(w, key):
        larger, smaller = max(w.shape), min(w.shape)
        width = k + spare(k)
        if not is_random(w.shape, k):
            return svd_top(w, k)
        w = w.astype(jnp.float32)
        start = jax.random.normal(key, (larger, width), jnp.float32)
        sample = products(w).upright(w.shape).turned(start)
        # With it in the denominator, squares of weights of any size are numbers.
        size = positive(jnp.abs(sample).max())
        both = products(w, size)
        there, back = both.upright(w.shape)
        block = orthonormal(orthonormal(sample / size))
        most = min(_BLOCKS, smaller // width) - 1
        spaces, rest = divmod(iterations, most)

        def space(state, blocks):
            block, image = state
            return _krylov(there, back, block, image, blocks)

        state = block, there(block)
        if spaces:
            state = lax.fori_loop(0, spaces, lambda _, state: space(state, most), state)
        block, image = space(state, rest) if rest else state
        found = within(both, w.shape, block, k, image)
        within_range = complete(found) & (found.s[-1] > _RANGE * found.s[0])
        found = found._replace(s=found.s * size)
        return lax.cond(within_range, lambda w: found, lambda w: svd_top(w, k), w)

    return decompose


def _krylov(
    there: Callable, back: Callable, block: jax.Array, image: jax.Array, blocks: int
) -> tuple[jax.Array, jax.Array]:
    """The best block of a Krylov space, and its image.

    Args:
        there: products with the matrix.
        back: products with its transpose.
        block: orthonormal columns, or zeros, with which the space begins.
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
