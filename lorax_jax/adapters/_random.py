"""Keys that depend on names, not on the order of sites."""

import hashlib

import jax

from ._role import Role


def dropout_keys(key: jax.Array, role: Role, layers: tuple[int, ...]) -> jax.Array:
    """A key for each layer of a weight, shape `layers`."""
    key = jax.random.fold_in(key, stable_hash(role.name))
    return jax.random.split(key, layers) if layers else key


def stable_hash(text: str) -> int:
    """32 bits of `text`, the same in every process, for `jax.random.fold_in`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
