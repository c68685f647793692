"""A and B of one adapted leaf, as its initializers give them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
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


def ranks_in_common(
    slots: Sequence[Slot], stats: Mapping[str, Any]
) -> dict[str, dict[Any, int]]:
    """For each slot, the rank at which a nested initializer starts its layers.

    The largest of all weights that can share a program: of one shape, with axes in the
    same roles and statistics of the same shape.

    Args:
        slots: what is adapted.
        stats: name of a slot -> the state of a statistic.
    """
    found: dict[str, dict[Any, int]] = {}
    shared: dict[Any, dict[Any, int]] = {}
    for slot in slots:
        state = jax.tree.leaves(stats.get(slot.name))
        shapes = tuple(jnp.shape(x)[len(slot.layers) :] for x in state)
        like = dataclasses.replace(slot.role, path=""), slot.sides, slot.apart, shapes
        ranks = found[slot.name] = shared.setdefault(like, {})
        for site in slot.sites:
            if site is not None and initializers.method(site.init).nested:
                ranks[site.init] = max(site.rank, ranks.get(site.init, 0))
    return found


def draw(
    slot: Slot,
    leaf: Any,
    key: PRNGKeyArray,
    dtype: Any,
    stats: Any,
    common: Mapping[Any, int],
) -> dict[str, jax.Array]:
    """`a` and `b`, and `a0` and `b0` where an initializer has starting factors.

    Layers whose initializers have none get zeros in their places.

    Args:
        slot: what is to be adapted.
        leaf: the weight there.
        key: PRNG key, the same for all slots.
        dtype: storage dtype.
        stats: the state of a statistic, or `None`.
        common: initializer -> the rank at which its layers start, to be cut.
    """
    # Layers that start alike are made in one call.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, site in enumerate(slot.sites):
        if site is not None:
            shape_alone = initializers.method(site.init).reads == "shape"
            scale = site.scale if shape_alone else None
            rank = common.get(site.init, site.rank)
            alike.setdefault((rank, scale, site.init), []).append(i)
    made = []
    for (rank, scale, init), layers in alike.items():
        method = initializers.method(init)
        keys = jnp.stack([_site_key(key, _of(slot, i), slot) for i in layers])
        if method.reads == "shape":
            begin = (slot.role.lookup and method.lookup) or method.start
            found = _from_shape(slot, begin, rank, scale, keys)
        else:
            state = stats if method.reads == "stats" else None
            found = _from_weight(slot, leaf, method, rank, keys, layers, state)
        made.append((layers, _cut(found, slot, layers, rank)))
    out = {}
    for pair in (("a", "b"), ("a0", "b0")):
        if any(getattr(found, pair[0]) is not None for _, found in made):
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
    scales = jnp.asarray([_of(slot, i).scale for i in layers], jnp.float32)
    leaf = leaf if isinstance(leaf, Tracer) else on_device(leaf)
    # The path would tell leaves of one shape apart, each with a program of its own.
    role = dataclasses.replace(slot.role, path="")
    try:
        return _read(leaf, (at, scales, keys, state), role, method.start, rank)
    except ValueError as error:
        raise PlanError(f"{slot.name!r} cannot be started: {error}") from error


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _read(leaf, layers, role, begin, rank) -> initializers.Start:
    """The starts of some layers, in one program for all leaves of a shape."""

    def every(leaf, layers):
        def of_layer(given):
            layer, scale, key, state = given

            def one(given):
                weight, key, state = given
                return begin(weight, rank=rank, scale=scale, key=key, stats=state)

            weights = layer_matrices(leaf, layer, role)
            apart = weights.shape[:-2]
            flat = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[len(apart) :]), (weights, key, state)
            )
            found = lax.map(one, flat)
            return jax.tree.map(lambda x: x.reshape(*apart, *x.shape[1:]), found)

        return lax.map(of_layer, layers)

    mesh = _explicit_mesh(leaf)
    if mesh is None:
        return every(leaf, layers)
    # Decompositions know no layouts over a mesh: XLA chooses them.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed: Any = jax.sharding.auto_axes(every, out_sharding=whole)
    return placed(leaf, layers)


def _explicit_mesh(leaf: Any) -> Any:
    """The mesh over which a weight is laid out by explicit axes, if it is."""
    for array in jax.tree.leaves(leaf):
        mesh = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def _cut(
    found: initializers.Start, slot: Slot, layers: list[int], rank: int
) -> initializers.Start:
    """Factors of rank `slot.rank`, zero beyond the rank of each layer."""
    ranks = jnp.asarray([_of(slot, i).rank for i in layers])

    def cut(value: jax.Array, axis: int) -> jax.Array:
        axis += value.ndim
        if rank > slot.rank:
            value = lax.slice_in_dim(value, 0, slot.rank, axis=axis)
        elif rank < slot.rank:
            pad = [(0, 0)] * value.ndim
            pad[axis] = (0, slot.rank - rank)
            value = jnp.pad(value, pad)
        ahead = ranks.reshape(-1, *(1,) * (value.ndim - 1))
        kept = lax.broadcasted_iota(jnp.int32, value.shape, axis) < ahead
        return jnp.where(kept, value, 0)

    axes = {"a": -1, "b": -2, "a0": -1, "b0": -2}
    given = {n: x for n, x in found._asdict().items() if x is not None}
    return found._replace(**{n: cut(x, axes[n]) for n, x in given.items()})


def _gathered(slot: Slot, made: list[Any], name: str, dtype: Any) -> jax.Array:
    """One factor of all layers, zeros where there is none."""
    (d_in, d_out), count = slot.sides, len(slot.sites)
    sides = (d_in, slot.rank) if name.startswith("a") else (slot.rank, d_out)
    whole = jnp.zeros((count, *slot.apart, *sides), dtype)
    for layers, found in made:
        value = getattr(found, name)
        if value is None:
            continue
        if len(layers) == count:  # a copy: what is trained is donated, its start is not
            whole = jnp.array(value, dtype, copy=True)
        else:
            whole = whole.at[jnp.asarray(layers)].set(value.astype(dtype))
    return whole


def _of(slot: Slot, layer: int) -> Site:
    site = slot.sites[layer]
    assert site is not None
    return site


def _site_key(key: PRNGKeyArray, site: Site, slot: Slot) -> PRNGKeyArray:
    key = jax.random.fold_in(key, stable_hash(site.name))
    return jax.random.split(key, slot.apart) if slot.apart else key
