"""`resized` and `fitted`: a plan with other ranks."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from jax.core import Tracer

from .._errors import PlanError, closest, shorten
from ..adapters import Adapter, Fixed
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
    known = {
        site.name: (site, slot)
        for slot in plan.slots
        for site in slot.sites
        if site is not None and site.rank
    }
    for name, (rank, _) in ranks.items():
        if name not in known:
            near = shorten(closest(name, known))
            raise PlanError(
                f"A rank is given for {name!r}, which is no site of the plan that has "
                f"one. Closest: {near}."
            )
        if rank < 0:
            raise PlanError(
                f"The rank {rank} is given for {name!r}; ranks go from 0, which drops "
                "the site."
            )
        site, slot = known[name]
        if rank > min(slot.sides):
            raise PlanError(
                f"The rank {rank} is given for {name!r}, whose weight of shape "
                f"{site.shape} can have {min(slot.sides)} at most."
            )
    return _resized(plan, ranks)


def fitted(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with the ranks and scales that an adapter has: of `to_lora`'s, say.

    Args:
        plan: a plan of the same weights; unchanged.
        adapter: the adapter. Its ranks may be beyond those of the weights, as twice the
            rank of a wide adapter is.

    Returns:
        The plan of the adapter. Alphas are such that the scales are the adapter's, with
        or without rsLoRA. Its `config` is that of `plan`, which says nothing of the
        ranks.

    Raises:
        PlanError: if the adapter is for other weights, or is traced and has no values.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {"w": jax.numpy.ones((6, 4))}
        >>> roles = {"w": {"inputs": (0,), "outputs": (1,)}}
        >>> plan = lj.plan(lj.LoraConfig("w", rank=2, alpha=6), params, roles=roles)
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> adapter.fixed["w"].values_["rank"] = jax.numpy.int32(4)
        >>> [(s.rank, s.alpha, s.scale) for s in fitted(plan, adapter)]
        [(4, 12.0, 3.0)]
    """
    if set(adapter.fixed) != {slot.name for slot in plan.slots}:
        odd = sorted(set(adapter.fixed) ^ {slot.name for slot in plan.slots})
        raise PlanError(
            f"The adapter is not one of the plan: they differ about {odd[:4]}. Give "
            "the plan that it was made with; for a loaded adapter, `receipt.plan`."
        )
    ranks: dict[str, tuple[int, float]] = {}
    for slot in plan.slots:
        fixed = adapter.fixed[slot.name]
        if "rank" not in fixed:
            continue
        if isinstance(fixed["rank"], Tracer) or isinstance(fixed["scale"], Tracer):
            raise PlanError(
                "The adapter is being traced, and its ranks have no values that a plan "
                "could hold. Make the plan outside of `jit`."
            )
        found = np.asarray(fixed["rank"]).reshape(-1)
        scales = np.asarray(fixed["scale"]).reshape(-1)
        for i, site in enumerate(slot.sites):
            if site is not None:
                rank = int(found[i])
                ranks[site.name] = rank, _alpha(site, rank, scales[i], plan)
    return _resized(_thawed(plan, adapter), ranks)


def _thawed(plan: Plan, adapter: Adapter) -> Plan:
    """The plan with those factors frozen that the adapter keeps fixed."""

    def site(one: Site | None, fixed: Fixed) -> Site | None:
        frozen = tuple(name for name in ("a", "b") if name in fixed)
        return one and dataclasses.replace(one, frozen=frozen)

    slots = (
        dataclasses.replace(
            slot, sites=tuple(site(one, adapter.fixed[slot.name]) for one in slot.sites)
        )
        for slot in plan.slots
    )
    return dataclasses.replace(plan, slots=tuple(slots))


def _alpha(site: Site, rank: int, scale: np.floating, plan: Plan) -> float:
    """The alpha that gives a site of another rank this scale."""
    if np.float32(site.scale) != scale:  # rescaled since it was planned
        return float(scale) * (math.sqrt(rank) if plan.config.rslora else rank)
    ratio = rank / site.rank
    return site.alpha * (math.sqrt(ratio) if plan.config.rslora else ratio)


def _resized(plan: Plan, ranks: Mapping[str, tuple[int, float]]) -> Plan:
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
    vectors = int(slot.bias) + int(slot.role.kind == "dora")
    return dataclasses.replace(
        site,
        rank=rank,
        alpha=alpha,
        scale=plan.config.scale(rank, alpha),
        trainable=parameters(slot.role, slot.shape, rank, vectors, site.frozen),
    )
