"""A plan's sites as a file has them, and where they are."""

import dataclasses
from typing import NamedTuple

from .._names import NameMap
from ..planning import Plan, Slot
from ._copies import adapted_modules, copy_site
from ._file_site import FileSite
from ._fused import with_ranks
from ._packed import keys_of
from ._sites import factor_site


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


def placed_sites(plan: Plan, names: NameMap | None) -> list[Placed]:
    """Every site of a plan, with its keys.

    Args:
        plan: the plan.
        names: the model's name table, for PEFT's keys; `None` for keys of our paths.

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
    if names is not None:
        found = with_ranks(_nested(found, names))
    adapted = adapted_modules([place.site for place in found])
    return found + [
        Placed(copy_site(slot, site, names, adapted), slot, i)
        for site, slot, i in sites
        if not site.rank
    ]


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
