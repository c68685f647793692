"""Recognizing the base that an adapter was trained on."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.core import Tracer

from ..planning import Slot
from ..replication import Replicated

SAMPLES = 32


def fingerprints(slot: Slot, leaves: Mapping[str, Any]) -> list[str] | None:
    """A few values of each site's weight, as hexadecimal digits of bfloat16.

    Each layer of a stack has the fingerprint of an unrolled model, and a checkpoint
    nearly the same one in whichever floating dtype it is loaded.

    Args:
        slot: an adapted leaf.
        leaves: the parameters by path.

    Returns:
        A fingerprint for each position in the slot, or `None` where there are no values
        to read: types alone, a quantized weight, parts on other hosts; and for a leaf
        that is trained whole, whose base is not used.
    """
    if slot.role.kind == "whole":
        return None
    leaf: Any = leaves.get(slot.role.path)
    held = leaf.stack.array if isinstance(leaf, Replicated) else leaf
    if not isinstance(held, jax.Array | np.ndarray) or isinstance(held, Tracer):
        return None
    here = getattr(held, "is_fully_addressable", True)
    if not here or not held.size or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    stacked = slot.role.leaf.stacked
    kept = [n for axis, n in enumerate(slot.shape) if axis not in stacked]
    # Spread over the weight, from its first value to its last.
    flat = np.arange(SAMPLES) * (math.prod(kept) - 1) // (SAMPLES - 1)
    within = iter(np.unravel_index(flat, kept))
    count = max(1, math.prod(slot.layers))
    layers = iter(np.unravel_index(np.arange(count), slot.layers or (1,)))
    index = tuple(
        next(layers)[:, None] if axis in stacked else next(within)[None, :]
        for axis in range(len(slot.shape))
    )
    values = np.asarray(leaf[index]).astype(ml_dtypes.bfloat16)  # (sites, samples)
    return [row.tobytes().hex() for row in np.broadcast_to(values, (count, SAMPLES))]


def differ(one: str, other: str) -> bool:
    """Whether two fingerprints are those of different weights.

    A weight that was rounded twice (to float16 and then to bfloat16, say) may differ
    from itself by a unit in the last place, here and there.

    >>> ones = np.ones(SAMPLES, ml_dtypes.bfloat16)
    >>> differ(ones.tobytes().hex(), (2 * ones).tobytes().hex())
    True
    """
    try:
        x, y = (
            np.frombuffer(bytes.fromhex(text), ml_dtypes.bfloat16).astype(np.float32)
            for text in (one, other)
        )
        far = np.abs(x - y) > np.maximum(2**-7 * np.abs(x), 1e-7)
    except ValueError:  # not what `fingerprints` writes
        return True
    return bool(far.any() or (x != y).mean() > 0.25 or x.size != SAMPLES)
