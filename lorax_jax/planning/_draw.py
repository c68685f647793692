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
from ..adapters import Role, on_device, stable_hash
from ._assemble import assembled
from ._layer_matrices import layer_matrices
from ._sites import Site, Slot


def ranks_in_common(
    slots: Sequence[Slot], stats: Mapping[str, Any]
) -> dict[str, dict[Any, int]]:
    """For each slot, the rank at which a nested initializer starts its layers.

    The largest of all weights that can share a program: of one shape, with axes in the
    same roles and statistics of the same shape. Ranks of another order of magnitude
    have a program of their own, so that none starts at 8 times its rank.

    Args:
        slots: what is adapted.
        stats: name of a slot -> the state of a statistic.

    Returns:
        Name of a slot -> initializer and magnitude of a rank -> the rank to start at.
    """
    found: dict[str, dict[Any, int]] = {}
    shared: dict[Any, dict[Any, int]] = {}
    for slot in slots:
        state = jax.tree.leaves(stats.get(slot.name))
        shapes = tuple(jnp.shape(x)[len(slot.layers) :] for x in state)
        like = _nameless(slot.role), slot.sides, slot.apart, shapes
        ranks = found[slot.name] = shared.setdefault(like, {})
        for site in slot.sites:
            if site is not None and initializers.method(site.init).nested:
                kind = site.init, magnitude(site.rank)
                ranks[kind] = max(site.rank, ranks.get(kind, 0))
    return found


def magnitude(rank: int) -> int:
    """0 for ranks from 1 to 7, 1 from 8 to 63, 2 from 64 to 511, ..."""
    return (rank.bit_length() - 1) // 3


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
        common: what `ranks_in_common` says of this slot.
    """
    # Layers that start alike are made in one call.
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, site in enumerate(slot.sites):
        if site is not None:
            shape_alone = initializers.method(site.init).reads == "shape"
            scale = site.scale if shape_alone else None
            rank = common.get((site.init, magnitude(site.rank)), site.rank)
            alike.setdefault((rank, scale, site.init), []).append(i)
    made, places = [], []
    for (rank, scale, init), layers in alike.items():
        method = initializers.method(init)
        keys = _keys(key, [_of(slot, i) for i in layers], slot.apart)
        if method.reads == "shape":
            begin = (slot.role.lookup and method.lookup) or method.start
            weight = slot.sides, slot.dtype
            found = _from_shape(keys, weight, begin, rank, scale)
        else:
            state = stats if method.reads == "stats" else None
            found = _from_weight(slot, leaf, method, rank, keys, layers, state)
        made.append(found)
        places.append(tuple(layers))
    ranks = np.asarray([site.rank if site else 0 for site in slot.sites], np.int32)
    frame = dataclasses.replace(slot, role=_nameless(slot.role), sites=(), ids=())
    return assembled(made, ranks, frame, tuple(places), slot.rank, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _from_shape(
    keys: PRNGKeyArray,
    weight: tuple[tuple[int, int], Any],
    begin: Callable,
    rank: int,
    scale: float,
) -> initializers.Start:
    """Of an initializer that reads no weight, mapped over layers, experts, groups."""
    shape, dtype = weight

    def one(key):
        kernel = jax.ShapeDtypeStruct(shape, dtype)
        return begin(kernel, rank=rank, scale=scale, key=key)

    for _ in keys.shape:
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
    its_own = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[len(slot.layers) :])[at], state
    )
    scales = jnp.asarray([_of(slot, i).scale for i in layers], jnp.float32)
    leaf = leaf if isinstance(leaf, Tracer) else on_device(leaf)
    try:
        given = at, scales, keys, its_own
        return _read(leaf, given, _nameless(slot.role), method.start, rank)
    except ValueError as error:
        if rank > slot.rank:  # it may be another site's rank that cannot be had
            return _from_weight(slot, leaf, method, slot.rank, keys, layers, state)
        raise PlanError(f"{slot.name!r} cannot be started: {error}") from error
    except jax.errors.ConcretizationTypeError as error:
        raise PlanError(
            f"The initializer of {slot.name!r} asks for the value of a traced array. "
            "One that reads the weight gets `weight`, `scale`, `key` and `stats` "
            "traced: use `jnp.sqrt` for `math.sqrt`, `jnp.where` for `if`."
        ) from error


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _read(leaf, given, role, begin, rank) -> initializers.Start:
    """The starts of some layers, in one program for all leaves of a shape."""

    def every(leaf, given):
        def of_layer(of_one):
            layer, scale, key, state = of_one

            def one(matrix):
                weight, key, state = matrix
                return begin(weight, rank=rank, scale=scale, key=key, stats=state)

            weights = layer_matrices(leaf, layer, role)
            apart = weights.shape[:-2]
            flat = jax.tree.map(
                lambda x: x.reshape(-1, *x.shape[len(apart) :]), (weights, key, state)
            )
            found = lax.map(one, flat)
            return jax.tree.map(lambda x: x.reshape(*apart, *x.shape[1:]), found)

        return lax.map(of_layer, given)

    mesh = _explicit_mesh(leaf)
    if mesh is None:
        return every(leaf, given)
    # Decompositions know no layouts over a mesh: XLA chooses them.
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed: Any = jax.sharding.auto_axes(every, out_sharding=whole)
    return placed(leaf, given)


def _explicit_mesh(leaf: Any) -> Any:
    """The mesh over which a weight is laid out by explicit axes, if it is."""
    for array in jax.tree.leaves(leaf):
        mesh = getattr(jax.typeof(array).sharding, "mesh", None)
        if mesh is not None and not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def _of(slot: Slot, layer: int) -> Site:
    site = slot.sites[layer]
    assert site is not None
    return site


def _nameless(role: Role) -> Role:
    """Without the path, which would tell leaves of one shape apart, each a program."""
    return dataclasses.replace(role, path="")


def _keys(
    key: PRNGKeyArray, sites: Sequence[Site], apart: tuple[int, ...]
) -> PRNGKeyArray:
    """One for each site, and for each of its experts and groups."""
    hashes = np.asarray([stable_hash(site.name) for site in sites], np.uint32)
    return _folded(key, hashes, apart)


@functools.partial(jax.jit, static_argnums=2)
def _folded(key, hashes, apart):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return jax.vmap(lambda key: jax.random.split(key, apart))(keys) if apart else keys
