"""Masks: which tokens count."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import CaptureError


def checked_mask(mask: Any) -> jax.Array:
    """A mask in float32: booleans, or weights from 0 up.

    Raises:
        CaptureError: if it is something else.
    """
    found = mask if hasattr(mask, "dtype") else np.asarray(mask)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    text = np.dtype(found.dtype).kind in "OSU"
    real = not text and any(jnp.issubdtype(found.dtype, kind) for kind in kinds)
    if not real or not np.shape(found):
        raise CaptureError(
            f"`mask` is {mask!r:.60}; an array with an entry for each token is meant, "
            "booleans or weights from 0 up."
        )
    found = jnp.asarray(found, jnp.float32)
    if not isinstance(found, Tracer) and not bool((found >= 0).all()):
        raise CaptureError(
            "`mask` holds negative entries or NaN; weights of tokens are numbers from "
            "0 up."
        )
    return found
