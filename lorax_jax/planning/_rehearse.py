"""Whether `adapt` will take what a plan promises: a rehearsal on types."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..adapters import Adapted, Adapter, Fixed, Origin, bind
from ..transform import Reading
from ._sites import Slot


def rehearse(
    reading: Reading,
    slots: Sequence[Slot],
    dtype: Any,
    materialize: str | Iterable[str],
    custom: str,
) -> str | None:
    """Why `adapt` will refuse a function with these weights adapted, or `None`.

    Args:
        reading: the function.
        slots: the adapted weights.
        dtype: of the factors.
        materialize: as in `adapt`.
        custom: as in `adapt`.
    """
    leaves = dict(reading.inputs)
    weights: dict[str, Any] = {}
    for slot in slots:
        path = slot.role.path
        if slot.role.kind != "whole":  # an array in place of an array
            weights[path] = _weight(weights.get(path, leaves[path]), slot, dtype)
    reason = reading.refusal(weights, materialize=materialize, custom=custom)
    if reason is None:
        return None
    return (
        f"`adapt` will refuse this function with these targets.\n{reason}\n"
        "What `adapt` is told, tell `plan` as well: plan(..., materialize=..., "
        "custom=...)."
    )


def _weight(base: Any, slot: Slot, dtype: Any) -> Adapted:
    """The adapted weight, as types."""
    role = dataclasses.replace(slot.role, path="")  # a tree that is one leaf
    shapes = slot.shapes()
    train: dict[str, Any] = {
        name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()
    }
    fixed: dict[str, Any] = {
        "scale": jax.ShapeDtypeStruct(slot.layers, jnp.float32),
        "rank": jax.ShapeDtypeStruct(slot.layers, jnp.int32),
    }
    for name in slot.frozen:
        shape = slot.shape_a() if name == "a" else slot.shape_b()
        fixed[name] = jax.ShapeDtypeStruct(shape, dtype)
    if role.kind == "rows":
        fixed = {"ids": jax.ShapeDtypeStruct((len(slot.ids),), jnp.int32)}
    elif role.kind == "dora":
        fixed["norm"] = jax.ShapeDtypeStruct(shapes["magnitude"], jnp.float32)
    adapter = Adapter({role.name: train}, {role.name: Fixed(role, fixed)})
    bound = jax.eval_shape(bind, base, adapter)
    base = base.base if isinstance(base, Adapted) else base
    return Adapted(base, bound.terms, Origin(slot.role.path))
