"""A folder appears whole or not at all."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from lorax_jax._errors import CheckpointError
from lorax_jax.checkpoint import _atomic
from lorax_jax.checkpoint._atomic import check_space, replacing


def write(folder, text, *, keep=True, names=("a", "b"), fail=None):
    with replacing(folder, keep=keep) as new:
        for name in names:
            (new / name).write_text(text)
        if fail is not None:
            raise fail


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(params=["exchange", "two renames"])
def any_system(request, monkeypatch):
    """With and without a system call that exchanges two folders."""
    if request.param == "two renames":
        monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)


def test_a_new_folder(tmp_path):
    write(tmp_path / "x" / "y", "1")
    assert contents(tmp_path) == {"x/y/a": "1", "x/y/b": "1"}


def test_another_takes_its_place(tmp_path, any_system):
    write(tmp_path / "x", "1", names=("a", "c"))
    write(tmp_path / "x", "2", keep=False)
    assert contents(tmp_path) == {"x/a": "2", "x/b": "2"}


def test_other_files_stay(tmp_path, any_system):
    write(tmp_path / "x", "1", names=("a", "log"))
    mode = (tmp_path / "x").stat().st_mode
    with open(tmp_path / "x" / "log", "a") as log:
        write(tmp_path / "x", "2")
        log.write(" more")  # one that is open stays the same file
    assert contents(tmp_path) == {"x/a": "2", "x/b": "2", "x/log": "1 more"}
    assert (tmp_path / "x").stat().st_mode == mode


def test_without_links_other_files_are_copied(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EPERM, "no links here")

    write(tmp_path / "x", "1", names=("a", "c"))
    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "x", "2")
    assert contents(tmp_path) == {"x/a": "2", "x/b": "2", "x/c": "1"}


def test_a_folder_that_holds_folders_is_updated_in_place(tmp_path):
    write(tmp_path / "x", "1")
    (tmp_path / "x" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "x" / "deep" / "er" / "f").write_text("f")
    inode = (tmp_path / "x").stat().st_ino
    write(tmp_path / "x", "2")
    assert contents(tmp_path) == {"x/a": "2", "x/b": "2", "x/deep/er/f": "f"}
    assert (tmp_path / "x").stat().st_ino == inode


def test_the_working_folder_is_updated_in_place(tmp_path, monkeypatch):
    write(tmp_path / "x", "1")
    monkeypatch.chdir(tmp_path / "x")
    write(".", "2")
    assert os.listdir(".") and contents(tmp_path) == {"x/a": "2", "x/b": "2"}


def test_a_link_to_a_folder_stays_one(tmp_path):
    write(tmp_path / "x", "1")
    (tmp_path / "link").symlink_to("x")
    write(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "x") == {"a": "2", "b": "2"}


def test_a_file_is_in_the_way(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="x is a file; a folder is written"):
        write(tmp_path / "x", "1")


@pytest.mark.parametrize("before", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("keep", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path, before, keep):
    if before:
        write(tmp_path / "x", "1")
    was = contents(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "x", "2", keep=keep, fail=RuntimeError("stop"))
    assert contents(tmp_path) == was
    assert os.listdir(tmp_path) == (["x"] if before else [])


def test_a_full_disk(tmp_path):
    write(tmp_path / "x", "1")
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(CheckpointError, match="The disk is full: .* as it was"):
        write(tmp_path / "x", "2", fail=full)
    assert contents(tmp_path) == {"x/a": "1", "x/b": "1"}
    assert os.listdir(tmp_path) == ["x"]


def test_other_errors_of_the_system_keep_their_type(tmp_path):
    with pytest.raises(PermissionError, match="no"):
        write(tmp_path / "x", "2", fail=PermissionError(errno.EACCES, "no"))


def test_space_is_asked_for_before(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    check_space(tmp_path / "not" / "there", usage.free // 2)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, and its disk has"):
        check_space(tmp_path / "not" / "there", usage.total + 1)


def test_two_renames_that_fail_half_way_are_undone(tmp_path, monkeypatch):
    write(tmp_path / "x", "1")
    monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)
    real, calls = os.rename, []

    def rename(one, other):
        calls.append(other)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        real(one, other)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="broken"):
        write(tmp_path / "x", "2")
    assert contents(tmp_path) == {"x/a": "1", "x/b": "1"}


# A writer that stops itself, so that the kill comes at a known place: among the files,
# before the exchange, right after it.
_KILLED = """
    import os, signal, sys
    from pathlib import Path
    from lorax_jax.checkpoint import _atomic

    where, folder = sys.argv[1:]
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "before the exchange":
        _atomic._change_places = die
    if where == "after the exchange":
        _atomic._flush_entry = lambda path, real=_atomic._flush_entry: (
            die() if path == Path(folder).parent else real(path)
        )
    with _atomic.replacing(folder, keep=True) as new:
        (new / "a").write_text("2")
        if where == "among the files":
            die()
        (new / "b").write_text("2")
"""


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("among the files", "1"),
        ("before the exchange", "1"),
        ("after the exchange", "2"),
    ],
)
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path, where, text):
    write(tmp_path / "x", "1", names=("a", "b", "c"))
    code = textwrap.dedent(_KILLED)
    done = subprocess.run([sys.executable, "-c", code, where, str(tmp_path / "x")])
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path / "x") == {"a": text, "b": text, "c": "1"}
