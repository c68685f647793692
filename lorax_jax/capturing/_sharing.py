"""Which sites are fed the same rows."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import PlanError, closest, shorten
from ..planning import Slot
from ..statistics import PcaState
from ._components import by_site

# The same rows, summed in another order, give sums that are closer than this.
_ROUNDING = 1e-5


def sharing(
    slots: Sequence[Slot],
    step: Callable[[dict[str, PcaState], Any], Mapping[str, PcaState]],
    states: Mapping[str, PcaState],
    batch: Any,
    order: Sequence[str] = (),
) -> tuple[tuple[str, ...], ...]:
    """Groups of sites that are fed the same rows: as many, of one mean and variance.

    Args:
        slots: of all the sites.
        step: takes a batch in.
        states: before any row.
        batch: the batch that is looked at; states are not changed.
        order: names of sites that come first in their groups.

    Returns:
        Groups of two sites or more.
    """
    # No batch is too small to have a mean. A copy, for the step may donate it.
    fresh = {
        name: dataclasses.replace(
            jax.tree.map(jnp.copy, state), keep=jnp.zeros_like(state.keep)
        )
        for name, state in states.items()
    }
    after = step(fresh, batch)
    found: dict[str, list[np.ndarray]] = {}
    for slot in slots:
        state = after[slot.name]
        fields = {"count": state.count, "mean": state.mean, "variance": state.variance}
        for name, one in by_site(slot, jax.device_get(fields)).items():
            found[name] = list(one.values())
    for name in order:
        if name not in found:
            raise PlanError(
                f"`order` names {name!r}, which is no site that has a rank. Closest: "
                f"{shorten(closest(name, found))}."
            )
    groups: list[list[str]] = []
    for name in [*dict.fromkeys(order), *(name for name in found if name not in order)]:
        for group in groups:
            if _same(found[group[0]], found[name]):
                group.append(name)
                break
        else:
            groups.append([name])
    return tuple(tuple(group) for group in groups if len(group) > 1)


def _same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(
        x.shape == y.shape and np.abs(x - y).max() <= _ROUNDING * np.abs(x).max()
        for x, y in zip(one, other, strict=True)
    )
