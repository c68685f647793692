"""`settle`: components of all sites until they stop turning, and ranks from them."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from .._errors import CaptureError, CaptureWarning, shorten
from ..planning import Plan, Slot
from ..statistics import PcaState
from ._components import Components, keeping, paused
from ._cycle import END, Cycle
from ._redistribute import caps, ranks, redistribute
from ._sharing import sharing

States = Mapping[str, PcaState]


@dataclasses.dataclass(frozen=True)
class EvaResult:
    """What `eva` found.

    Attributes:
        plan: with the new ranks and alphas.
        states: name of an adapted weight of the new plan -> its principal components:
            `stats` of `init`.
        spectra: name of a site -> explained variance of its components, descending.
        shared: groups of sites that share an input, by name.
        steps: how many batches were taken in.
        unsettled: names of sites whose components had not settled at the end.
    """

    plan: Plan
    states: States
    spectra: dict[str, np.ndarray]
    shared: tuple[tuple[str, ...], ...]
    steps: int
    unsettled: tuple[str, ...]


def settle(
    plan: Plan,
    step: Callable[[dict[str, PcaState], Any], States],
    states: States,
    batches: Iterable[Any],
    *,
    tau: float = 0.99,
    rho: float = 2.0,
    budget: int | None = None,
    adjust_scale: bool = True,
    max_batches: int = 1000,
    order: Sequence[str] = (),
    progress: bool = False,
) -> EvaResult:
    r"""EVA's procedure, for any step that takes a batch in; see `eva`.

    Args:
        plan: whose sites get new ranks. Its own ranks add up to the budget.
        step: `step(states, batch) -> states` runs the model on a batch and takes in
            what its sites are fed. It may donate the states.
        states: name of a slot -> the states of `Pca` for its layers, before any row.
            Sites of slots that are not there keep their ranks.
        batches: of any kind that `step` takes. A list, or what else can be gone through
            again; what can not ends the procedure when it ends.
        tau, rho, budget, adjust_scale, max_batches, order, progress: as in `eva`.

    Returns:
        An `EvaResult`.

    Raises:
        CaptureError: if there are no batches, no batch has as many rows for a site as
            it keeps components, NaN or infinity is among the rows, or the states are
            not those of `Pca` with as many components.
        PlanError: if `rho`, `budget` or a name of `order` makes no sense.

    Warns:
        CaptureWarning: if sites have not settled when `max_batches` or the batches end.
    """
    if not 0 <= tau <= 1:
        raise CaptureError(f"`tau` = {tau!r}; a cosine from 0 to 1 is meant.")
    if max_batches < 1:
        raise CaptureError(f"`max_batches` = {max_batches}; at least 1 is meant.")
    slots, states = _slots(plan, states), dict(states)
    sites = [site for slot in slots for site in slot.sites if site is not None]
    names = [site.name for site in sites]
    cycle = Cycle(batches)
    groups = sharing(slots, step, states, cycle.first, order)
    most = caps(plan, rho, groups, names)
    budget = sum(site.rank for site in sites) if budget is None else budget
    states = keeping(slots, states, rho, groups)
    keep = {name: state.keep for name, state in states.items()}
    owner = {name: group[0] for group in groups for name in group}

    def spectra() -> dict[str, np.ndarray]:
        return {name: seen.explained[owner.get(name, name)] for name in names}

    def settled() -> dict[str, bool]:
        """Of each site, whether all components that are wanted have settled."""
        found = {}
        for name in names:
            like = owner.get(name, name)
            group = next((group for group in groups if name in group), (name,))
            first = max(wanted[one] for one in group)
            found[name] = bool((seen.similarity[like][:, :first] >= tau).all())
        return found

    seen, wanted, steps = Components.of(slots, states), most, 0
    with tqdm(desc="EVA", unit="batch", disable=not progress) as bar:
        while True:
            done = settled()
            bar.set_postfix_str(f"{sum(done.values())}/{len(done)} sites settled")
            if all(done.values()) or steps == max_batches:
                break
            batch = cycle.next()
            if batch is END:
                break
            states = dict(step(paused(slots, states, keep, done), batch))
            seen = Components.of(slots, states)
            seen.check_finite()
            steps += 1
            bar.update()
            if seen.filled():
                wanted = ranks(spectra(), most, budget, groups)
            elif cycle.passed:
                break
    seen.check_filled()
    unsettled = tuple(name for name in names if not done[name])
    if unsettled:
        warnings.warn(_unsettled(unsettled, steps, tau), CaptureWarning, stacklevel=2)
    options: dict[str, Any] = {"rho": rho, "adjust_scale": adjust_scale}
    new = redistribute(plan, spectra(), budget=budget, shared=groups, **options)
    left = {
        slot.name: dataclasses.replace(states[slot.name], keep=keep[slot.name])
        for slot in new.slots
        if slot.name in states
    }
    return EvaResult(new, left, spectra(), groups, steps, unsettled)


def _slots(plan: Plan, states: States) -> tuple[Slot, ...]:
    """The slots that there are states for, in the plan's order."""
    slots = tuple(slot for slot in plan.slots if slot.name in states)
    strange = set(states) - {slot.name for slot in slots}
    if strange or not slots:
        raise CaptureError(
            f"The states are those of {shorten(sorted(states)) or 'nothing'}, and the "
            f"plan adapts {shorten([slot.name for slot in plan.slots])}. Give states "
            "that were made for this plan."
        )
    for slot in slots:
        if not isinstance(states[slot.name], PcaState):
            raise CaptureError(
                f"The state of {slot.name!r} is a {type(states[slot.name]).__name__}; "
                "EVA goes by principal components: `stat=statistics.Pca(...)`."
            )
        leading = states[slot.name].singular.shape[:-1]
        if leading != (*slot.layers, *slot.apart):
            raise CaptureError(
                f"The state of {slot.name!r} has the leading axes {leading}, and its "
                f"weight {(*slot.layers, *slot.apart)}. Give states that were made for "
                "this plan."
            )
    return slots


def _unsettled(names: Sequence[str], steps: int, tau: float) -> str:
    return (
        f"After {steps} batches the components of {len(names)} sites still turn by "
        f"more than `tau` = {tau} allows: {shorten(names)}. Ranks and directions are "
        "what they are now. Give more batches or larger ones, raise `max_batches`, or "
        "lower `tau`."
    )
