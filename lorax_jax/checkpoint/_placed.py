"""A plan's sites as a file has them, and where they are."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from .._names import NameMap
from ..adapters import Fixed
from ..planning import Plan, Slot
from ._copies import adapted_modules, copy_site
from ._file_site import FileSite, Layout
from ._fused import with_ranks
from ._packed import keys_of
from ._sites import factor_site
from ._starts import started


class Placed(NamedTuple):
    """A site of a file, and where it is in an adapter.

    Attributes:
        site: the site.
        slot: the leaf.
        index: its position among the leaf's sites.
    """

    site: FileSite
    slot: Slot
    index: int


def placed_sites(
    plan: Plan, names: NameMap | None, fixed: Mapping[str, Fixed] | None = None
) -> list[Placed]:
    """Every site of a plan, with its keys.

    Args:
        plan: the plan.
        names: the model's name table, for PEFT's keys; `None` for keys of our paths.
        fixed: what an adapter of the plan keeps fixed, by slot: its starting factors
            and frozen ones. A plan alone does not say.

    Raises:
        CheckpointError: if PEFT has no key for a site.
    """
    sites = [
        (site, slot, i)
        for slot in plan.slots
        for i, site in enumerate(slot.sites)
        if site is not None
    ]
    found = [
        Placed(factor_site(plan, slot, site, names), slot, i)
        for site, slot, i in sites
        if site.rank
    ]
    if fixed is not None:
        found = _kept(found, fixed, "apart" if names is None else "joined")
    if names is not None:
        found = with_ranks(_nested(found, names))
    adapted = adapted_modules([place.site for place in found])
    return found + [
        Placed(copy_site(slot, site, names, adapted), slot, i)
        for site, slot, i in sites
        if not site.rank
    ]


def _kept(
    placed: list[Placed], fixed: Mapping[str, Fixed], layout: Layout
) -> list[Placed]:
    """The same, with what is known of their starting factors and frozen ones."""
    starts = {slot.name: started(slot, fixed[slot.name]) for _, slot, _ in placed}

    def told(place: Placed) -> FileSite:
        name = place.slot.name
        return dataclasses.replace(
            place.site,
            start=layout if starts[name][place.index] else None,
            frozen=tuple(n for n in ("a", "b") if n in fixed[name]),
        )

    return [place._replace(site=told(place)) for place in placed]


def _nested(placed: list[Placed], names: NameMap) -> list[Placed]:
    """The same, where several bare parameters of a module have keys of their own."""
    bare = {place.site.parameter for place in placed} - {None}
    keys: dict[str, str] = {}
    for module in {tensor.rpartition(".")[0] for tensor in bare if tensor}:
        keys |= keys_of(module, names, bare.__contains__)

    def renamed(site: FileSite) -> FileSite:
        key = keys.get(site.parameter or "", site.key)
        return dataclasses.replace(site, key=key)

    return [place._replace(site=renamed(place.site)) for place in placed]
