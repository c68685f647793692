"""Where a command writes: never over what is there, unless told to.

Even then a run replaces only what an earlier run wrote: `run.json` says that there was
one, and each of its folders is known by what it holds. Everything else stays, or stops
the command before anything is changed.
"""

import contextlib
import os
import shutil
from pathlib import Path

from .. import train
from . import _settings
from ._claim import LOCK, is_held
from ._program import Failure

_MARGIN = 4 * 2**20  # for configs, tokenizers, plots: what is not counted

# What a run writes into its folder.
_WRITTEN = ("adapter", "merged", "state", "history.jsonl", "loss.png")


def new_folder(wanted: Path | None, *, usual: str, overwrite: bool) -> Path:
    """The folder to write to; nothing is made or removed yet.

    Args:
        wanted: what the user named. It may exist if it is empty, or holds no more than
            a run that was killed before it had saved anything.
        usual: the name to use otherwise; if taken, with the first free number.
        overwrite: take a folder that has something in it.

    Raises:
        Failure: if the folder is taken, or a file.
    """
    if wanted is None:
        folder, number = Path(usual), 1
        while is_held(folder) or (_taken(folder) and not overwrite):
            number += 1
            folder = Path(f"{usual}-{number}")
        wanted = folder
    if wanted.exists() and not wanted.is_dir():
        raise Failure(f"{wanted} is a file; a folder is meant. Nothing was changed.")
    if _taken(wanted) and not overwrite:
        raise Failure(
            f"{wanted} is not empty. Choose another folder, or replace what an earlier "
            "run wrote there with --overwrite. Nothing was changed."
        )
    return wanted


def _taken(folder: Path) -> bool:
    if not folder.is_dir():
        return folder.exists()
    found = {path.name for path in folder.iterdir()} - {LOCK}
    # What a run that was killed before, or in, its first save leaves behind.
    failed = found <= {_settings.FILE, "state"} and _settings.is_run(folder)
    return bool(found) and not (failed and train.holds_nothing(folder / "state"))


def check_replaceable(folder: Path, **inputs: str) -> None:
    """Raises if a run in `folder` would replace more than an earlier run's files.

    Args:
        folder: where the run writes.
        inputs: what the run reads, by what it is, e.g. `base="./llama"`.

    Raises:
        Failure: if a file or folder that would be replaced is not a run's, or one of
            the inputs lies there.
    """
    names = [n for n in (*_WRITTEN, _settings.FILE) if os.path.lexists(folder / n)]
    for path in (folder / name for name in names):
        for what, given in inputs.items():
            real, where = (Path(os.path.realpath(x)) for x in (given, path))
            if real == where or where in real.parents:
                raise Failure(
                    f"The {what} of this run, {given}, lies in {path}, which the run "
                    "would replace. Choose another folder. Nothing was changed."
                )
    if names and not _settings.is_run(folder):
        raise Failure(
            f"{folder} is not the folder of an earlier run, and a run would replace "
            f"what it holds: {', '.join(names)}. Choose another folder. Nothing was "
            "changed."
        )
    foreign = [folder / name for name in names if _is_foreign(folder / name)]
    foreign += train.foreign_states(folder / "state")
    if foreign:
        raise Failure(
            f"{foreign[0]} was not written by an earlier run, and this one would "
            "replace it. Move it away, or choose another folder. Nothing was changed."
        )


def _is_foreign(path: Path) -> bool:
    if path.is_symlink():
        return True
    if path.name == "adapter":
        held = not path.is_dir() or any(path.iterdir())
        return held and not (path / "adapter_config.json").is_file()
    return path.is_dir() != (path.suffix == "")


def forget(folder: Path) -> None:
    """Removes the state of an earlier run, from which no later one must resume."""
    train.remove_states(folder / "state")
    with contextlib.suppress(OSError):  # something else is in it
        (folder / "state").rmdir()


def forget_failed(folder: Path) -> None:
    """Removes what a run left that ended before it had saved anything."""
    if not train.saved_steps(folder / "state"):
        forget(folder)
    found = {path.name for path in folder.iterdir()} - {LOCK}
    if found == {_settings.FILE}:
        (folder / _settings.FILE).unlink()


def check_space(folder: Path, needed: int, largest: int) -> None:
    """Raises before anything is written if `needed` bytes do not fit.

    Args:
        folder: where they go; it need not exist.
        needed: how many.
        largest: of them in one file.

    Raises:
        Failure: if there is less space, or files may not become so large.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed + _MARGIN:
        raise Failure(
            f"Not enough disk space for {folder}: it takes "
            f"{(needed + _MARGIN) / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are "
            "free. Nothing was changed."
        )
    limit = _largest_file()
    if limit is not None and limit < largest + _MARGIN:
        raise Failure(
            f"Files may not be larger than {limit / 2**20:,.1f} MiB here, and this "
            f"takes one of {(largest + _MARGIN) / 2**20:,.0f} MiB. Raise the limit, "
            "e.g. with `ulimit -f unlimited`. Nothing was changed."
        )


def _largest_file() -> int | None:
    """The largest file that this process may write, as `ulimit -f` sets it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit
