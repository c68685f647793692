"""Some entries of a leaf, which tell a model from others of its shapes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._automatic import automatic
from .._errors import PlanError
from ..adapters import is_weight

_MOST = 16


def places(shape: tuple[int, ...]) -> list[int]:
    """Which entries of an array are looked at: their numbers in row-major order."""
    size = math.prod(shape)
    count = min(_MOST, size)
    # Not evenly spaced: initial weights may repeat with a period.
    return [(i * i * 7919 + i * size // count) % size for i in range(count)]


def witness(leaf: Any) -> jax.Array:
    """The entries of a leaf at its `places`, float32; of a packed one, of its codes."""
    array, count = leaf, len(places(tuple(leaf.shape)))
    if is_weight(leaf):
        array = next(x for x in jax.tree.leaves(leaf) if jnp.ndim(x) > 0)
    at = np.unravel_index(places(jnp.shape(array)), jnp.shape(array))
    found = automatic(lambda x: x[at].astype(jnp.float32), jnp.asarray(array))
    return jnp.pad(found, (0, max(count - found.size, 0)))[:count]


def check_witness(name: str, leaf: Any, seen: Any) -> None:
    """Raises where statistics were gathered on other values than the leaf's.

    Types and traced values do not tell.

    Raises:
        PlanError: if they differ.
    """
    arrays = [seen, *jax.tree.leaves(leaf)]
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in arrays):
        return
    found = np.asarray(witness(leaf))
    if not np.array_equal(found, np.asarray(seen), equal_nan=True):
        raise PlanError(
            f"The statistics of {name!r} were gathered on another model: `params` has "
            "other values there. Gather them on the parameters that `init` is given."
        )
