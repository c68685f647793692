"""Where a command writes: never over what is there, unless told to."""

import shutil
from pathlib import Path

from ._program import Failure

_MARGIN = 4 * 2**20  # for configs, tokenizers, plots: what is not counted


def new_folder(wanted: Path | None, *, usual: str, overwrite: bool) -> Path:
    """The folder to write to; nothing is made or removed yet.

    Args:
        wanted: what the user named. It may exist if it is empty.
        usual: the name to use otherwise; if taken, with the first free number.
        overwrite: take a folder that has something in it.

    Raises:
        Failure: if the folder is taken, or a file.
    """
    if wanted is None:
        folder, number = Path(usual), 1
        while _taken(folder) and not overwrite:
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
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def check_space(folder: Path, needed: int) -> None:
    """Raises before anything is written if `needed` bytes do not fit.

    Args:
        folder: where they go; it need not exist.
        needed: how many.

    Raises:
        Failure: if there is less space.
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
