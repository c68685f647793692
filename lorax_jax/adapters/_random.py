"""Keys that depend on names, not on the order of sites."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import AdapterError
from ._role import Role


def dropout_keys(key: jax.Array, role: Role, layers: tuple[int, ...]) -> jax.Array:
    """A key for each layer of a weight, shape `layers`."""
    key = jax.random.fold_in(key, stable_hash(role.name))
    return jax.random.split(key, layers) if layers else key


def stable_hash(text: str) -> int:
    """32 bits of `text`, the same in every process, for `jax.random.fold_in`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def as_key(key: Any, where: str) -> jax.Array:
    """A single PRNG key, of the new style whichever was given.

    Args:
        key: `jax.random.key(0)`, or the two integers of `jax.random.PRNGKey(0)`.
        where: the argument, for the message.

    Raises:
        AdapterError: if it is neither.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ():
        return key
    if dtype == jnp.uint32 and shape is not None and len(shape) == 1:
        return jax.random.wrap_key_data(key)
    found = f"{key!r:.60}" if dtype is None else f"an array {dtype}{list(shape or ())}"
    raise AdapterError(
        f"{where} is {found}; one PRNG key is meant, as `jax.random.key(0)` gives."
    )
