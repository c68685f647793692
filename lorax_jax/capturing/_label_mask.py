"""Which tokens count: those that are trained on."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def label_mask(
    attention_mask: Any = None,
    labels: Int[Array, "*batch length"] | None = None,
    *,
    ignored: int = -100,
) -> Float[Array, "*batch length"]:
    """1 for tokens that are no padding and have a label, 0 for the others.

    Labels are not shifted, as in PEFT's EVA: a token counts if its own label does, and
    not the one that it predicts.

    Args:
        attention_mask: 1 for tokens, 0 for padding; `None` where nothing is padded.
        labels: one for each token; `None` where all count.
        ignored: the label of tokens that are not trained on.

    Returns:
        The mask, float32.

    Raises:
        ValueError: if both are `None`.

    Example:
        >>> labels = jnp.array([[-100, 5, 7, 7]])
        >>> label_mask(jnp.array([[1, 1, 1, 0]]), labels).tolist()
        [[0.0, 1.0, 1.0, 0.0]]
    """
    if attention_mask is None and labels is None:
        raise ValueError(
            "`label_mask` got neither `attention_mask` nor `labels`. Where all tokens "
            "count, no mask is needed: `mask=None`."
        )
    kept = True if attention_mask is None else jnp.asarray(attention_mask) != 0
    if labels is not None:
        kept = kept & (jnp.asarray(labels) != ignored)
    return jnp.asarray(kept, jnp.float32)
