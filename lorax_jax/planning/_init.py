"""`init`: from a plan to the starting adapter."""

import functools
from collections.abc import Mapping
from typing import Any

from jaxtyping import PRNGKeyArray

from .. import _paths
from .._errors import PlanError
from ..adapters import Adapter, Fixed, as_key, is_weight
from ._check_started import check_started
from ._check_stats import check_stats
from ._draw import draw, ranks_in_common
from ._plan import Plan
from ._start import start
from ._witness import check_witness


def init(
    plan: Plan,
    params: Any,
    *,
    key: PRNGKeyArray,
    stats: Mapping[str, Any] | None = None,
) -> Adapter:
    """Makes the starting adapter of a plan.

    Each site draws from `key` folded with its own path, at its own rank, so the same
    model starts the same way whether its layers are stacked or unrolled, alone or with
    other sites, and on one device or many: bit for bit where it draws, up to float32's
    rounding where it decomposes; of equal singular values any directions may come.

    Initializers that read the weight are compiled for each shape: where the directions
    of a rank are the first ones of a larger, once for all ranks of like size, else once
    for each. They run where the weight is, and take its layers and experts one after
    the other: beside the base, one matrix of it at a time is held in float32.

    Args:
        plan: where the adapter acts.
        params: the parameter tree that it was planned on; never changed.
        key: PRNG key.
        stats: name of an adapted weight (`Slot.name`) -> what was gathered there, for
            initializers that read statistics; leading axes are those of its stacked
            layers, then of its experts and groups.

    Returns:
        An `Adapter`. Starting factors, of initializers that have them, and factors
        that are never trained are in `fixed`. Sites of a stack with smaller ranks than
        the largest are padded with zeros in A and B alike, which no optimizer moves:
        their gradients are zero.

    Raises:
        PlanError: if `params` is not the tree of the plan; if `stats` are missing, not
            of its sites, of another model, or of too few rows for a rank; or if the
            factors hold NaN or infinity, or directions are missing that a rank needs.
        AdapterError: if `key` is no PRNG key.

    Example:
        >>> import jax, jax.numpy as jnp, lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'w': {'a': (3, 1), 'b': (1, 2)}}
    """
    leaves = {
        path: leaf
        for path, leaf in _paths.flatten(params, is_leaf=is_weight)[0]
        if hasattr(leaf, "shape")
    }
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    key = as_key(key, "`init(..., key=)`")
    seen = getattr(stats, "witness", {})
    stats = check_stats(plan, stats)
    common = ranks_in_common(plan.slots, stats)
    train, fixed = {}, {}
    for slot in plan.slots:
        if shapes.get(slot.role.path) != slot.shape:
            raise PlanError(
                f"The plan has {slot.role.path!r} with shape {slot.shape}, and "
                f"`params` has {shapes.get(slot.role.path, 'no such leaf')}. Give "
                "`init` the parameters that the plan was made on."
            )
        leaf, dtype = leaves[slot.role.path], plan.config.dtype
        if slot.name in seen:
            check_witness(slot.name, leaf, seen[slot.name])
        given = key, dtype, stats.get(slot.name), common[slot.name]
        drawn = functools.partial(draw, slot, leaf, *given)
        train[slot.name], more = start(slot, leaf, dtype, drawn)
        fixed[slot.name] = Fixed(slot.role, more)
    # At the end: to look at one leaf's factors is to wait for them, and all can be made
    # at the same time.
    for slot in plan.slots:
        arrays = {**fixed[slot.name], **train[slot.name]}
        factors = {n: x for n, x in arrays.items() if n in "ab"}
        if factors:
            check_started(slot, factors, stats.get(slot.name))
    return Adapter(train, fixed)
