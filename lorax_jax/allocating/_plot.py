"""`plot_spectra`: spectra and chosen ranks as a PNG."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._errors import PlanError
from ..planning import Plan, Site, Spectra


def plot_spectra(
    plan: Plan,
    path: str | os.PathLike,
    *,
    spectra: Mapping[str, Any] | None = None,
    title: str = "",
) -> None:
    """Draws how much of each site's energy a rank explains, and the plan's ranks.

    On the left a line for each site, its share of energy by rank, with a dot at the
    site's own rank; on the right that rank, site by site. Sites whose paths differ in
    numbers alone have one color.

    Args:
        plan: the ranks, and the spectra where `allocate` or `with_spectra` gave them.
        path: the PNG to write.
        spectra: name of a site -> energies, in place of the plan's.
        title: what to print above.

    Raises:
        PlanError: if there are no spectra, or not of the plan's sites.
    """
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    if spectra is not None:
        plan = plan.with_spectra(spectra)
    found = _spectra(plan)
    kinds: dict[str, list[Site]] = {}
    for site in plan:
        if site.name in found:
            kinds.setdefault(_kind(site.name), []).append(site)
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (kind, sites) in enumerate(kinds.items()):
        color = f"C{i % 10}"
        for site in sites:
            total = found.totals[site.name] or 1.0
            shares = np.cumsum(found[site.name]) / total
            ranks = np.arange(1, len(shares) + 1)
            left.plot(ranks, shares, color=color, alpha=0.4, linewidth=1)
            left.plot(
                site.rank, found.explained(site.name, site.rank), "o", color=color
            )
        chosen = [site.rank for site in sites]
        right.plot(range(len(sites)), chosen, "o-", color=color, label=kind)
    left.set(xscale="log", xlabel="rank", ylabel="share of the energy", ylim=(0, 1.02))
    right.set(xlabel="site, in the order of the plan", ylabel="rank")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize="small")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _spectra(plan: Plan) -> Spectra:
    if not plan.spectra:
        raise PlanError(
            "The plan has no spectra to draw. Give `spectra=lj.spectra(plan, params)`, "
            "or a plan that `allocate` made."
        )
    return plan.spectra


def _kind(name: str) -> str:
    return "/".join("#" if part.isdigit() else part for part in name.split("/"))
