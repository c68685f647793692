r"""PEFT's adapters that belong to a residual of the base, on the base itself.

PiSSA, OLoRA, CorDA and LoRA-GA take their starting factors out of the base there, and a
folder that was not converted holds what was trained on the residual
$W - s\,A_0 B_0$. On the original base it is $W + s\,(A B - A_0 B_0)$: what lacks are
the starting factors. Of PiSSA and OLoRA they are functions of the weight. Their signs
are free, and the product does not depend on them; those that are nearest to the trained
factors are taken, for the differences then are small. The others drew numbers or read
data, and only the folder of the untrained adapter has them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from .._errors import CheckpointError
from ..adapters import Adapter, Fixed, is_weight
from ..planning import Plan, init
from ._file_site import FileSite
from ._files import CONFIG, AdapterFiles

FROM_THE_WEIGHT = ("pissa", "olora")


def with_starts(
    files: AdapterFiles,
    adapter: Adapter,
    plan: Plan,
    params: Any,
    method: Any,
    start: Adapter | None,
) -> tuple[Adapter, Plan]:
    """The adapter of a residual base as one of the base.

    Args:
        files: the folder that it is from.
        adapter: what the folder holds.
        plan: its plan.
        params: the base's parameters.
        method: the initializer.
        start: the untrained adapter, if it was given.

    Returns:
        The same with starting factors, in float32 or wider: PEFT's residual is that of
        factors which were not rounded.

    Raises:
        CheckpointError: if the starting factors cannot be known.
    """
    # PEFT has none of these starts for tables: their adapters start at zero.
    names = [name for name, fixed in adapter.fixed.items() if _starts(fixed)]
    if start is not None:
        _check_start(files, adapter, start, names)
        found = {n: (start.train[n]["a"], start.train[n]["b"]) for n in names}
    else:
        found = _recomputed(files, adapter, plan, params, method, names)
    train, fixed = dict(adapter.train), dict(adapter.fixed)
    for name in names:
        a, b = (_wide(adapter.train[name][n]) for n in ("a", "b"))
        a0, b0 = (x.astype(a.dtype) for x in found[name])
        if start is None:
            a0, b0 = _near(a0, b0, a, len(fixed[name].role.batch))
        train[name] = adapter.train[name] | {"a": a, "b": b}
        fixed[name] = Fixed(fixed[name].role, {**fixed[name], "a0": a0, "b0": b0})
    dtype = next(x["a"].dtype for x in train.values() if "a" in x)
    config = dataclasses.replace(plan.config, dtype=dtype)
    return Adapter(train, fixed), dataclasses.replace(plan, config=config)


def _starts(fixed: Fixed) -> bool:
    return "rank" in fixed and not fixed.role.lookup


def _wide(array: Any) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def check_use(files: AdapterFiles, site: FileSite, method: Any) -> None:
    """Raises for the head of a tied table, whose start is missing in the table too."""
    if site.use == "head" or site.tied is not None:
        raise CheckpointError(
            f"{files.what} has `init_lora_weights` = {method!r} and adapts the head "
            f"that shares {site.path!r}: PEFT took the start out of the table that the "
            "lookup reads, too, which no adapter undoes. Merge it there with "
            "`merge_and_unload`, and load the merged model."
        )


def _recomputed(
    files: AdapterFiles,
    adapter: Adapter,
    plan: Plan,
    params: Any,
    method: Any,
    names: list[str],
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Starting factors from the weights."""
    if method not in FROM_THE_WEIGHT:
        raise CheckpointError(
            f"{files.what} has `init_lora_weights` = {method!r}: the factors belong to "
            "a residual of the base, and how they started cannot be told from the "
            "weights. Give the folder of the untrained adapter, "
            "`load_adapter(..., start=folder)`, the one that PEFT calls "
            "`path_initial_model_for_weight_conversion`; or convert the adapter there "
            "with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    for name in names:
        path = adapter.fixed[name].role.path
        if isinstance(leaves[path], jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{files.what} has `init_lora_weights` = {method!r}, whose start is "
                f"taken from the weights, and `params` has only the type of {path!r}. "
                "Give parameters that hold values."
            )
    slots = tuple(
        dataclasses.replace(
            slot,
            sites=tuple(s and dataclasses.replace(s, init=method) for s in slot.sites),
            role=dataclasses.replace(slot.role, kind="lora"),
            bias=False,
        )
        for slot in plan.slots
        if slot.name in names
    )
    config = dataclasses.replace(plan.config, dtype=jnp.float32)
    begun = init(
        dataclasses.replace(plan, slots=slots, config=config),
        params,
        key=jax.random.key(0),  # of which neither makes use
    )
    return {n: (begun.fixed[n]["a0"], begun.fixed[n]["b0"]) for n in names}


def _near(
    a0: jax.Array, b0: jax.Array, a: jax.Array, batch: int
) -> tuple[jax.Array, jax.Array]:
    """The starting factors with the signs that their columns and rows have in `a`."""
    along = (a0 * a).sum(tuple(range(batch, a.ndim - 1)))  # (*batch, rank)
    sign = jnp.where(along < 0, -1, 1).astype(a0.dtype)
    lead = sign.shape[:batch]
    inside, behind = [1] * (a.ndim - 1 - batch), [1] * (b0.ndim - 1 - batch)
    return (
        a0 * sign.reshape(*lead, *inside, -1),
        b0 * sign.reshape(*lead, -1, *behind),
    )


def _check_start(
    files: AdapterFiles, adapter: Adapter, start: Adapter, names: list[str]
) -> None:
    for name in names:
        one, other = adapter.fixed[name], start.fixed.get(name)
        same = other is not None and all(
            jnp.shape(one[n]) == jnp.shape(other[n])
            and bool(jnp.array_equal(one[n], other[n]))
            for n in ("rank", "scale")
        )
        if not same:
            raise CheckpointError(
                f"The adapter in `start` does not have the rank and scale of {name!r} "
                f"that {files.folder / CONFIG} has. Give the folder of the adapter "
                "that training started from."
            )
