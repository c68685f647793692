"""Next-token cross-entropy, and the bits that a byte of text costs."""

import math

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "*rows length vocab"],
    targets: Int[Array | np.ndarray, "*rows length"],
    weights: Float[Array | np.ndarray, "*rows length"],
    total: Float[Array, ""] | float | None = None,
) -> Float[Array, ""]:
    r"""The weighted mean, in nats, of how unlikely the targets are.

    $$\frac{1}{\text{total}} \sum_t \text{weights}_t \,
      \big(\log \textstyle\sum_v e^{\text{logits}_{tv}}
           - \text{logits}_{t,\text{targets}_t}\big)$$

    Computed in float32 whatever the dtype of the logits.

    Args:
        logits: unnormalized log probabilities.
        targets: the tokens that came.
        weights: how much each counts; where 0, the logits do not matter at all.
        total: what to divide by; `None` is the sum of the weights. A batch that is
            taken in parts divides each part by the weights of the whole, and adds.

    Returns:
        A float32 scalar.

    Example:
        >>> targets, weights = jnp.array([[3, 5]]), jnp.array([[1.0, 1.0]])
        >>> loss = cross_entropy(jnp.zeros((1, 2, 8)), targets, weights)
        >>> bool(jnp.isclose(loss, jnp.log(8)))
        True
    """
    nats = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.asarray(targets)
    )  # (*rows, length)
    weights = jnp.asarray(weights, jnp.float32)
    nats = jnp.where(weights > 0, nats, 0.0)
    return (nats * weights).sum() / (weights.sum() if total is None else total)


def bits_per_byte(nats: float, size: int) -> float:
    """What a text costs, comparable between tokenizers.

    Args:
        nats: the summed (not the mean) negative log likelihood of the text's tokens.
        size: of the text in UTF-8.

    Example:
        >>> bits_per_byte(100 * math.log(2), size=50)
        2.0
    """
    return nats / math.log(2) / size
