"""`init`: from a plan to the starting adapter."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from .. import _paths, initializers
from .._errors import PlanError
from ..adapters import Adapter, Fixed, as_key, stable_hash
from ._plan import Plan
from ._sites import Site, Slot


def init(plan: Plan, params: Any, *, key: PRNGKeyArray) -> Adapter:
    """Draws the starting adapter of a plan.

    Each site draws from `key` folded with its own path, at its own rank, so the same
    model starts the same way whether its layers are stacked or unrolled, alone or with
    other sites, and on one device or many.

    Args:
        plan: where the adapter acts.
        params: the parameter tree that it was planned on; never changed.
        key: PRNG key.

    Returns:
        An `Adapter`. Sites of a stack with smaller ranks than the largest are padded
        with zeros in A and B alike, which no optimizer moves: their gradients are zero.

    Raises:
        PlanError: if `params` is not the tree of the plan.
        AdapterError: if `key` is no PRNG key.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'w': {'a': (3, 1), 'b': (1, 2)}}
    """
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in _paths.flatten(params)[0]
        if hasattr(leaf, "shape")
    }
    key = as_key(key, "`init(..., key=)`")
    train, fixed = {}, {}
    for slot in plan.slots:
        if shapes.get(slot.role.path) != slot.shape:
            raise PlanError(
                f"The plan has {slot.role.path!r} with shape {slot.shape}, and "
                f"`params` has {shapes.get(slot.role.path, 'no such leaf')}. Give "
                "`init` the parameters that the plan was made on."
            )
        train[slot.name] = _draw(slot, key, plan.config.dtype)
        fixed[slot.name] = Fixed(slot.role, _fixed(slot))
    return Adapter(train, fixed)


def _draw(slot: Slot, key: PRNGKeyArray, dtype: Any) -> dict[str, jax.Array]:
    d_in, d_out = 1, 1
    for n in slot.inputs:
        d_in *= n
    for n in slot.outputs:
        d_out *= n
    weight = jax.ShapeDtypeStruct((d_in, d_out), slot.dtype)
    # Layers that start alike are drawn in one call, mapped over their keys.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, site in enumerate(slot.sites):
        if site is not None:
            alike.setdefault((site.rank, site.scale, site.init), []).append(i)
    count = len(slot.sites)
    a = jnp.zeros((count, *slot.experts, d_in, slot.rank), dtype)
    b = jnp.zeros((count, *slot.experts, slot.rank, d_out), dtype)
    for (rank, scale, method), layers in alike.items():
        draw = _initializer(slot, method)

        def start(key, draw=draw, rank=rank, scale=scale):
            return draw(weight, rank=rank, scale=scale, key=key)

        keys = jnp.stack([_site_key(key, slot.sites[i], slot) for i in layers])
        for _ in slot.experts:
            start = jax.vmap(start)
        found = jax.vmap(start)(keys)
        pad = [(0, 0)] * (1 + len(slot.experts))
        extra = (0, slot.rank - rank)
        new_a = jnp.pad(found.a.astype(dtype), [*pad, (0, 0), extra])
        new_b = jnp.pad(found.b.astype(dtype), [*pad, extra, (0, 0)])
        if len(layers) == count:
            a, b = new_a, new_b
        else:
            at = jnp.array(layers)
            a, b = a.at[at].set(new_a), b.at[at].set(new_b)
    return {"a": a.reshape(slot.shape_a()), "b": b.reshape(slot.shape_b())}


def _initializer(slot: Slot, method: Any) -> Callable[..., initializers.Start]:
    start = initializers.get(method)
    if not slot.role.lookup:
        return start
    zero = start is not initializers.random
    return functools.partial(initializers.embedding, zero=zero)


def _site_key(key: PRNGKeyArray, site: Site | None, slot: Slot) -> PRNGKeyArray:
    assert site is not None
    name = f"{site.path}@{site.use}" if site.use else site.path
    key = jax.random.fold_in(key, stable_hash(name))
    return jax.random.split(key, slot.experts) if slot.experts else key


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
