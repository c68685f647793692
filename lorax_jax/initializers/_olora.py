"""OLoRA: start on an orthonormal basis of the weight's first rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._base import Start, register


@register("olora", reads="weight", nested=True)
def olora(
    weight: Float[Array, "d_in d_out"],
    *,
    rank: int,
    scale: float | Float[Array, ""],
    key: PRNGKeyArray,
    stats: Any = None,
) -> Start:
    r"""Starts at the first rows of the weight's QR decomposition.

    With $W^\top = Q R$,

    $$A_0 = R_{:r}^\top, \qquad B_0 = Q_{:, :r}^\top ,$$

    and the adapter contributes $s (A B - A_0 B_0)$, zero at the start. The scale $s$
    plays no part in the factors, as in PEFT, so what moves is $s$ times as large.

    The first `rank` columns of $Q$ are those of the first `rank` columns of $W^\top$,
    and $R_{:r} = Q_{:, :r}^\top W^\top$: nothing larger is decomposed.

    $W^\top$ is `(d_out, d_in)`, as torch keeps a linear layer. GPT-2's `Conv1D` keeps
    the transpose, which PEFT decomposes as it stands; here a layer starts the same way
    however a checkpoint stores it.

    Args:
        weight: the pretrained kernel, shape `(d_in, d_out)`; of a table, its rows.
        rank: columns of A; at most `min(d_in, d_out)`.
        scale: unused; every initializer accepts it.
        key: unused, as `scale`.
        stats: unused, as `scale`.

    Returns:
        `Start(a, b, a0, b0)`, shapes `(d_in, rank)` and `(rank, d_out)`, float32; here
        `a` is `a0` and `b` is `b0`, and the rows of `b` are orthonormal.

    Raises:
        ValueError: if `rank` exceeds `min(d_in, d_out)`.

    Example:
        >>> w = jnp.array([[3.0, 4.0], [1.0, 0.0]])
        >>> start = olora(w, rank=1, scale=2.0, key=jax.random.key(0))
        >>> [round(abs(float(x)), 2) for x in (*start.b[0], *start.a[:, 0])]
        [0.6, 0.8, 5.0, 0.6]

    References:
        Buyukakyuz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models",
        2024. https://arxiv.org/abs/2406.01775
    """
    del scale, key, stats
    check_rank(weight.shape, rank)
    first = weight[:rank].astype(jnp.float32)
    b = jnp.linalg.qr(first.T)[0].T  # (rank, d_out)
    highest = jax.lax.Precision.HIGHEST
    a = jnp.dot(weight.astype(jnp.float32), b.T, precision=highest)
    return Start(a, b, a, b)


def check_rank(shape: tuple[int, ...], rank: int) -> None:
    """Raises for a rank that a weight cannot have."""
    if rank > min(shape):
        raise ValueError(
            f"The rank {rank} is asked of a weight of shape {shape}, which can have "
            f"{min(shape)} at most."
        )
