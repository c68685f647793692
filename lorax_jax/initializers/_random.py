"""Random: A and B both uniform, so the adapted function differs from the base."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register
from ._embedding import embedding


@register(False, "random", lookup=functools.partial(embedding, zero=False))
def random(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Draws both factors: for tests, and to see at once that an adapter acts.

    $$A \sim U\!\left(\pm\tfrac{1}{\sqrt{d_{in}}}\right), \qquad
    B \sim U\!\left(\pm\tfrac{1}{\sqrt r}\right).$$

    This is what PEFT's `init_lora_weights=False` draws. Training should not start
    here: the adapted function is not the base.

    Args:
        weight: the kernel or its type, shape `(d_in, d_out)`; only the shape counts.
        rank: columns of A.
        scale: unused; every initializer accepts it.
        key: PRNG key.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32.

    Example:
        >>> start = random(jnp.ones((16, 4)), rank=4, scale=1.0, key=jax.random.key(0))
        >>> bool(abs(start.b).max() <= 0.5)
        True
    """
    del scale, stats
    d_in, d_out = weight.shape
    key_a, key_b = jax.random.split(key)
    bound_a, bound_b = 1.0 / math.sqrt(d_in), 1.0 / math.sqrt(rank)
    return Start(
        jax.random.uniform(key_a, (d_in, rank), jnp.float32, -bound_a, bound_a),
        jax.random.uniform(key_b, (rank, d_out), jnp.float32, -bound_b, bound_b),
    )
