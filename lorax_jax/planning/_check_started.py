"""Whether what an initializer made can be trained."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .. import initializers
from .._errors import PlanError
from ._sites import Slot


def check_started(slot: Slot, arrays: Mapping[str, Any], state: Any) -> None:
    """Raises where factors hold no numbers, or too little was gathered for them.

    Types and traced values do not tell.

    Args:
        slot: the weight.
        arrays: its starting `a` and `b`, if it has any.
        state: the statistics that they came from, or `None`.

    Raises:
        PlanError: if they hold NaN or infinity, if fewer rows than the rank were seen,
            or if directions of the weight or of what was gathered are missing.
    """
    readers = [
        (i, site)
        for i, site in enumerate(slot.sites)
        if site is not None and initializers.method(site.init).reads != "shape"
    ]
    leaves = jax.tree.leaves((arrays, state))
    if not readers or any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in leaves):
        return
    if not all(bool(jnp.isfinite(arrays[name]).all()) for name in ("a", "b")):
        raise PlanError(
            f"The factors that {readers[0][1].init!r} makes of {slot.name!r} hold NaN "
            "or infinity. Look whether the weight does; or, where statistics are read, "
            "whether all of its inputs were zero or none was seen."
        )
    count = getattr(state, "count", None)
    rows = None if count is None else jnp.reshape(count, (len(slot.sites), -1))
    a, b = slot.matrices(arrays["a"], arrays["b"])
    dead = ~(a.any(axis=-2) | b.any(axis=-1)).reshape(len(slot.sites), -1, a.shape[-1])
    for i, site in readers:
        from_stats = initializers.method(site.init).reads == "stats"
        fewest = int(rows[i].min()) if from_stats and rows is not None else None
        if fewest is not None and fewest <= site.rank:  # their mean takes one
            raise PlanError(
                f"{fewest} rows reached {site.name!r}, which starts on {site.rank} "
                "directions of them: more rows than that are needed. Gather over more "
                "batches, mask fewer tokens, or lower `rank` for this site."
            )
        if not bool(dead[i, :, : site.rank].any()):
            continue
        if from_stats:
            raise PlanError(
                f"What was gathered of {site.name!r} has fewer directions than its "
                f"rank {site.rank}, and those without one could never be trained. "
                "Gather over more or larger batches, or lower `rank` for this site."
            )
        raise PlanError(
            f"The weight at {site.name!r} has fewer directions than its rank "
            f"{site.rank}, and those without one could never be trained: A and B would "
            "both stay zero. Lower `rank` for this site, or give it an `init` that "
            "does not read the weight, e.g. 'kaiming'."
        )
