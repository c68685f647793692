"""`Stats`: the states of a statistic, for each adapted leaf."""

import dataclasses
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .._errors import CaptureError, shorten
from ..statistics import Statistic
from ._gathered import Gathered, differ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Stats(Gathered):
    """What was gathered: a state for each matrix of each adapted leaf.

    A mapping from names of slots to states, whose arrays have the leading axes
    `(*layers, *experts, *groups)` of the leaf. It is a pytree, so it may be a `jit`'s
    argument, or be kept with a training state.

    Attributes:
        states: the states by name.
        witness: some entries of each leaf, to tell one model from another.
        mixed: whether several models were seen.
        batches: how many batches were taken in.
        statistic: what is gathered.
    """

    mixed: jax.Array
    batches: jax.Array
    statistic: Statistic = dataclasses.field(metadata={"static": True})

    def merge(self, other: "Stats") -> "Stats":
        """The statistics of both, gathered apart: by other processes, or later.

        Raises:
            CaptureError: if they are of other leaves, statistics or models.
        """
        if self.statistic != other.statistic:
            raise CaptureError(
                f"One side gathered {self.statistic}, the other {other.statistic}. "
                "Merge what one statistic gathered."
            )
        mine, theirs = _shapes(self.states), _shapes(other.states)
        if mine != theirs:
            odd = sorted({n for n, _ in set(mine.items()) ^ set(theirs.items())})
            raise CaptureError(
                f"The two sides differ about {shorten(odd)}. Merge what was gathered "
                "with one plan."
            )
        states = {
            name: mapped(self.statistic, self.statistic.merge, state, other[name])
            for name, state in self.states.items()
        }
        both = (self.batches > 0) & (other.batches > 0)
        changed = both & differ(self.witness, other.witness)
        mixed = self.mixed | other.mixed | changed
        seen = jax.tree.map(
            lambda x, y: jnp.where(self.batches > 0, x, y), self.witness, other.witness
        )
        return Stats(states, seen, mixed, self.batches + other.batches, self.statistic)

    def save(self, path: str | os.PathLike) -> None:
        """Writes them to a file; one that is there is replaced when all is written."""
        path = Path(path)
        arrays = {key: np.asarray(x) for key, x in _keyed(self)}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, new = tempfile.mkstemp(dir=path.parent, suffix=".new")
        os.close(handle)
        try:
            save_file(arrays, new, {"statistic": repr(self.statistic)})
            os.replace(new, path)
        finally:
            Path(new).unlink(missing_ok=True)

    def load(self, path: str | os.PathLike) -> "Stats":
        """What `save` wrote of statistics like these.

        Raises:
            CaptureError: if the file holds others, or cannot be read.
        """
        try:
            with safe_open(str(path), "numpy") as file:
                found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                said = (file.metadata() or {}).get("statistic")
        except (OSError, SafetensorError) as error:
            raise CaptureError(f"{path} holds no statistics: {error}") from None
        wanted = dict(_keyed(self))
        odd = [
            key
            for key in wanted.keys() | found.keys()
            if key not in wanted
            or key not in found
            or (found[key].shape, found[key].dtype)
            != (wanted[key].shape, wanted[key].dtype)
        ]
        if odd or said != repr(self.statistic):
            raise CaptureError(
                f"{path} holds statistics of other leaves or of another kind, "
                f"{said}: they differ about {shorten(sorted(odd))}. Give the file that "
                "was written with this plan and statistic, or another path."
            )
        leaves = [jnp.asarray(found[key]) for key, _ in _keyed(self)]
        return jax.tree.unflatten(jax.tree.structure(self), leaves)


def mapped(statistic: Statistic, fn: Any, state: Any, *others: Any) -> Any:
    """`fn` on the states of single matrices, over the leading axes of `state`."""
    single = jax.eval_shape(lambda: statistic.init(1))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(single), strict=True)
    for _ in range(next(leaf.ndim - one.ndim for leaf, one in pairs)):
        fn = jax.vmap(fn)
    return fn(state, *others)


def _keyed(stats: Stats) -> list[tuple[str, Any]]:
    paths, _ = jax.tree.flatten_with_path(stats)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]


def _shapes(states: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(jnp.shape(x) for x in jax.tree.leaves(state))
        for name, state in states.items()
    }
