"""Whether statistics are those that a plan's initializers need."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import initializers
from .._errors import PlanError, closest, shorten
from ._plan import Plan


def check_stats(plan: Plan, stats: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The statistics that were given, or none.

    Raises:
        PlanError: if a weight whose initializer reads statistics has none, if none of
            those given is of the plan, or if their leading axes are not the weight's
            layers, experts and groups.
    """
    stats = {} if stats is None else stats
    if not isinstance(stats, Mapping):
        raise PlanError(
            f"`stats` is a {type(stats).__name__}; what `prepare` or `capture` gave is "
            "meant, a mapping from the names of adapted weights."
        )
    slots = {slot.name: slot for slot in plan.slots}
    # A plan whose ranks were distributed anew may have lost some of the weights.
    if stats and not set(stats) & set(slots):
        name = next(iter(stats))
        raise PlanError(
            f"`stats` holds {name!r} and nothing that the plan adapts. Closest: "
            f"{shorten(closest(name, slots))}. Gather them with this plan."
        )
    for name, slot in slots.items():
        readers = [
            site
            for site in slot.sites
            if site is not None and _reads(site.init) and site.rank
        ]
        if not readers:
            continue
        if name not in stats:
            raise PlanError(
                f"`init` = {readers[0].init!r} at {name!r} reads statistics, and "
                f"`stats` has none for it. Gather them with `plan, stats = "
                "prepare(plan, params, fn, batches)`, and `loss=` where it starts from "
                "gradients, and pass "
                "`init(plan, params, key=key, stats=stats)`."
            )
        wanted = (*slot.layers, *slot.apart)
        for leaf in jax.tree.leaves(stats[name]):
            if jnp.shape(leaf)[: len(wanted)] != wanted:
                raise PlanError(
                    f"The statistics of {name!r} hold an array of shape "
                    f"{jnp.shape(leaf)}, whose leading axes must be {wanted}: one for "
                    "each layer of its stack, expert and group. Gather them with this "
                    "plan."
                )
    return stats


def _reads(init: Any) -> bool:
    return initializers.method(init).reads == "stats"
