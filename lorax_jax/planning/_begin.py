"""Whether the initializers that a configuration names fit the weights it takes."""

from collections.abc import Sequence
from typing import Any

from .. import initializers
from .._config import LoraConfig
from .._errors import PlanError
from ._sites import Site


def check_inits(config: LoraConfig) -> None:
    """Raises if a configuration names an initializer that there is not."""
    said = [one for rule in config.rules or () for one in (rule, *rule.parts)]
    for init in (config.init, *(one.init for one in said if one.init is not None)):
        try:
            initializers.method(init)
        except KeyError:
            known = [*initializers.names(), *initializers.families()]
            raise PlanError(
                f"`init` = {init!r} is no initializer. Known: "
                f"{', '.join(map(repr, known))}."
            ) from None


def check_method(
    init: Any, name: str, rank: int, alpha: float, most: int
) -> initializers.Method:
    """The initializer of a site, which must be able to start it.

    Args:
        init: its name.
        name: the site's, for the message.
        rank: the site's.
        alpha: the site's.
        most: how many directions the site's weight has.

    Raises:
        PlanError: if it has no such rank, or no such scale.
    """
    method = initializers.method(init)
    if method.directions * rank > most:
        fits = most // method.directions
        raise PlanError(
            f"`init` = {init!r} takes {method.directions} directions for each rank, "
            f"and {name!r} has the rank {rank} and {most} directions. "
            + (
                f"Lower `rank` for this site: targets={{{name!r}: {{'rank': {fits}}}, "
                "...}"
                if fits
                else f"Give it another `init`: targets={{{name!r}: {{'init': True}}, "
                "...}"
            )
        )
    if rank % method.multiple:
        raise PlanError(
            f"`init` = {init!r} needs ranks that are multiples of {method.multiple}, "
            f"and {name!r} has the rank {rank}. Give it another rank: "
            f"targets={{{name!r}: {{'rank': {rank + -rank % method.multiple}}}, ...}}"
        )
    if method.reads != "shape" and alpha <= 0:
        raise PlanError(
            f"`alpha` = {alpha} at {name!r}, whose `init` = {init!r} shares the scale "
            "out between A and B: a positive `alpha` is meant."
        )
    return method


def check_frozen(sites: Sequence[Site | None]) -> None:
    """Raises if some layers of a stack freeze a factor that others train."""
    found: dict[tuple[str, ...], Site] = {}
    for site in sites:
        if site is not None:
            found.setdefault(site.frozen, site)
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise PlanError(
            f"The layers of {one.leaf!r} share one array for each factor, and `init` = "
            f"{one.init!r} at {one.name!r} freezes {list(one.frozen)}, `init` = "
            f"{other.init!r} at {other.name!r} {list(other.frozen)}. Give all layers "
            "initializers that freeze the same."
        )
