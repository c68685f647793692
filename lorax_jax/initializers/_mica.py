"""MiCA: train in the weight's minor directions, with B frozen."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register
from ._olora import check_rank


@register("mica", reads="weight", freezes=("b",))
def mica(
    weight: Float[Array, "d_in d_out"],
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Freezes B on the directions of the smallest singular values; A starts at zero.

    With $W = U S V^\top$, of which there are $k = \min(d_{in}, d_{out})$ triplets,

    $$A = 0, \qquad B = V_{:, k - r:}^\top .$$

    Only A is trained: the adapter writes into output directions that the weight itself
    hardly uses. B stays as it is in `Adapter.fixed`, and half of the values (about) are
    trained that LoRA of this rank would train.

    Small singular values are what iterations find worst, so the decomposition is full.

    Args:
        weight: the pretrained kernel, shape `(d_in, d_out)`; of a table, its rows.
        rank: how many directions; at most `min(d_in, d_out)`.
        scale: unused; every initializer accepts it.
        key: unused, as `scale`.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32; rows of `b`
        are orthonormal, the smallest singular value's last.

    Raises:
        ValueError: if `rank` exceeds `min(d_in, d_out)`.

    Example:
        >>> import jax
        >>> w = jnp.diag(jnp.array([3.0, 1.0, 2.0]))
        >>> start = mica(w, rank=1, scale=2.0, key=jax.random.key(0))
        >>> abs(start.b).round(4).tolist(), bool(start.a.any())
        ([[0.0, 1.0, 0.0]], False)

    References:
        "MiCA: Minor Component Adaptation", 2026. https://arxiv.org/abs/2604.01694
    """
    del scale, key, stats
    check_rank(weight.shape, rank)
    dense = weight.astype(jnp.float32)
    _, s, vt = jnp.linalg.svd(dense, full_matrices=False)
    return Start(jnp.zeros((weight.shape[0], rank), jnp.float32), vt[len(s) - rank :])
