"""Principal components of the sites of a plan, as `eva` looks at them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import CaptureError, shorten
from ..planning import Slot
from ..statistics import PcaState

_FIELDS = ("count", "similarity", "singular", "variance", "keep")


@dataclasses.dataclass(frozen=True)
class Components:
    """What is known of each site's components, on the host.

    A site with experts, or with groups, has a matrix for each of them, and inputs of
    its own for each: they are the first axis here.

    Attributes:
        count: name of a site -> rows taken in, shape `(matrices,)`.
        keep: -> components kept, shape `(matrices,)`.
        similarity: -> cosines with the components before, shape `(matrices, k)`.
        explained: -> explained variances, over all of its matrices, shape `(k,)`.
    """

    count: dict[str, np.ndarray]
    keep: dict[str, np.ndarray]
    similarity: dict[str, np.ndarray]
    explained: dict[str, np.ndarray]

    @classmethod
    def of(cls, slots: Sequence[Slot], states: Mapping[str, PcaState]) -> "Components":
        """Reads the states of the slots."""
        found = cls({}, {}, {}, {})
        for slot in slots:
            state = states[slot.name]
            fields = jax.device_get({name: getattr(state, name) for name in _FIELDS})
            for name, one in by_site(slot, fields).items():
                found.count[name], found.keep[name] = one["count"], one["keep"]
                found.similarity[name] = one["similarity"]
                total = (one["count"] * one["variance"].sum(-1, dtype=np.float64)).sum()
                squares = (one["singular"].astype(np.float64) ** 2).sum(0)
                found.explained[name] = squares / (total if total > 0 else 1.0)
        return found

    def filled(self) -> bool:
        """Whether all sites have components."""
        return not self._empty()

    def check_filled(self) -> None:
        """Raises if no batch had as many rows as a site keeps components."""
        empty = self._empty()
        if empty:
            most = max(int(self.keep[name].max()) for name in empty)
            raise CaptureError(
                f"No batch fed {shorten(empty)} as many rows as are needed for its "
                f"components, up to {most}. Give larger batches, mask fewer tokens, "
                "or lower `rho` or the rank of these sites."
            )

    def check_finite(self) -> None:
        """Raises if NaN or infinity was among the rows."""
        bad = [
            name
            for name, explained in self.explained.items()
            if not np.isfinite(explained).all()
        ]
        if bad:
            raise CaptureError(
                f"NaN or infinity was fed to {shorten(bad)}. Find the batch, e.g. with "
                "`jax.debug_nans`; padding that holds NaN must be masked."
            )

    def _empty(self) -> list[str]:
        return [name for name, count in self.count.items() if (count == 0).any()]


def paused(
    slots: Sequence[Slot],
    states: Mapping[str, PcaState],
    keep: Mapping[str, jax.Array],
    done: Mapping[str, bool],
) -> dict[str, PcaState]:
    """The states, of which those of sites that are done skip the next batch.

    A batch with fewer rows than components are kept is skipped, so a site that is done
    asks for more rows than any batch has.

    Args:
        slots: of all the sites.
        states: name of a slot -> its state.
        keep: -> how many components its sites keep.
        done: name of a site -> whether it is done.
    """
    found = {}
    for slot in slots:
        still = [site is not None and not done[site.name] for site in slot.sites]
        moving = jnp.asarray(still).reshape(slot.layers + (1,) * len(slot.apart))
        asked = jnp.where(moving, keep[slot.name], jnp.inf)
        found[slot.name] = dataclasses.replace(states[slot.name], keep=asked)
    return found


def keeping(
    slots: Sequence[Slot],
    states: Mapping[str, PcaState],
    rho: float,
    groups: Sequence[Sequence[str]] = (),
) -> dict[str, PcaState]:
    """The states, keeping `round(rho * rank)` components of each site.

    Of sites that share an input, as many as of the one that keeps most.
    """
    keep = {
        site.name: round(rho * site.rank)
        for slot in slots
        for site in slot.sites
        if site is not None
    }
    for group in groups:
        keep |= dict.fromkeys(group, max(keep[name] for name in group))
    found = {}
    for slot in slots:
        state = states[slot.name]
        *leading, has = state.singular.shape
        kept = [
            min(keep[site.name], slot.sides[0]) if site else 1 for site in slot.sites
        ]
        if max(kept) > has:
            raise CaptureError(
                f"{slot.name!r} needs {max(kept)} components, `rho` times its largest "
                f"rank, and its state keeps {has}. Gather `Pca({max(keep.values())})`."
            )
        array = jnp.asarray(kept, jnp.float32).reshape(
            slot.layers + (1,) * len(slot.apart)
        )
        found[slot.name] = dataclasses.replace(
            state, keep=jnp.broadcast_to(array, leading)
        )
    return found


def by_site(slot: Slot, fields: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Fields of each site, with one axis for its matrices."""
    lead = len(slot.layers) + len(slot.apart)
    shape = len(slot.sites), math.prod(slot.apart)
    rows = {name: x.reshape(*shape, *x.shape[lead:]) for name, x in fields.items()}
    return {
        site.name: {name: x[i] for name, x in rows.items()}
        for i, site in enumerate(slot.sites)
        if site is not None
    }
