"""`resized`: a plan with other ranks."""

import dataclasses
from collections.abc import Mapping

from .._errors import PlanError, closest, shorten
from ._plan import Plan
from ._sites import Site, Slot, parameters


def resized(plan: Plan, ranks: Mapping[str, tuple[int, float]]) -> Plan:
    """The plan with other ranks and alphas at some of its sites.

    Args:
        plan: the plan; unchanged.
        ranks: name of a site -> its `(rank, alpha)`. A site of rank 0 is dropped; those
            that are not named stay as they are.

    Returns:
        A plan whose stacks are padded to their new largest ranks. Its `config` is that
        of `plan`, which says nothing of the new ranks.

    Raises:
        PlanError: if a site is not in the plan or has no rank, if a rank is more than
            its weight can have, or if none is left.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {"w": jax.ShapeDtypeStruct((6, 4), "float32")}
        >>> roles = {"w": {"inputs": (0,), "outputs": (1,)}}
        >>> plan = lj.plan(lj.LoraConfig("w", rank=2), params, roles=roles)
        >>> [(s.rank, s.alpha, s.trainable) for s in resized(plan, {"w": (3, 6.0)})]
        [(3, 6.0, 30)]
    """
    known = {site.name: site for site in plan}
    for name, (rank, _) in ranks.items():
        if name not in known or not known[name].rank:
            near = shorten(closest(name, [n for n, site in known.items() if site.rank]))
            raise PlanError(
                f"A rank is given for {name!r}, which is no site of the plan that has "
                f"one. Closest: {near}."
            )
        if rank < 0:
            raise PlanError(
                f"The rank {rank} is given for {name!r}; ranks go from 0, which drops "
                "the site."
            )
    slots = []
    for slot in plan.slots:
        sites = tuple(_site(site, slot, ranks, plan) for site in slot.sites)
        if any(site is not None for site in sites):
            slots.append(dataclasses.replace(slot, sites=sites))
    if not slots:
        raise PlanError(
            "No site is left: all ranks are 0. Give at least one site a rank from 1 up."
        )
    return dataclasses.replace(plan, slots=tuple(slots))


def _site(
    site: Site | None, slot: Slot, ranks: Mapping[str, tuple[int, float]], plan: Plan
) -> Site | None:
    if site is None or site.name not in ranks:
        return site
    rank, alpha = ranks[site.name]
    if rank == 0:
        return None
    if rank > min(slot.sides):
        raise PlanError(
            f"The rank {rank} is given for {site.name!r}, whose weight of shape "
            f"{site.shape} can have {min(slot.sides)} at most."
        )
    vectors = int(slot.bias) + int(slot.role.kind == "dora")
    return dataclasses.replace(
        site,
        rank=rank,
        alpha=alpha,
        scale=plan.config.scale(rank, alpha),
        trainable=parameters(slot.role, slot.shape, rank, vectors, site.frozen),
    )
