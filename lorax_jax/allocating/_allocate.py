"""`allocate`: ranks under a budget."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from .._errors import PlanError
from ..planning import Plan, Site, Slot, Spectra, parameters, resized
from ._greedy import greedy


def allocate(
    plan: Plan,
    spectra: Mapping[str, Any],
    *,
    budget: int | None = None,
    ranks: int | None = None,
    smallest: int = 0,
    largest: int | None = None,
    keep: Literal["scale", "alpha"] = "scale",
) -> Plan:
    r"""Gives ranks to the sites where they capture most, under a budget.

    With $v_{j1} \ge v_{j2} \ge \dots$ the spectrum of site $j$ and $c_j$ the cost of a
    rank there, ranks $r_j$ are chosen for

    $$\max \sum_j \sum_{i \le r_j} v_{ji} \quad \text{such that} \quad
      \sum_j c_j r_j \le \text{budget} .$$

    Ranks go one by one to where they gain most by cost. The result is never over the
    budget and less than the gain of a single rank short of the optimum (of the first
    rank that was not affordable); where all costs are equal it is the optimum. A larger
    budget never captures less.

    Energies of different sites are compared as they are. Of weights, whose sizes
    differ for no reason that matters, give shares instead: divide each spectrum by its
    total, as EVA does.

    Args:
        plan: the sites; unchanged.
        spectra: name of a site -> what each direction is worth, descending, as
            `lj.spectra` gives them. Sites without one keep their rank, and cost what
            they cost.
        budget: bytes of all A and B together, at true ranks in the plan's dtype; one
            rank of a `(d_in, d_out)` kernel costs `(d_in + d_out) * itemsize`, in each
            expert. Biases of B and magnitudes, which do not depend on the rank, are
            not counted. Arrays of a stack are padded to the largest of its ranks,
            which is not counted either: `Plan.memory` says what they take.
        ranks: instead of `budget`, how many ranks there are for all sites together,
            each as good as another: EVA's way.
        smallest: the least rank of a site; 0 lets sites be dropped.
        largest: the most; `None` is what the weight and its spectrum have.
        keep: what stays as it is where a rank changes: the `"scale"`, so that `alpha`
            moves in proportion (with `rslora`, to the root), or `"alpha"`.

    Returns:
        A plan with other ranks, which prints the share of energy that they explain.

    Raises:
        PlanError: if neither or both of `budget` and `ranks` are given; if they do not
            suffice for the smallest ranks; if a spectrum is of no site or not
            descending; if a number makes no sense.

    Example:
        >>> import jax, lorax_jax as lj
        >>> params = {n: jax.ShapeDtypeStruct((6, 4), "float32") for n in "qv"}
        >>> roles = {n: {"inputs": (0,), "outputs": (1,)} for n in "qv"}
        >>> plan = lj.plan(lj.LoraConfig("q|v", rank=2), params, roles=roles)
        >>> found = allocate(plan, {"q": [9, 8, 7], "v": [5, 1]}, budget=4 * 40)
        >>> [(site.path, site.rank, site.alpha) for site in found]
        [('q', 3, 3.0), ('v', 1, 1.0)]

    References:
        Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained
        Variance Adaptation", 2024. https://arxiv.org/abs/2410.07170
    """
    sites = {s.name: (s, slot) for slot in plan.slots for s in slot.sites if s}
    sites = {name: pair for name, pair in sites.items() if pair[0].rank}
    found = Spectra.of(spectra)
    found.check_names(sites)
    limit, unit = _limit(budget, ranks)
    _check_bounds(smallest, largest, keep)
    chosen = {name: pair for name, pair in sites.items() if name in found}
    itemsize = jnp.dtype(plan.config.dtype).itemsize

    def cost(pair: tuple[Site, Slot]) -> int:
        return 1 if budget is None else _values(*pair) * itemsize

    left = limit - sum(
        cost(pair) * pair[0].rank for name, pair in sites.items() if name not in found
    )
    costs = [cost(pair) for pair in chosen.values()]
    most = [_most(found[n], slot, largest) for n, (_, slot) in chosen.items()]
    least = [min(smallest, *slot.sides) for _, slot in chosen.values()]
    needed = sum(c * n for c, n in zip(costs, least, strict=True))
    if needed > left or left <= 0:
        raise PlanError(
            f"The budget of {limit:,} {unit} is too small: sites without a spectrum "
            f"take {limit - left:,}, and the rank {smallest} at the others takes "
            f"{needed:,}. Raise it, lower `smallest`, or adapt fewer sites."
        )
    gains = [
        np.pad(found[name], (0, max(n - found[name].size, 0)))[: max(n, m)]
        for name, n, m in zip(chosen, least, most, strict=True)
    ]
    counts = greedy(gains, costs, left, least)
    if not any(counts):
        raise PlanError(
            f"The budget of {limit:,} {unit} leaves no site a rank: one costs "
            f"{min(costs):,} at least. Raise it."
        )
    wanted = {
        name: (rank, _alpha(plan, site, rank, keep))
        for (name, (site, _)), rank in zip(chosen.items(), counts, strict=True)
    }
    made = resized(plan, wanted)
    kept = {name for name, (rank, _) in wanted.items() if rank}
    energies = {name: found[name] for name in found if name in kept}
    return made.with_spectra(
        Spectra(energies, {name: found.totals[name] for name in energies})
    )


def _values(site: Site, slot: Slot) -> int:
    """Values that one rank has in A and B."""
    role, shape = site.role, slot.shape
    return parameters(role, shape, 1) - parameters(role, shape, 0)


def _most(spectrum: np.ndarray, slot: Slot, largest: int | None) -> int:
    most = min(spectrum.size, *slot.sides)
    return most if largest is None else min(most, largest)


def _alpha(plan: Plan, site: Site, rank: int, keep: str) -> float:
    if keep == "alpha" or rank in (0, site.rank):
        return site.alpha
    return site.scale / plan.config.scale(rank, 1.0)


def _limit(budget: Any, ranks: Any) -> tuple[int, str]:
    if (budget is None) == (ranks is None):
        raise PlanError(
            "`allocate` takes one limit: `budget`, in bytes, or `ranks`, their number. "
            f"Got `budget` = {budget!r} and `ranks` = {ranks!r}."
        )
    name, limit = ("ranks", ranks) if budget is None else ("budget", budget)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise PlanError(f"`{name}` = {limit!r:.60}; an integer from 1 up is meant.")
    return limit, "ranks" if budget is None else "bytes"


def _check_bounds(smallest: Any, largest: Any, keep: Any) -> None:
    bounds = {"smallest": smallest} | ({} if largest is None else {"largest": largest})
    for name, number in bounds.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise PlanError(
                f"`{name}` = {number!r:.60}; an integer from 0 up is meant."
            )
    if largest is not None and largest < max(smallest, 1):
        raise PlanError(
            f"`largest` = {largest} leaves no rank from `smallest` = {smallest} up."
        )
    if keep not in ("scale", "alpha"):
        raise PlanError(f"`keep` = {keep!r:.60}; one of 'scale', 'alpha' is meant.")
