"""Gaussian: A normal, B zero."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register
from ._embedding import embedding


@register("gaussian", lookup=embedding)
def gaussian(
    weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Draws A from a normal distribution and starts B at zero.

    $$A \sim N\!\left(0, \tfrac{1}{r^2}\right), \qquad B = 0 .$$

    The standard deviation is $1/r$, as in PEFT; the paper's $1/\sqrt r$ is not used.

    Args:
        weight: the kernel or its type, shape `(d_in, d_out)`; only the shape counts.
        rank: columns of A.
        scale: unused; every initializer accepts it.
        key: PRNG key.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32.

    Example:
        >>> key = jax.random.key(0)
        >>> gaussian(jnp.ones((16, 4)), rank=2, scale=1.0, key=key).a.shape
        (16, 2)

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
        https://arxiv.org/abs/2106.09685
    """
    del scale, stats
    d_in, d_out = weight.shape
    a = jax.random.normal(key, (d_in, rank), jnp.float32) / rank
    return Start(a, jnp.zeros((rank, d_out), jnp.float32))
