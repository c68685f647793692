"""Leading invariant subspaces by Chebyshev filters, made of matrix products.

Blocks of vectors are their columns, `(m, width)`: a matrix times a tall block is what
every device multiplies fastest.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._products import dot, orthonormal, positive

# `svd_top` iterates until |G x - t x| is below this share of the largest eigenvalue t
# of the Gram matrix G: under a hundred roundings of float32.
TOLERANCE = 1e-5

# A filter may blow the leading direction up by this much over the last one wanted:
# more, and the last one drowns in float32's rounding of the first.
_AMPLIFIED = 1e4
_DEGREE = 12
_ROUNDS = 40


def invariant(gram: jax.Array, width: int, k: int, relative: float = 0.0) -> jax.Array:
    """A block that spans the `k` leading eigenvectors of a Gram matrix.

    Until each of them is right to `TOLERANCE` of the largest eigenvalue; with
    `relative`, to this share of its own, or as nearly as float32 tells.
    """
    last = 16 * jnp.finfo(jnp.float32).eps if relative else TOLERANCE

    def times(x):
        return dot(gram, x)

    def going_on(state):
        ritz, rounds = state
        apart = jnp.linalg.norm(ritz.image - ritz.block * ritz.values[None], axis=0)
        near = jnp.maximum(relative * ritz.values[:k], last * ritz.values[0])
        return jnp.any(apart[:k] > near) & (rounds < _ROUNDS)

    def once(state):
        ritz, rounds = state
        block = _filtered(times, ritz, _degree(ritz, k))
        return rotated(times, orthonormal(orthonormal(block))), rounds + 1

    start = jax.random.normal(jax.random.key(0), (gram.shape[0], width), jnp.float32)
    first = rotated(times, orthonormal(orthonormal(times(start))))
    ritz, _ = lax.while_loop(going_on, once, (first, jnp.zeros((), jnp.int32)))
    return ritz.block


class Ritz(NamedTuple):
    """Ritz vectors of a Gram matrix in a block, what it makes of them, their values."""

    block: jax.Array
    image: jax.Array
    values: jax.Array


def rotated(times: Callable, block: jax.Array) -> Ritz:
    """The Ritz vectors in the span of an orthonormal block, leading ones first."""
    image = times(block)
    values, vectors = jnp.linalg.eigh(dot(block.T, image))
    turn = vectors[:, ::-1]
    return Ritz(dot(block, turn), dot(image, turn), values[::-1])


def _damped(values: jax.Array) -> jax.Array:
    """Half of the interval from 0 that a filter damps: up to the last Ritz value."""
    floor = jnp.finfo(jnp.float32).eps * values[0]
    return positive(jnp.maximum(values[-1], floor) / 2)


def _degree(ritz: Ritz, k: int) -> jax.Array:
    """The largest degree that does not drown the last wanted direction in the first."""
    place = jnp.maximum(ritz.values / _damped(ritz.values) - 1, 1)
    growth = jnp.arccosh(place)  # T_d(x) is about exp(d arccosh(x)) / 2
    most = math.log(_AMPLIFIED) / positive(growth[0] - growth[k - 1])
    return jnp.clip(most, 1, _DEGREE).astype(jnp.int32)


def _filtered(times: Callable, ritz: Ritz, degree: jax.Array) -> jax.Array:
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
