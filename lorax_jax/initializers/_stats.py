"""Whether statistics are there and fit."""

from collections.abc import Sequence
from typing import Any

from .._errors import CaptureError


def check_stats(init: str, stats: Any, method: str, known: Sequence[str]) -> None:
    """Raises unless there are statistics that have a method.

    Args:
        init: name of the initializer.
        stats: what it got.
        method: what it asks them for.
        known: statistics that have it.
    """
    ways = " or ".join(f"`stat=statistics.{stat}`" for stat in known)
    if stats is None:
        raise CaptureError(
            f"`init={init!r}` starts from statistics of what the weight is fed, and "
            f"none were given. Gather them with `capture(fn, plan, stat=...)`, {ways}, "
            "and give them to `init(..., stats=...)`."
        )
    if not hasattr(stats, method):
        raise CaptureError(
            f"`init={init!r}` asks statistics for `{method}`, which those given, "
            f"{type(stats).__name__}, do not know. Gather others: {ways}."
        )


def check_size(init: str, found: int, d_in: int) -> None:
    """Raises unless the statistics are of rows that the weight could be fed."""
    if found != d_in:
        raise CaptureError(
            f"`init={init!r}` got statistics of rows of {found} values for a weight "
            f"that is fed rows of {d_in}. Give those that were gathered with this plan "
            "on this model."
        )
