"""The key-value cache: what decoding remembers, as a pytree.

All rows of a batch share one write position, `length`. A row that began with padding is
right anyway, because `valid` says which slots hold real tokens, and `next_position`
counts those alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Stacked for a scanned model (one array, layers first), a tuple of arrays otherwise:
# XLA updates either in place inside a decoding loop.
Stored = (
    Float[Array, "layers batch slots heads head_dim"]
    | tuple[Float[Array, "batch slots heads head_dim"], ...]
)


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far.

    Attributes:
        keys: per layer `(batch, slots, kv_heads, head_dim)`.
        values: the same.
        valid: `(batch, slots)`, true where a slot holds a real token.
        length: how many slots are filled, a scalar; the next token goes there.
        next_position: `(batch,)`, the position that each row's next token has.
    """

    keys: Stored
    values: Stored
    valid: Bool[Array, "batch slots"]
    length: Int[Array, ""]
    next_position: Int[Array, "batch"]

    @property
    def slots(self) -> int:
        """How many tokens fit in all."""
        return self.valid.shape[-1]


def empty_cache(
    *,
    layers: int,
    batch: int,
    slots: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    stacked: bool,
) -> Cache:
    """A cache with nothing in it.

    Args:
        layers: how many layers the model has.
        batch: rows.
        slots: how many tokens fit, prompt and new ones together.
        kv_heads: key (and value) heads of a layer.
        head_dim: the width of a head.
        dtype: of keys and values.
        stacked: one array for all layers, for a scanned model.

    Returns:
        A `Cache` with `length` 0.
    """
    shape = (batch, slots, kv_heads, head_dim)

    def zeros() -> Stored:
        if stacked:
            return jnp.zeros((layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    return Cache(
        keys=zeros(),
        values=zeros(),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
        next_position=jnp.zeros((batch,), jnp.int32),
    )


class Page(NamedTuple):
    """One layer's part of a cache, as its attention sees it.

    `layer` is None where `keys` and `values` belong to this layer alone, and this
    layer's index where they are the whole stack.
    """

    keys: Float[Array, "*layers batch slots heads head_dim"]
    values: Float[Array, "*layers batch slots heads head_dim"]
    start: Int[Array, ""]
    layer: Int[Array, ""] | None

    def write(
        self,
        keys: Float[Array, "batch seq heads head_dim"],
        values: Float[Array, "batch seq heads head_dim"],
    ) -> "Page":
        """A page with the new tokens' keys and values in slots `start` onwards."""

        def put(into: Array, new: Array) -> Array:
            at = (0, self.start, 0, 0)
            if self.layer is not None:
                new, at = new[None], (self.layer, *at)
            return jax.lax.dynamic_update_slice(into, new.astype(into.dtype), at)

        return self._replace(keys=put(self.keys, keys), values=put(self.values, values))

    def read(
        self, dtype: jnp.dtype
    ) -> tuple[
        Float[Array, "batch slots heads head_dim"],
        Float[Array, "batch slots heads head_dim"],
    ]:
        """All slots of this layer, those not yet filled included."""

        def get(whole: Array) -> Array:
            if self.layer is not None:
                whole = jax.lax.dynamic_index_in_dim(whole, self.layer, keepdims=False)
            return whole.astype(dtype)

        return get(self.keys), get(self.values)
