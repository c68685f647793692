"""A and B of one adapted leaf, as its initializers give them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import PRNGKeyArray

from .. import initializers
from .._errors import PlanError
from ..adapters import on_device, stable_hash
from ._layer_matrices import layer_matrices
from ._sites import Site, Slot


def draw(
    slot: Slot, leaf: Any, key: PRNGKeyArray, dtype: Any, stats: Any
) -> dict[str, jax.Array]:
    """`a` and `b`, and `a0` and `b0` where an initializer has starting factors.

    Layers whose initializers have none get zeros in their places.

    Args:
        slot: what is to be adapted.
        leaf: the weight there.
        key: PRNG key, the same for all slots.
        dtype: storage dtype.
        stats: the state of a statistic, or `None`.
    """
    # Layers that start alike are made in one call.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, site in enumerate(slot.sites):
        if site is not None:
            alike.setdefault((site.rank, site.scale, site.init), []).append(i)
    made = []
    for (rank, scale, init), layers in alike.items():
        method = initializers.method(init)
        keys = jnp.stack([_site_key(key, slot.sites[i], slot) for i in layers])
        if method.reads == "shape":
            begin = (slot.role.lookup and method.lookup) or method.start
            found = _from_shape(slot, begin, rank, scale, keys)
        else:
            state = stats if method.reads == "stats" else None
            found = _from_weight(slot, leaf, method, rank, scale, keys, layers, state)
        made.append((layers, rank, found))
    out = {}
    for pair in (("a", "b"), ("a0", "b0")):
        if any(getattr(found, pair[0]) is not None for _, _, found in made):
            both = (_gathered(slot, made, name, dtype) for name in pair)
            out |= zip(pair, slot.arrays(*both), strict=True)
    return out


def _from_shape(
    slot: Slot, begin: Callable, rank: int, scale: float, keys: jax.Array
) -> initializers.Start:
    """Of an initializer that reads no weight, mapped over layers, experts, groups."""
    weight = jax.ShapeDtypeStruct(slot.sides, slot.dtype)

    def one(key):
        return begin(weight, rank=rank, scale=scale, key=key)

    for _ in (0, *slot.apart):
        one = jax.vmap(one)
    return one(keys)


def _from_weight(
    slot: Slot,
    leaf: Any,
    method: initializers.Method,
    rank: int,
    scale: float,
    keys: jax.Array,
    layers: list[int],
    state: Any,
) -> initializers.Start:
    """Of an initializer that reads the weight, one matrix after the other."""
    if not all(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(leaf)):
        raise PlanError(
            f"The weight at {slot.role.path!r} is known by its type alone, and the "
            f"initializer of {slot.name!r} reads its values. Give `init` the "
            "parameters themselves, or take their types through "
            "`jax.eval_shape(lambda params: lj.init(plan, params, key=key), params)`."
        )
    at = jnp.asarray(layers, jnp.int32)
    if state is not None:
        state = jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[len(slot.layers) :])[at], state
        )
    leaf = leaf if isinstance(leaf, Tracer) else on_device(leaf)
    # The path would tell leaves of one shape apart, each with a program of its own.
    role = dataclasses.replace(slot.role, path="")
    try:
        return _read(leaf, at, keys, state, role, method.start, rank, scale)
    except ValueError as error:
        raise PlanError(f"{slot.name!r} cannot be started: {error}") from error


@functools.partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _read(leaf, layers, keys, stats, role, begin, rank, scale) -> initializers.Start:
    """The starts of some layers, in one program for all leaves of a shape."""

    def one(given):
        weight, key, state = given
        return begin(weight, rank=rank, scale=scale, key=key, stats=state)

    def every(leaf, layers, keys, stats):
        def of_layer(given):
            layer, key, state = given
            weights = layer_matrices(leaf, layer, role)
            apart = weights.shape[:-2]
            flat = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[len(apart) :]), (weights, key, state)
            )
            found = lax.map(one, flat)
            return jax.tree.map(lambda x: x.reshape(*apart, *x.shape[1:]), found)

        return lax.map(of_layer, (layers, keys, stats))

    mesh = _explicit_mesh(leaf)
    if mesh is None:
        return every(leaf, layers, keys, stats)
    # Decompositions know no layouts over a mesh: XLA chooses them.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed: Any = jax.sharding.auto_axes(every, out_sharding=whole)
    return placed(leaf, layers, keys, stats)


def _explicit_mesh(leaf: Any) -> Any:
    """The mesh over which a weight is laid out by explicit axes, if it is."""
    for array in jax.tree.leaves(leaf):
        mesh = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def _gathered(slot: Slot, made: list[Any], name: str, dtype: Any) -> jax.Array:
    """One factor of all layers, zeros beyond their ranks and where there is none."""
    d_in, d_out = slot.sides
    count, left = len(slot.sites), name.startswith("a")
    sides = (d_in, slot.rank) if left else (slot.rank, d_out)
    whole = jnp.zeros((count, *slot.apart, *sides), dtype)
    for layers, rank, found in made:
        value = getattr(found, name)
        if value is None:
            continue
        extra = (0, slot.rank - rank)
        pad = ((0, 0), extra) if left else (extra, (0, 0))
        none = [(0, 0)] * (1 + len(slot.apart))
        # A copy: what is trained is donated, its start is not.
        value = jnp.pad(value.astype(dtype), [*none, *pad])
        if len(layers) == count:
            whole = jnp.array(value, copy=True)
        else:
            whole = whole.at[jnp.asarray(layers)].set(value)
    return whole


def _site_key(key: PRNGKeyArray, site: Site | None, slot: Slot) -> PRNGKeyArray:
    assert site is not None
    key = jax.random.fold_in(key, stable_hash(site.name))
    return jax.random.split(key, slot.apart) if slot.apart else key
