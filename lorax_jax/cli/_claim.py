"""The folder of a run: one process at a time, and nothing left of a run that failed."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._program import Failure, warn

LOCK = ".lock"


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs out of it.

    The claim is a lock that the system holds on an open file, so it ends with the
    process, however that ends: a lock file that a killed one left behind stops nobody.
    Folders that were made for the claim are removed at its end if they are empty.

    Args:
        folder: it need not exist.

    Raises:
        Failure: if another run holds it, or it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _opened(folder / LOCK)
    except OSError as error:
        _remove_empty(made)
        raise Failure(_unusable(folder, error)) from None
    if lock is None:
        raise Failure(
            f"{folder} is in use by another run{_holder(folder)}. Wait until it has "
            "ended, or choose another folder."
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        lock.close()
        _remove_empty(made)


def is_held(folder: Path) -> bool:
    """Whether a run that is alive holds a folder."""
    try:
        with open(folder / LOCK, "r+") as file:
            return not _locked(file)
    except OSError:
        return False


def _opened(path: Path) -> Any:
    """The file at `path`, locked and with our process in it; `None` if it is held."""
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        if not _locked(file):
            file.close()
            return None
        # Removed by its last holder after we had opened it: that lock locks nothing.
        if os.fstat(file.fileno()).st_nlink:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            return file
        file.close()


def _locked(file: Any) -> bool:
    if sys.platform == "win32":
        import msvcrt

        file.seek(1 << 30)  # what is locked cannot be read; the process stays readable
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        warn(f"{file.name} cannot be locked here; start no second run in its folder.")
    return True


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (process {int((folder / LOCK).read_text())})"
    return ""


def _unusable(folder: Path, error: OSError) -> str:
    if folder.is_symlink() and not folder.exists():
        there = os.readlink(folder)
        return (
            f"{folder} is a link to {there}, which does not exist. Nothing was saved."
        )
    return f"{folder} cannot be written to: {error.strerror}. Nothing was saved."


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:  # the deepest first
        with contextlib.suppress(OSError):
            folder.rmdir()
