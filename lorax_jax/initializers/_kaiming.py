"""Kaiming: A uniform, B zero. The default, and PEFT's."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register
from ._embedding import embedding


@register(True, "kaiming", lookup=embedding)
def kaiming(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Draws A uniformly and starts B at zero, so the adapter starts at zero.

    $$A \sim U\!\left(-\tfrac{1}{\sqrt{d_{in}}}, \tfrac{1}{\sqrt{d_{in}}}\right),
    \qquad B = 0 .$$

    The bound is PEFT's: Kaiming's uniform rule with $a = \sqrt 5$.

    Args:
        weight: the kernel or its type, shape `(d_in, d_out)`; only the shape counts.
        rank: columns of A.
        scale: unused; every initializer accepts it.
        key: PRNG key.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32.

    Example:
        >>> start = kaiming(jnp.ones((16, 4)), rank=2, scale=1.0, key=jax.random.key(0))
        >>> bool(abs(start.a).max() <= 0.25), bool((start.b == 0).all())
        (True, True)

    References:
        He et al., "Delving Deep into Rectifiers", 2015.
        https://arxiv.org/abs/1502.01852
    """
    del scale, stats
    d_in, d_out = weight.shape
    bound = 1.0 / math.sqrt(d_in)
    a = jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound)
    return Start(a, jnp.zeros((rank, d_out), jnp.float32))
