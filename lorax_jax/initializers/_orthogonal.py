"""Orthogonal: both factors random, their product zero."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register


@register("orthogonal", multiple=2)
def orthogonal(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Draws A and B in two halves of the rank's space that are orthogonal.

    With $Q$ the orthogonal factor of a normal `(rank, rank)` matrix, $Q_1$ its rows
    0, 2, 4, ... and $Q_2$ its rows 1, 3, 5, ...,

    $$A = \tfrac{1}{10} N_1 Q_1, \qquad B = \tfrac{1}{10} Q_2^\top N_2, \qquad
      A B = \tfrac{1}{100} N_1 (Q_1 Q_2^\top) N_2 = 0 ,$$

    with $N_1$ and $N_2$ normal. So both factors get a gradient from the first step on.
    Both have half the rank at the start. In float32 the product is zero up to rounding,
    about 1e-8 of its terms: unlike A or B of zeros, the adapted function's outputs
    differ from the base's in their last digits.

    Args:
        weight: the kernel or its type, shape `(d_in, d_out)`; only the shape counts.
        rank: columns of A, even.
        scale: unused; every initializer accepts it.
        key: PRNG key.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32.

    Raises:
        ValueError: if `rank` is odd.

    Example:
        >>> w = jnp.ones((16, 4))
        >>> start = orthogonal(w, rank=4, scale=1.0, key=jax.random.key(0))
        >>> bool(start.a.all()), bool(abs(start.a @ start.b).max() < 1e-6)
        (True, True)

    References:
        https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """
    del scale, stats
    if rank % 2:
        raise ValueError(f"Orthogonal factors need an even rank, and {rank} is odd.")
    d_in, d_out = weight.shape
    key_q, key_a, key_b = jax.random.split(key, 3)
    q = jnp.linalg.qr(jax.random.normal(key_q, (rank, rank), jnp.float32))[0]
    n_a = jax.random.normal(key_a, (d_in, rank // 2), jnp.float32)
    n_b = jax.random.normal(key_b, (rank // 2, d_out), jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    return Start(
        jnp.dot(n_a, q[0::2], precision=highest) / 10,
        jnp.dot(q[1::2].T, n_b, precision=highest) / 10,
    )
