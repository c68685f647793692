"""Why a number of a run is none: the base, its arithmetic, or the learning."""

from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from ._errors import TrainingError


def diverged(what: str, value: float, updates: int, params: Any) -> TrainingError:
    """The error for a loss or a gradient that is NaN or infinite.

    Args:
        what: what was measured, for the message.
        value: what it is.
        updates: how many were made before; if none, no learning rate is to blame.
        params: the base.

    Returns:
        An error to raise.
    """
    path = nonfinite_leaf(params)
    if path is not None:
        advice = f"The base holds NaN or infinity in {path}; load another."
    elif updates:
        advice = "Lower the learning rate or alpha, or train in float32."
    else:
        advice = (
            "No update was made yet, and the base holds only finite numbers: they "
            "overflow on the way. Lower alpha, or load the base in float32."
        )
    return TrainingError(f"{what} is {value}. {advice}")


def nonfinite_leaf(params: Any) -> str | None:
    """The path of the first leaf that holds NaN or infinity; `None` if none does.

    >>> nonfinite_leaf({"a": jnp.ones(2), "b": {"c": jnp.array([1.0, jnp.inf])}})
    'b/c'
    """
    for path, leaf in _paths.flatten(params)[0]:
        leaf = jnp.asarray(leaf)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        if floating and not bool(_is_finite(leaf)):
            return path
    return None


@jax.jit
def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.isfinite(leaf).all()
