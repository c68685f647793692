"""One sign for each vector."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def signs(vectors: Float[Array, "*n d k"]) -> Float[Array, "*n 1 k"]:
    """1 or -1 for each column: times it, its entry of largest size is positive.

    >>> signs(jnp.array([[1.0, 0.5], [-3.0, 2.0]])).tolist()
    [[-1.0, 1.0]]
    """
    at = jnp.abs(vectors).argmax(-2, keepdims=True)
    largest = jnp.take_along_axis(vectors, at, axis=-2)
    return jnp.where(largest < 0, -1.0, 1.0).astype(vectors.dtype)
