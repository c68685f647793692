"""What initializers give, put into the arrays of an adapter."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import initializers
from ._sites import Slot


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def assembled(
    made: Sequence[initializers.Start],
    ranks: jax.Array,
    frame: Slot,
    places: tuple[tuple[int, ...], ...],
    rank: int,
    dtype: Any,
) -> dict[str, jax.Array]:
    """The arrays `a` and `b`, and `a0` and `b0` where an initializer gives them.

    They are zero beyond the rank of each layer, and in layers that none gave.

    Args:
        made: factors of some layers each, `(layers, *apart, d_in, any rank)`.
        ranks: of all layers, shape `(layers,)`.
        frame: the slot, without what tells it from others of one shape.
        places: of which layers the factors are.
        rank: the largest of all ranks, which the arrays have.
        dtype: theirs.
    """
    out: dict[str, jax.Array] = {}
    for pair in (("a", "b"), ("a0", "b0")):
        if any(getattr(found, pair[0]) is not None for found in made):
            both = []
            for name in pair:
                axis = -1 if name.startswith("a") else -2
                parts = [getattr(found, name) for found in made]
                both.append(_layers(parts, ranks, places, axis, rank, dtype))
            out |= zip(pair, frame.arrays(*both), strict=True)
    return out


def _layers(
    parts: Sequence[jax.Array | None],
    ranks: jax.Array,
    places: tuple[tuple[int, ...], ...],
    axis: int,
    rank: int,
    dtype: Any,
) -> jax.Array:
    """One factor of all layers, `axis` that along which the ranks lie."""
    like = next(part for part in parts if part is not None)
    shape = list(like.shape)
    shape[0], shape[axis] = len(ranks), rank
    whole = jnp.zeros(shape, dtype)
    for part, layers in zip(parts, places, strict=True):
        if part is None:
            continue
        most = min(part.shape[axis], rank)
        part = lax.slice_in_dim(part, 0, most, axis=axis % part.ndim)
        at: list[Any] = [slice(None)] * part.ndim
        at[0], at[axis] = jnp.asarray(layers), slice(0, most)
        whole = whole.at[tuple(at)].set(part.astype(dtype))
    its_own = ranks.reshape(-1, *(1,) * (whole.ndim - 1))
    ahead = lax.broadcasted_iota(jnp.int32, whole.shape, axis % whole.ndim)
    return jnp.where(ahead < its_own, whole, 0)
