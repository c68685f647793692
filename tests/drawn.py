"""Adapters with random arrays: the same for a stacked tree and for an unrolled one."""

import jax.numpy as jnp
import numpy as np
from helpers import on_device

import lorax_jax as lj
from lorax_jax import _paths
from lorax_jax.adapters import Fixed, base_norm, is_weight


def started(plan, params=None, frozen=(), size=0.3):
    """The same, with starting factors that its own have moved from.

    `frozen` names factors that are kept fixed.
    """
    train, fixed = drawn(plan, params, size)
    moves = drawn(plan, params, size / 3, seed=1).train
    for name, site in fixed.items():
        if "a" not in train[name]:
            continue
        values = {**site}
        if not frozen:
            values |= {f"{n}0": train[name][n] - moves[name][n] for n in ("a", "b")}
        held = {n: x for n, x in train[name].items() if n in frozen}
        train[name] = {n: x for n, x in train[name].items() if n not in frozen}
        fixed[name] = Fixed(site.role, values | held)
    return lj.Adapter(train, fixed)


def drawn(plan, params=None, size=0.3, seed=0):
    """An adapter of a plan with every array drawn, without a compilation.

    `params` is needed for DoRA alone, whose norms are the base's.
    """
    leaves = {}
    if params is not None:
        leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    train, fixed = {}, {}
    for slot in plan.slots:
        arrays = {name: np.zeros(shape) for name, shape in slot.shapes().items()}
        for i, site in enumerate(slot.sites):
            if site is not None:
                _fill(slot, site, i, arrays, size, seed)
        train[slot.name] = {n: on_device(x) for n, x in arrays.items()}
        values = _fixed(slot)
        if slot.role.kind == "dora":
            values["norm"] = base_norm(leaves[slot.role.path], slot.role)
        fixed[slot.name] = Fixed(slot.role, values)
    return lj.Adapter(train, fixed)


def _fill(slot, site, i, arrays, size, seed):
    draw = np.random.default_rng([*[ord(c) for c in site.name], *[seed] * (seed > 0)])
    at = np.unravel_index(i, slot.layers) if slot.layers else ()
    if slot.role.kind == "whole":
        whole, axes = arrays["whole"], slot.role.stacked
        whole = np.moveaxis(whole, axes, range(len(axes)))
        if len(slot.adapted) < len(slot.sites):
            at = (slot.adapted.index(i),)
        whole[at] = draw.normal(0.2, size, whole[at].shape)
    elif slot.role.kind == "rows":
        arrays["rows"][...] = draw.normal(0, size, arrays["rows"].shape)
    else:
        a = (*slot.experts, *slot.inputs, *slot.role.grouped, site.rank)
        b = (*slot.experts, site.rank, *slot.outputs)
        each = (slice(None),) * len(slot.experts)
        arrays["a"][at][..., : site.rank] = draw.normal(0, size, a)
        arrays["b"][at][(*each, slice(site.rank))] = draw.normal(0, size, b)
        if "bias" in arrays:
            arrays["bias"][at] = draw.normal(0, size, slot.outputs)
        if "magnitude" in arrays:
            arrays["magnitude"][at] = draw.uniform(0.5, 1.5, slot.outputs)


def _fixed(slot):
    if slot.role.kind == "rows":
        return {"ids": on_device(slot.ids, jnp.int32)}
    if slot.role.kind == "whole":
        some = len(slot.adapted) < len(slot.sites)
        return {"layers": on_device(slot.adapted, jnp.int32)} if some else {}

    def over_layers(name, dtype):
        values = [getattr(site, name) if site else 0 for site in slot.sites]
        return on_device(np.reshape(values, slot.layers), dtype)

    values = {
        "scale": over_layers("scale", jnp.float32),
        "rank": over_layers("rank", jnp.int32),
    }
    if any(site is not None and site.dropout for site in slot.sites):
        values["dropout"] = over_layers("dropout", jnp.float32)
    return values
