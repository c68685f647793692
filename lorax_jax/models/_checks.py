"""What the arguments of a model must be, and what to say when they are not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from ._cache import Cache


def check_tree(params: Any, shapes: Any, path: str = "") -> None:
    """Raises where `params` is not a tree of arrays with the model's own keys.

    Args:
        params: what the caller passed.
        shapes: the tree that the model has.
        path: where in the tree this is.
    """
    if not isinstance(shapes, Mapping):
        if isinstance(params, jax.Array | np.ndarray):
            return
        raise ValueError(
            f"`params` holds an object of type {type(params).__name__} at {path}; "
            "the model expects an array. A tree of anything else needs a function "
            "transformed to understand it in place of `model.apply`."
        )
    if not isinstance(params, Mapping):
        raise ValueError(
            f"`params` holds a {type(params).__name__} at {path or 'its root'}, where "
            f"the model expects a dictionary with the keys {sorted(shapes)}."
        )
    if params.keys() != shapes.keys():
        missing = sorted(shapes.keys() - params.keys())
        extra = sorted(params.keys() - shapes.keys())
        raise ValueError(
            f"`params` does not fit the model at {path or 'its root'}: "
            f"missing {missing}, unexpected {extra}. Was it made with the same config "
            "and the same `scan_layers`?"
        )
    for key, below in shapes.items():
        check_tree(params[key], below, f"{path}/{key}" if path else key)


def checked_ids(ids: Any) -> Int[Array, "batch seq"]:
    """`ids` as a JAX array."""
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`ids` must be integers of shape (batch, seq); got {ids.dtype} of shape "
            f"{ids.shape}. For one sequence pass `ids[None]`."
        )
    return ids


def checked_mask(mask: Any, ids: Array) -> Bool[Array, "batch seq"] | None:
    """`mask` as bools; a tokenizer's zeros and ones are taken too."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.shape != ids.shape or jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(
            f"`mask` must mark the real tokens of `ids`, shape {ids.shape}, with bools "
            f"or 0 and 1; got {mask.dtype} of shape {mask.shape}. With a cache it "
            "covers the new tokens only."
        )
    return mask.astype(bool)


def checked_integers(name: str, value: Any, ids: Array) -> Int[Array, "batch seq"]:
    """The argument `name`, one integer a token, as int32."""
    value = jnp.asarray(value)
    whole = jnp.issubdtype(value.dtype, jnp.integer)
    if value.shape != ids.shape or not whole:
        raise ValueError(
            f"`{name}` must be integers of the shape of `ids`, {ids.shape}; got "
            f"{value.dtype} of shape {value.shape}."
        )
    return value.astype(jnp.int32)


def check_positions(
    length: int, limit: int, model: str, attribute: str, advice: str = ""
) -> None:
    """Raises if a model has no vector for the last of `length` positions."""
    if length > limit:
        raise ValueError(
            f"{length} tokens were asked for, but this {model} has learned "
            f"{limit} positions (`{attribute}`). {advice or 'Pass shorter rows.'}"
        )


def check_room(cache: Cache, batch: int, seq: int) -> None:
    """Raises if `seq` more tokens do not fit in the cache, as far as can be known."""
    if cache.valid.shape[0] != batch:
        raise ValueError(
            f"`ids` has {batch} rows but `cache` was made for {cache.valid.shape[0]}."
        )
    # Under jit the length is not known; writing past the end would then overwrite the
    # last slots, so `generate` checks before it starts.
    known = not isinstance(cache.length, Tracer)
    used = int(cache.length) if known else 0
    if used + seq > cache.slots:
        raise ValueError(
            f"`cache` has {cache.slots} slots, {used} of them used; {seq} more tokens "
            f"do not fit. Make it longer: model.init_cache({batch}, {used + seq})."
        )
