"""`kappa`: targets by condition number."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._errors import PlanError
from ..planning import Plan, Slot, resized
from ._spectra import ranked, singular_values

# So that a singular matrix has a condition number too; KappaTune's own.
_FLOOR = 1e-8


@dataclasses.dataclass(frozen=True)
class Kappa:
    """Sites by their condition numbers.

    Attributes:
        values: name of a site -> its condition number, the lowest first.
        chosen: names of the sites that were chosen, the lowest first.
        skipped: names of the sites that are too large to be decomposed.
        plan: the plan with the chosen sites alone.
    """

    values: Mapping[str, float]
    chosen: tuple[str, ...]
    skipped: tuple[str, ...]
    plan: Plan

    @property
    def targets(self) -> tuple[str, ...]:
        """Regexes of the chosen sites, for `LoraConfig(targets=...)`.

        Raises:
            PlanError: if a chosen site is a part or a use of its leaf.
        """
        found = {site.name: site for site in self.plan}
        for name in self.chosen:
            if found[name].role.suffix:
                raise PlanError(
                    f"{name!r} is not all that its leaf is, which no regex of paths "
                    "says. Use `.plan`, which has the chosen sites alone."
                )
        return tuple(re.escape(name) for name in self.chosen)

    def __str__(self) -> str:
        width = max(map(len, self.values), default=0)
        lines = [
            f"{name.ljust(width)}  {value:12.4g}{'  chosen' * (name in self.chosen)}"
            for name, value in self.values.items()
        ]
        if self.skipped:
            lines.append(f"skipped as too large: {', '.join(self.skipped)}")
        return "\n".join(lines)


def kappa(plan: Plan, params: Any, *, share: float = 0.2, most: int = 16384) -> Kappa:
    r"""Ranks a plan's sites by the condition numbers of their weights.

    $$\kappa = \frac{\sigma_{\max}}{\sigma_{\min} + 10^{-8}}$$

    KappaTune adapts the weights with the lowest, whose directions are used most evenly:
    they are the least specialized, and changing them forgets least. Of experts and
    groups $\kappa$ is the mean over theirs.

    Of $n$ candidates, `max(1, int(n * share))` are chosen. Weights with experts are
    chosen among themselves, as PEFT's `find_kappa_target_modules` does. Candidates are
    the sites of `plan`: PEFT's are all linear modules and the output head.

    Args:
        plan: whose sites are ranked, such as that of `LoraConfig("all-linear")`.
        params: the parameter tree.
        share: of the candidates, in (0, 1].
        most: sides longer than this are not decomposed, and their sites not chosen.

    Returns:
        A `Kappa`: `.plan` is the plan of the chosen sites, `.targets` their regexes.

    Raises:
        PlanError: if `share` or `most` make no sense, if no site is left to rank, if a
            weight is not finite, or if `params` is not the tree of the plan, or one
            of types.

    Example:
        >>> import jax.numpy as jnp, lorax_jax as lj
        >>> params = {"q": jnp.eye(3), "v": jnp.diag(jnp.array([4.0, 2.0, 1.0]))}
        >>> fn = lambda params, x: x @ params["q"] @ params["v"]
        >>> plan = lj.plan(lj.LoraConfig("q|v", rank=1), params, fn, (jnp.ones(3),))
        >>> found = lj.kappa(plan, params)
        >>> print(found)
        q             1  chosen
        v             4
        >>> found.targets
        ('q',)

    References:
        Ludwig, "KappaTune". https://github.com/oswaldoludwig/kappaTune
    """
    if not 0 < share <= 1:
        raise PlanError(
            f"`share` = {share!r}; a share of the sites in (0, 1] is meant."
        )
    slots = ranked(plan)
    small = tuple(slot for slot in slots if max(slot.sides) <= most)
    large = (slot for slot in slots if max(slot.sides) > most)
    skipped = tuple(site.name for slot in large for site in slot.sites if site)
    if not small:
        raise PlanError(
            f"No site of the plan has a rank and sides up to `most` = {most}, so there "
            "is none to rank."
        )
    apart: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for slot, values in singular_values(plan, params, small):
        for name, value in _of(slot, np.asarray(values, np.float64)).items():
            if not np.isfinite(value):
                raise PlanError(
                    f"The weight of {name!r} is not finite. Look for NaN or infinity "
                    "in the parameters."
                )
            apart[bool(slot.experts)][name] = value
    chosen = []
    for values in apart.values():
        order = sorted(values, key=values.__getitem__)
        chosen += order[: max(1, int(len(order) * share))]
    values = apart[False] | apart[True]
    order = sorted(values, key=values.__getitem__)
    dropped = {n: (0, 0.0) for n in (*order, *skipped) if n not in chosen}
    return Kappa(
        {name: values[name] for name in order},
        tuple(name for name in order if name in chosen),
        skipped,
        resized(plan, dropped),
    )


def _of(slot: Slot, values: np.ndarray) -> dict[str, float]:
    """The condition numbers of a slot's sites, `values` being their spectra."""
    found = values[..., 0] / (values[..., -1] + _FLOOR)
    found = found.reshape(len(slot.sites), -1).mean(axis=-1)
    return {s.name: float(k) for s, k in zip(slot.sites, found, strict=True) if s}
