"""How much a parameter tree holds, with what it holds twice counted once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..quant import Base
from ._adapted import is_weight


def stored(params: Any) -> tuple[int, int]:
    """Numbers of values and of bytes of a parameter tree.

    An array that stands in several places counts once, and so do layers that are
    replicated. Types and traced values do not say whether they are one array, so each
    place of theirs counts.

    >>> w = jnp.ones((2, 3))
    >>> stored({"a": w, "b": w, "c": jnp.ones(2)})
    (8, 32)
    """
    seen: set[int] = set()
    values = size = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_weight):
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            continue
        arrays = jax.tree.leaves(leaf)
        known = all(isinstance(x, jax.Array | np.ndarray) for x in arrays)
        if known and not any(isinstance(x, Tracer) for x in arrays):
            if all(id(x) in seen for x in arrays):
                continue
            seen.update(map(id, arrays))
        values += leaf.size if isinstance(leaf, Base) else math.prod(leaf.shape)
        size += sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays)
    return values, size
