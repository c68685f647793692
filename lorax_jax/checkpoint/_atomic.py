"""Folders that appear whole or not at all."""

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from .._errors import CheckpointError


@contextlib.contextmanager
def replacing(directory: str | os.PathLike, *, keep: bool) -> Iterator[Path]:
    """Yields a new, empty folder that takes the place of `directory` at the end.

    It lies beside `directory` under a name of its own, `.name.new-...`. When the block
    ends, its files are flushed to disk and the two folders change places in one step.
    If the block raises, the new folder is removed; if the process dies, it stays beside
    an untouched `directory` and can be deleted.

    Args:
        directory: the folder to make or replace. Folders above it are made.
        keep: leave whatever else an existing `directory` holds. One that holds folders,
            or that the process works in, is not exchanged: the new files replace the
            old ones in it, each in one step.

    Raises:
        CheckpointError: if `directory` is a file, or the disk is full.
    """
    final = Path(os.path.realpath(directory))
    if final.exists() and not final.is_dir():
        raise CheckpointError(
            f"{final} is a file; a folder is written. Choose another."
        )
    new = final.with_name(f".{final.name}.new-{uuid.uuid4().hex[:12]}")
    try:
        new.mkdir(parents=True)
        yield new
        _flush(new)
        if not final.exists():
            os.rename(new, final)
        elif not keep:
            _change_places(new, final)
        elif _stands_alone(final):
            _carry_over(final, new)
            _change_places(new, final)
        else:
            _file_by_file(new, final)
        _flush_entry(final.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"The disk is full: {final} could not be written, and what was there "
                "before is as it was. Free some space and write it again."
            ) from error
        raise
    finally:
        # After success this is the old folder, if there was one.
        if new.exists():
            shutil.rmtree(new, ignore_errors=True)


def check_space(directory: str | os.PathLike, needed: int) -> None:
    """Refuses to start writing what the disk cannot hold.

    Args:
        directory: where it will be written; it need not exist.
        needed: bytes.

    Raises:
        CheckpointError: if there is less space.
    """
    place = Path(os.path.realpath(directory))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{directory} needs {needed:,} bytes, and its disk has {free:,} free. Free "
            "some space or choose another folder; nothing was written."
        )


def _stands_alone(folder: Path) -> bool:
    """Whether a folder holds files alone, and nobody would miss its inode."""
    here = Path.cwd()
    if folder == here or folder in here.parents or os.path.ismount(folder):
        return False
    return all(path.is_file() or path.is_symlink() for path in folder.iterdir())


def _carry_over(old: Path, new: Path) -> None:
    """Links every file of `old` that `new` does not have into it."""
    for source in old.iterdir():
        target = new / source.name
        if target.exists():
            continue
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # a filesystem without links
            shutil.copy2(source, target, follow_symlinks=False)
    shutil.copymode(old, new)


def _file_by_file(new: Path, final: Path) -> None:
    # Backwards, so that an adapter's configuration comes after its tensors.
    for source in sorted(new.rglob("*"), reverse=True):
        if source.is_file():
            target = final / source.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _flush_entry(path)


def _flush_entry(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # some systems keep folders closed
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _change_places(new: Path, final: Path) -> None:
    if _exchange(new, final):
        return
    # Two steps: between them the folder has no name of its own, and what it held lies
    # beside it.
    old = new.with_name(new.name.replace(".new-", ".old-"))
    os.rename(final, old)
    try:
        os.rename(new, final)
    except OSError:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, where the system can; says whether it did."""
    name, here = {
        "linux": ("renameat2", (ctypes.c_int(-100),)),  # AT_FDCWD
        "darwin": ("renamex_np", ()),
    }.get(sys.platform, ("", ()))
    try:
        swap = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (AttributeError, OSError, TypeError):
        return False
    arguments = (*here, os.fsencode(one), *here, os.fsencode(other), ctypes.c_uint(2))
    return swap(*arguments) == 0
