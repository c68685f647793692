"""How the arrays of one adapted leaf start, for each kind of adapter."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .. import initializers
from ..adapters import (
    Role,
    base_norm,
    column_norm,
    is_weight,
    on_device,
    stable_hash,
)
from ..structure import Factor
from ._sites import Site, Slot

Start = tuple[dict[str, jax.Array], dict[str, jax.Array]]


def start(slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any) -> Start:
    """The arrays that are trained, and those that are kept beside them.

    Args:
        slot: what is to be adapted.
        leaf: the weight there.
        key: PRNG key, the same for all slots.
        dtype: storage dtype of what is trained.
    """
    return _START[slot.role.kind](slot, leaf, key, dtype)


def _lora(slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any) -> Start:
    del leaf
    train = _draw(slot, key, dtype)
    if slot.bias:
        train["bias"] = jnp.zeros(slot.shapes()["bias"], dtype)
    return train, _fixed(slot)


def _dora(slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any) -> Start:
    """The magnitudes start as the norms of the starting columns, so the gain is 1."""
    train, fixed = _lora(slot, leaf, key, dtype)
    leaf = on_device(leaf)
    fixed["norm"] = base_norm(leaf, slot.role)
    norm = _started(leaf, train["a"], train["b"], fixed, slot.role)
    # Layers that are not adapted have zeros everywhere, which no optimizer moves.
    axes = (*slot.role.batch, *slot.role.outputs)
    adapted = Factor(fixed["rank"], slot.role.stacked).aligned(axes) > 0
    return train | {"magnitude": jnp.where(adapted, norm, 0).astype(dtype)}, fixed


@functools.partial(jax.jit, static_argnums=4)
def _started(weight: Any, a, b, fixed: Any, role: Role) -> jax.Array:
    return column_norm(weight, a, b, fixed["scale"], fixed["norm"], role)


def _whole(slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any) -> Start:
    """The copy starts as the leaf."""
    del key
    leaf = leaf.dense() if is_weight(leaf) else leaf
    if len(slot.adapted) == len(slot.sites):
        return {"whole": _copy(leaf, dtype)}, {}
    layers = jnp.asarray(slot.adapted, jnp.int32)
    whole = jnp.take(leaf, layers, axis=slot.role.stacked[0])
    return {"whole": _copy(whole, dtype)}, {"layers": layers}


def _rows(slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any) -> Start:
    """The rows start as those of the table."""
    del key
    ids = jnp.asarray(slot.ids, jnp.int32)
    dense = leaf.dense() if is_weight(leaf) else leaf
    rows = jnp.take(dense, ids, axis=slot.role.inputs[0])
    rows = jnp.moveaxis(rows, slot.role.inputs[0], 0)
    return {"rows": _copy(rows, dtype)}, {"ids": ids}


def _copy(leaf: Any, dtype: Any) -> jax.Array:
    """A copy even where the dtype is the same: optimizers donate what they train."""
    return jnp.array(leaf, dtype, copy=True)


_START: dict[str, Callable[..., Start]] = {
    "lora": _lora,
    "dora": _dora,
    "whole": _whole,
    "rows": _rows,
}


def _draw(slot: Slot, key: PRNGKeyArray, dtype: Any) -> dict[str, jax.Array]:
    d_in, d_out = slot.sides
    weight = jax.ShapeDtypeStruct((d_in, d_out), slot.dtype)
    # Layers that start alike are drawn in one call, mapped over their keys.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, site in enumerate(slot.sites):
        if site is not None:
            alike.setdefault((site.rank, site.scale, site.init), []).append(i)
    count = len(slot.sites)
    a = jnp.zeros((count, *slot.apart, d_in, slot.rank), dtype)
    b = jnp.zeros((count, *slot.apart, slot.rank, d_out), dtype)
    for (rank, scale, method), layers in alike.items():
        draw = _initializer(slot, method)

        def start(key, draw=draw, rank=rank, scale=scale):
            return draw(weight, rank=rank, scale=scale, key=key)

        keys = jnp.stack([_site_key(key, slot.sites[i], slot) for i in layers])
        for _ in slot.apart:
            start = jax.vmap(start)
        found = jax.vmap(start)(keys)
        pad = [(0, 0)] * (1 + len(slot.apart))
        extra = (0, slot.rank - rank)
        new_a = jnp.pad(found.a.astype(dtype), [*pad, (0, 0), extra])
        new_b = jnp.pad(found.b.astype(dtype), [*pad, extra, (0, 0)])
        if len(layers) == count:
            a, b = new_a, new_b
        else:
            at = jnp.array(layers)
            a, b = a.at[at].set(new_a), b.at[at].set(new_b)
    a, b = slot.arrays(a, b)
    return {"a": a, "b": b}


def _initializer(slot: Slot, method: Any) -> Callable[..., initializers.Start]:
    found = initializers.method(method)
    return (slot.role.lookup and found.lookup) or found.start


def _site_key(key: PRNGKeyArray, site: Site | None, slot: Slot) -> PRNGKeyArray:
    assert site is not None
    key = jax.random.fold_in(key, stable_hash(site.name))
    return jax.random.split(key, slot.apart) if slot.apart else key


def _fixed(slot: Slot) -> dict[str, jax.Array]:
    def over_layers(values, dtype):
        return jnp.asarray(values, dtype).reshape(slot.layers)

    sites = slot.sites
    fixed = {
        "scale": over_layers([s.scale if s else 0.0 for s in sites], jnp.float32),
        "rank": over_layers([s.rank if s else 0 for s in sites], jnp.int32),
    }
    if any(site is not None and site.dropout for site in sites):
        rates = [site.dropout if site else 0.0 for site in sites]
        fixed["dropout"] = over_layers(rates, jnp.float32)
    return fixed
