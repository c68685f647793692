"""`save_state` and `restore_state`: a run that stops goes on as if it had not.

Saved are the adapter (`train` and `fixed`), the optimizer's state, the step, the
random key and a history; never the base. Beside the arrays lies a list of their paths,
shapes and dtypes, which is compared before anything is restored.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from .. import _paths
from .._errors import listing
from ._errors import TrainingError
from ._step import State

_UNFINISHED = "*.orbax-checkpoint-tmp*"  # Orbax's name for a state in the making
_ARRAYS, _ABOUT = "arrays", "about"


def save_state(
    folder: str | os.PathLike,
    state: State,
    fixed: dict[str, Any],
    history: list[dict[str, Any]] | None = None,
) -> Path:
    """Saves a state with Orbax, in a folder of its own below `folder`.

    The folder appears whole or not at all; only then are older states of the same run
    removed.

    Args:
        folder: where the states of one run are kept.
        state: after any step.
        fixed: `Adapter.fixed`.
        history: JSON to keep beside it.

    Returns:
        The new folder, named for the step.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    target = folder / f"{int(state.step):08d}"
    leaves = _leaves(state, fixed)
    about = {"leaves": _described(leaves), "history": history or []}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as writer:
        writer.save(
            target,
            ocp.args.Composite(
                arrays=ocp.args.StandardSave(_nested(leaves)),
                about=ocp.args.JsonSave(about),
            ),
            force=True,
        )
    for old in saved_steps(folder):
        if old < int(state.step):
            shutil.rmtree(folder / f"{old:08d}")
    return target


def restore_state(
    folder: str | os.PathLike, like: State, fixed: dict[str, Any]
) -> tuple[State, dict[str, Any], list[dict[str, Any]]]:
    """Restores the latest state below `folder`.

    Arrays are laid out over devices as those of `like` and `fixed` are, so a run may go
    on with other devices than it began with.

    Args:
        folder: as given to `save_state`.
        like: a state of the same run, as `start` makes it.
        fixed: the `Adapter.fixed` that goes with it.

    Returns:
        `(state, fixed, history)`.

    Raises:
        TrainingError: if there is no state, or what is saved is not what this run
            trains: the message names the differences.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    steps = saved_steps(folder)
    if not steps:
        raise TrainingError(
            f"{folder} holds no saved state, so there is nothing to resume."
        )
    source = folder / f"{steps[-1]:08d}"
    leaves = _leaves(like, fixed)
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for path, x in leaves.items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            only = ocp.args.Composite(about=ocp.args.JsonRestore())
            about = reader.restore(source, only)[_ABOUT]
            _check_same(_described(leaves), about["leaves"], source)
            whole = ocp.args.Composite(arrays=ocp.args.StandardRestore(_nested(wanted)))
            nested = reader.restore(source, whole)[_ARRAYS]
    except TrainingError:
        raise
    except Exception as error:  # Orbax and its storage raise many kinds
        reason = str(error).splitlines()[0] if str(error) else ""
        raise TrainingError(
            f"{source} cannot be restored: {type(error).__name__}: {reason}"
        ) from error
    values = [_at(nested, path) for path in leaves]
    whole = jax.tree.unflatten(jax.tree.structure(_whole(like, fixed)), values)
    fixed, key = whole.pop("fixed"), whole.pop("key")
    key = jax.random.wrap_key_data(key, impl=jax.random.key_impl(like.key))
    return State(**whole, key=key), fixed, about["history"]


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """The steps that states are saved of, in order."""
    return sorted(int(path.name) for path in _numbered(folder) if _is_state(path))


def foreign_states(folder: str | os.PathLike) -> list[Path]:
    """What lies where a state would, and is none."""
    return sorted(path for path in _numbered(folder) if not _is_state(path))


def holds_nothing(folder: str | os.PathLike) -> bool:
    """Whether there is no state, and nothing else but what Orbax had begun to write."""
    unfinished = {*Path(folder).glob(_UNFINISHED)}
    return all(path in unfinished for path in Path(folder).glob("*"))


def remove_states(folder: str | os.PathLike) -> None:
    """Removes every state, and what Orbax had written of one; nothing else."""
    states = [path for path in _numbered(folder) if _is_state(path)]
    for path in (*states, *Path(folder).glob(_UNFINISHED)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _numbered(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if re.fullmatch(r"[0-9]{8,}", path.name)]


def _is_state(path: Path) -> bool:
    """Whether a folder holds the two parts that `save_state` writes."""
    parts = (path / _ARRAYS, path / _ABOUT)
    return not path.is_symlink() and all(part.is_dir() for part in parts)


def _whole(state: State, fixed: dict[str, Any]) -> dict[str, Any]:
    return state._asdict() | {"key": jax.random.key_data(state.key), "fixed": fixed}


def _leaves(state: State, fixed: dict[str, Any]) -> dict[str, jax.Array]:
    """Every array by its path; the key as the integers that it is made of."""
    pairs = _paths.flatten(_whole(state, fixed))[0]
    return {path: jnp.asarray(leaf) for path, leaf in pairs}


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _at(nested: dict[str, Any], path: str) -> Any:
    for part in path.split("/"):
        nested = nested[part]
    return nested


def _described(leaves: dict[str, jax.Array]) -> list[list[Any]]:
    return [[path, list(x.shape), x.dtype.name] for path, x in leaves.items()]


def _check_same(wanted: list[list[Any]], found: list[list[Any]], source: Path) -> None:
    if wanted == found:
        return
    ours, theirs = ({line[0]: line[1:] for line in lines} for lines in (wanted, found))
    differences = [f"{path}: not in this run" for path in theirs.keys() - ours.keys()]
    differences += [f"{path}: not saved" for path in ours.keys() - theirs.keys()]
    differences += [
        f"{path}: saved {theirs[path]}, here {ours[path]}"
        for path in ours.keys() & theirs.keys()
        if ours[path] != theirs[path]
    ]
    # What is trained comes first: the optimizer's state only follows from it.
    differences.sort(key=lambda line: (not line.startswith("train/"), line))
    raise TrainingError(
        f"{source} is the state of another run: what is trained differs.\n"
        + listing("found", differences[:6], len(differences))
        + "\nResume with the targets, rank and optimizer that it was saved with."
    )
