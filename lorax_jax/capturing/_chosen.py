"""Which of a plan's weights are looked at."""

from collections.abc import Iterable

from .._errors import CaptureError, closest, shorten
from ..planning import Plan, Slot


def chosen(plan: Plan, only: Iterable[str] | None = None) -> tuple[Slot, ...]:
    """The slots that have ranks, or those of them that are named.

    Args:
        plan: the plan.
        only: names of slots; `None` is all.

    Raises:
        CaptureError: for a name that is not among them.
    """
    ranked = {s.name: s for s in plan.slots if s.role.kind in ("lora", "dora")}
    if only is None:
        return tuple(ranked.values())
    wanted = [only] if isinstance(only, str) else list(only)
    for name in wanted:
        if name not in ranked:
            near = shorten(closest(name, ranked))
            raise CaptureError(
                f"`only` holds {name!r}, which is no weight of the plan that has a "
                f"rank. Closest: {near}."
            )
    return tuple(slot for name, slot in ranked.items() if name in wanted)
