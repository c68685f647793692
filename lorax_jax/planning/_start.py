"""How the arrays of one adapted leaf start, for each kind of adapter."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..adapters import (
    Fixed,
    Role,
    base_norm,
    column_norm,
    factors,
    is_weight,
    on_device,
)
from ..adapters import Site as BoundSite
from ..structure import Factor
from ._sites import Slot

Start = tuple[dict[str, jax.Array], dict[str, jax.Array]]


Drawn = Callable[[], dict[str, jax.Array]]


def start(slot: Slot, leaf: Any, dtype: Any, drawn: Drawn) -> Start:
    """The arrays that are trained, and those that are kept beside them.

    Args:
        slot: what is to be adapted.
        leaf: the weight there.
        dtype: storage dtype of what is trained.
        drawn: gives A and B as their initializers start them, for kinds that have them.
    """
    return _START[slot.role.kind](slot, leaf, dtype, drawn)


def _lora(slot: Slot, leaf: Any, dtype: Any, drawn: Drawn) -> Start:
    train, fixed = drawn(), _fixed(slot)
    for name in ("a0", "b0"):
        if name in train:
            fixed[name] = train.pop(name)
    for name in slot.frozen:
        fixed[name] = train.pop(name)
    if slot.bias:
        train["bias"] = jnp.zeros(slot.shapes()["bias"], dtype)
    return train, fixed


def _dora(slot: Slot, leaf: Any, dtype: Any, drawn: Drawn) -> Start:
    """The magnitudes start as the norms of the starting columns, so the gain is 1."""
    train, fixed = _lora(slot, leaf, dtype, drawn)
    leaf = on_device(leaf)
    fixed["norm"] = base_norm(leaf, slot.role)
    norm = _started(leaf, train, fixed, slot.role)
    # Layers that are not adapted have zeros everywhere, which no optimizer moves.
    axes = (*slot.role.batch, *slot.role.outputs)
    adapted = Factor(fixed["rank"], slot.role.stacked).aligned(axes) > 0
    return train | {"magnitude": jnp.where(adapted, norm, 0).astype(dtype)}, fixed


@functools.partial(jax.jit, static_argnums=3)
def _started(weight: Any, train: Any, fixed: Any, role: Role) -> jax.Array:
    a, b = factors(BoundSite(weight, train, Fixed(role, fixed), 1.0, None))
    return column_norm(weight, a, b, fixed["scale"], fixed["norm"], role)


def _whole(slot: Slot, leaf: Any, dtype: Any, drawn: Drawn) -> Start:
    """The copy starts as the leaf."""
    del drawn
    leaf = leaf.dense() if is_weight(leaf) else leaf
    if len(slot.adapted) == len(slot.sites):
        return {"whole": _copy(leaf, dtype)}, {}
    layers = jnp.asarray(slot.adapted, jnp.int32)
    whole = jnp.take(leaf, layers, axis=slot.role.stacked[0])
    return {"whole": _copy(whole, dtype)}, {"layers": layers}


def _rows(slot: Slot, leaf: Any, dtype: Any, drawn: Drawn) -> Start:
    """The rows start as those of the table."""
    del drawn
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
