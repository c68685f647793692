"""EVA's ranks: directions of all sites compete for one budget."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .._errors import CaptureError, PlanError, closest, shorten
from ..planning import Plan, Site, Spectra, resized


def redistribute(
    plan: Plan,
    spectra: Mapping[str, Any],
    *,
    budget: int | None = None,
    rho: float = 2.0,
    adjust_scale: bool = True,
    shared: Iterable[Sequence[str]] = (),
) -> Plan:
    r"""Gives sites whose inputs vary along more directions a larger rank.

    Each site offers the explained variance of its leading `round(rho * r)` directions,
    $r$ its rank in `plan`. Of all that is offered the largest `budget` are taken, and a
    site's new rank is how many of its own are among them. A site that has none is
    dropped.

    With `adjust_scale`, $\alpha$ becomes $\alpha\, r_{new} / r$, as in PEFT, which
    leaves the scale $\alpha / r$ as it was. With `rslora` it does not: the scale
    becomes $\alpha\, r_{new} / (r \sqrt{r_{new}})$.

    A rank is never more than `min(d_in, d_out)`, of which PEFT knows nothing.

    Args:
        plan: the plan; unchanged.
        spectra: name of a site -> explained variances of its directions, descending:
            `variances / total` of `Principal`; or what `lj.spectra(plan, stats=...)`
            gives. Sites that are not named keep their ranks, and are no part of the
            budget.
        budget: sum of the new ranks; `None` takes the sum of the old ones.
        rho: how many times its old rank a site may get; 1 leaves ranks as they are.
        adjust_scale: whether alphas follow ranks.
        shared: groups of names of sites that share an input. All may get as much as
            the one that may get most; and since they offer the same, the first of a
            group is served before the others. PEFT's groups are in the order of its
            modules.

    Returns:
        A plan with other ranks and alphas.

    Raises:
        CaptureError: if spectra are no sequences of descending shares, or hold fewer
            than a site's rank.
        PlanError: if a name is no site with a rank, the budget is below 1, or `rho`.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {n: jax.ShapeDtypeStruct((6, 4), "float32") for n in "vw"}
        >>> roles = {n: {"inputs": (0,), "outputs": (1,)} for n in "vw"}
        >>> plan = lj.plan(lj.LoraConfig("[vw]", rank=2), params, roles=roles)
        >>> spectra = {"v": [0.9, 0.05, 0.03, 0.01], "w": [0.4, 0.3, 0.2, 0.1]}
        >>> [(s.path, s.rank, s.alpha) for s in redistribute(plan, spectra)]
        [('v', 1, 1.0), ('w', 3, 3.0)]

    References:
        Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance
        Adaptation", 2024. https://arxiv.org/abs/2410.07170
    """
    if not spectra:
        raise CaptureError("`spectra` is empty: no site offers any direction.")
    # Of those that share an input, the ones that offer nothing keep their ranks.
    quiet = {site.name for site in plan} - set(spectra)
    groups = [tuple(name for name in group if name not in quiet) for group in shared]
    most = caps(plan, rho, groups, spectra)
    sites = {site.name: site for site in plan}
    if budget is None:
        budget = sum(sites[name].rank for name in most)
    found = ranks(_checked(spectra, most, sites), most, budget, groups)
    return resized(
        plan,
        {
            name: (rank, _alpha(sites[name], rank, adjust_scale))
            for name, rank in found.items()
            if rank != sites[name].rank
        },
    )


def caps(
    plan: Plan, rho: float, groups: Sequence[Sequence[str]], names: Iterable[str]
) -> dict[str, int]:
    """The largest rank that each site may get.

    Args:
        plan: gives ranks and shapes.
        rho: how many times its rank a site may get.
        groups: of sites that share an input.
        names: of the sites that take part.
    """
    if not 1 <= rho < float("inf"):
        raise PlanError(f"`rho` = {rho!r}; a number from 1 up is meant.")
    sides = {
        site.name: min(slot.sides)
        for slot in plan.slots
        for site in slot.sites
        if site is not None and site.rank
    }
    wanted = set(names)
    for name in [*wanted, *(name for group in groups for name in group)]:
        if name not in sides:
            raise PlanError(
                f"{name!r} is no site of the plan that has a rank. Closest: "
                f"{shorten(closest(name, sides))}."
            )
    most = {site.name: round(site.rank * rho) for site in plan if site.name in wanted}
    for group in groups:
        largest = max(most[name] for name in group)
        most |= dict.fromkeys(group, largest)
    return {name: min(rank, sides[name]) for name, rank in most.items()}


def ranks(
    spectra: Mapping[str, np.ndarray],
    most: Mapping[str, int],
    budget: int,
    groups: Sequence[Sequence[str]] = (),
) -> dict[str, int]:
    """How many of each site's directions are among the `budget` largest of all.

    Equal ones are taken in the order of the sites, those that share an input after the
    first of their group.
    """
    if budget < 1:
        raise PlanError(f"`budget` = {budget}; a number from 1 up is meant.")
    later = [name for group in groups for name in group[1:]]
    order = [name for name in most if name not in later] + later
    offered = [np.asarray(spectra[name])[: most[name]] for name in order]
    owners = np.repeat(np.arange(len(order)), [len(one) for one in offered])
    taken = np.argsort(-np.concatenate(offered), kind="stable")[:budget]
    counts = np.bincount(owners[taken], minlength=len(order))
    found = dict(zip(order, counts.tolist(), strict=True))
    return {name: found[name] for name in most}


def _alpha(site: Site, rank: int, adjust: bool) -> float:
    return site.alpha * (rank / site.rank) if adjust else site.alpha


def _checked(
    spectra: Mapping[str, Any], most: Mapping[str, int], sites: Mapping[str, Site]
) -> dict[str, np.ndarray]:
    found = Spectra.of(spectra)
    for name, values in found.items():
        if len(values) < min(most[name], sites[name].rank):
            raise CaptureError(
                f"The spectrum of {name!r} has the shape {values.shape}, and its rank "
                f"is {sites[name].rank}. Give one explained variance for each of "
                f"{most[name]} directions: gather as many."
            )
    if not isinstance(spectra, Spectra):
        return dict(found)
    # Their values are of each site's own size; what competes is shares.
    totals = {name: total if total > 0 else 1.0 for name, total in found.totals.items()}
    return {name: values / totals[name] for name, values in found.items()}
