"""Embedding tables: A zero, B normal."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start


def embedding(
    weight: Float[Array, "rows d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
    zero: bool = True,
) -> Start:
    r"""Starts the rows at zero and draws the directions that they will move in.

    $$A = 0, \qquad B \sim N(0, 1) .$$

    Only the rows that a batch looks up get a gradient, so it is A, with one row for
    each token, that starts at zero. PEFT does the same. With `zero=False`
    (`init=False`) both factors are normal.

    Args:
        weight: the table or its type, shape `(rows, d_out)`; only the shape counts.
        rank: columns of A.
        scale: unused; every initializer accepts it.
        key: PRNG key.
        stats: unused, as `scale`.
        zero: whether A starts at zero.

    Returns:
        `Start(a, b)`, shapes `(rows, rank)` and `(rank, d_out)`, float32.

    Example:
        >>> key = jax.random.key(0)
        >>> start = embedding(jnp.ones((9, 4)), rank=2, scale=1.0, key=key)
        >>> bool((start.a == 0).all()), start.b.shape
        (True, (2, 4))
    """
    del scale, stats
    rows, d_out = weight.shape
    key_a, key_b = jax.random.split(key)
    a = jax.random.normal(key_a, (rows, rank), jnp.float32)
    return Start(
        jnp.zeros_like(a) if zero else a,
        jax.random.normal(key_b, (rank, d_out), jnp.float32),
    )
