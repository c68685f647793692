"""The loop of a capture: batch by batch, compiled, and resumable."""

import itertools
import os
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from .._errors import CaptureError
from ._stats import Stats
from ._values import check_values

if TYPE_CHECKING:
    from ._capture import Capture


def run(
    gather: "Capture",
    params: Any,
    batches: Iterable[Any],
    before: Stats | None,
    progress: bool,
    save: str | os.PathLike | None,
    every: int,
) -> Stats:
    """See `Capture.run`."""
    if every < 1:
        raise CaptureError(f"`every` = {every!r}; a number of batches is meant.")
    check_values(params)
    found = gather.init() if before is None else before
    if save is not None and Path(save).exists():
        found = found.load(save)
    # The state is donated, so that a large one is held once; not the caller's.
    step = jax.jit(_step, static_argnums=0, donate_argnums=1)
    stats: Stats = jax.tree.map(jnp.copy, found)
    done = start = int(stats.batches) if save is not None else 0
    for batch in tqdm(
        itertools.islice(batches, start, None),
        desc="statistics",
        unit="batch",
        initial=start,
        total=len(batches) or None if isinstance(batches, Sized) else None,
        disable=not progress,
    ):
        args, kwargs = arguments(batch)
        stats = step(gather, stats, params, args, kwargs)
        done += 1
        if save is not None and (done - start) % every == 0:
            stats.save(save)
    if done == 0:
        raise CaptureError(
            "There are no batches to take statistics of: `batches` is empty. An "
            "iterator that was used up before gives none; give a list."
        )
    check(stats)
    if save is not None:
        stats.save(save)
    return stats


def _step(
    gather: "Capture", stats: Stats, params: Any, args: Any, kwargs: Any
) -> Stats:
    return gather(stats, params, *args, **kwargs)


class Call(NamedTuple):
    """A batch as positional and keyword arguments of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def arguments(batch: Any) -> Call:
    """A batch as arguments of the model."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):
        return Call((), dict(batch))
    args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    return Call(args, {})


def check(stats: Stats) -> None:
    """Raises unless every state is of numbers, and of one model.

    Raises:
        CaptureError: naming the weights whose inputs hold NaN or infinity.
    """
    bad = {
        name: ~jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
        for name, state in stats.items()
        if (leaves := [x for x in jax.tree.leaves(state) if jnp.size(x)])
    }
    found = [name for name, is_bad in jax.device_get(bad).items() if is_bad]
    if found:
        raise CaptureError(
            f"What reaches {found[0]!r}"
            + (f" and {len(found) - 1} other weights" if len(found) > 1 else "")
            + " holds NaN or infinity. Look for padding that attends to nothing (give "
            "a `mask`), or run the model in a wider dtype."
        )
    if bool(stats.mixed):
        raise CaptureError(
            "The parameters changed while statistics were gathered: batches before saw "
            "another model. Begin anew, with the parameters that are to be adapted."
        )
