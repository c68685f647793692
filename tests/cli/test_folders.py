"""What a run does to a folder that holds something, or that another run holds."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from lorax_jax import checkpoint, train
from lorax_jax.cli import _claim, _output, _training
from lorax_jax.cli._program import Failure


def tree(folder):
    """Every file below a folder, with its content."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(result, message):
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def earlier(trained, here):
    """A copy of a finished run's folder."""
    return Path(shutil.copytree(trained[0], here / "o"))


@pytest.mark.parametrize("place", ["adapter", "merged", "state", "state/model"])
@pytest.mark.parametrize("link", [False, True])
def test_a_base_in_what_is_replaced(finetune, tiny_model, earlier, here, place, link):
    shutil.rmtree(earlier / place, ignore_errors=True)
    model = shutil.copytree(tiny_model, earlier / place)
    if link:
        (here / "link").symlink_to(model)
        model = here / "link"
    before = tree(here)
    result = finetune("--overwrite", model=model, out="o")
    refused(result, f"The base of this run, {model.resolve()}, lies in o/")
    assert tree(here) == before


def test_data_in_what_is_replaced(finetune, earlier, here):
    shutil.copy("data.txt", earlier / "state" / "data.txt")
    before = tree(here)
    result = finetune("--overwrite", data="o/state/data.txt", out="o")
    refused(result, "The data of this run, ")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["adapter", "merged", "state", "history.jsonl"])
def test_a_folder_that_is_no_run(finetune, here, name):
    (here / "o").mkdir()
    (here / "o" / name).mkdir()
    (here / "o" / name / "thesis.txt").write_text("years of work")
    before = tree(here)
    result = finetune("--overwrite", out="o")
    refused(result, "o is not the folder of an earlier run, and a run would replace")
    assert tree(here) == before


def test_foreign_files_in_a_run_s_folders(finetune, earlier, here):
    """They stay where they can, and stop the run where they cannot."""
    for name in ("thesis.txt", "state/thesis.txt", "adapter/thesis.txt"):
        (earlier / name).write_text("years of work")
    (earlier / "state" / "2024").mkdir()
    assert finetune("--overwrite", out="o").exit_code == 0
    for name in ("thesis.txt", "state/thesis.txt", "adapter/thesis.txt"):
        assert (earlier / name).read_text() == "years of work"
    assert (earlier / "state" / "2024").is_dir()
    assert train.saved_steps(earlier / "state") == [4]  # and not 30


def test_a_foreign_folder_where_a_state_would_be(finetune, earlier, here):
    (earlier / "state" / "20240501").mkdir()
    (earlier / "state" / "20240501" / "photo").write_text("beach")
    before = tree(here)
    result = finetune("--overwrite", out="o")
    refused(result, "o/state/20240501 was not written by an earlier run")
    assert tree(here) == before


@pytest.mark.parametrize("name", ["adapter", "state", "loss.png"])
def test_links_are_not_followed(finetune, earlier, here, name):
    (earlier / name).rename(here / "elsewhere")
    (earlier / name).symlink_to(here / "elsewhere")
    before = tree(here)
    refused(finetune("--overwrite", out="o"), f"o/{name} was not written by an earlier")
    assert tree(here) == before


def test_an_adapter_folder_that_holds_something_else(finetune, earlier, here):
    (earlier / "adapter" / "adapter_config.json").unlink()
    refused(finetune("--overwrite", out="o"), "o/adapter was not written by an earlier")


def test_a_foreign_file_in_an_export(finetune, run, earlier, here):
    (earlier / "merged" / "thesis.txt").write_text("years of work")
    before = tree(here)
    message = "o/merged holds ['thesis.txt'], not written by an earlier export"
    for args in (
        ["finetune", "--resume", "o", "--export"],
        ["merge", "o/adapter", "o/merged"],
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert tree(here) == before
    refused(finetune("--overwrite", "--export", out="o"), message)
    assert tree(here) == before
    (earlier / "merged" / "thesis.txt").unlink()
    assert run("finetune", "--resume", "o", "--export").exit_code == 0


def kill(*args, **kwargs):
    raise SystemExit("killed")


def test_a_run_killed_before_its_adapter_was_written(finetune, run, here, monkeypatch):
    options = {"sample_tokens": 4, "heldout": 0.1, "steps": 4}
    assert finetune("--export", out="whole", **options).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(_training.Training, "write", kill)
        assert finetune(out="parts", **options).exit_code != 0
    assert not (here / "parts" / "adapter").exists()
    result = run("finetune", "--resume", "parts", "--export")
    assert result.exit_code == 0, result.output
    assert "held out  " in result.stdout and "after     " in result.stdout
    for name in ("adapter/adapter_model", "merged/model"):
        whole, parts = (
            load_file(here / out / f"{name}.safetensors") for out in ("whole", "parts")
        )
        assert all((whole[key] == parts[key]).all() for key in whole)
    histories = [here / out / "history.jsonl" for out in ("whole", "parts")]
    assert histories[0].read_text() == histories[1].read_text()


def test_an_export_of_a_finished_run(finetune, run, here):
    assert finetune().exit_code == 0
    result = run("finetune", "--resume", "lorax-out", "--export")
    assert result.exit_code == 0, result.output
    assert (here / "lorax-out" / "merged" / "model.safetensors").exists()


def test_an_export_that_has_no_place(finetune, tiny_model, here):
    """It is noticed before training, and so is a base that the export would lie in."""
    shutil.copytree(tiny_model, here / "base")
    before = tree(here)
    result = finetune("--export", model="base", out="base/out")
    refused(result, "are one folder, or one lies in the other")
    assert tree(here) == before
    assert finetune(model="base", out="base/out").exit_code == 0


def test_space_is_checked_once_for_all(finetune, here, monkeypatch):
    """What is asked for before training is enough for what is asked for later."""
    early, later = [], []
    monkeypatch.setattr(_output, "check_space", lambda *args: early.append(args[1]))
    for module in (checkpoint._export, checkpoint._save):
        monkeypatch.setattr(module, "check_space", lambda _, n: later.append(n))
    monkeypatch.setattr(_training, "check_space", _output.check_space)
    assert finetune("--export").exit_code == 0
    assert len(early) == 1 and len(later) == 2
    assert early[0] + _output._MARGIN >= sum(later)


def test_space_for_an_export_is_the_size_of_the_export(tiny_model, trained, here):
    size = sum(p.stat().st_size for p in (trained[0] / "merged").iterdir())
    needed = checkpoint.check_export(tiny_model, here / "new")
    assert size < needed < size + (2 << 20)


def test_files_may_not_grow_large_enough(finetune, here, monkeypatch):
    monkeypatch.setattr(_output, "_largest_file", lambda: 1 << 20)
    refused(finetune(), "Files may not be larger than 1.0 MiB here, and this takes")
    assert not (here / "lorax-out").exists()


def test_one_run_at_a_time(finetune, run, earlier, here):
    code = (
        "import sys, pathlib, lorax_jax.cli._claim as c\n"
        "with c.claimed(pathlib.Path('o')): print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=-1, stdout=-1, text=True
    )
    assert holder.stdout.readline() == "held\n"
    before = tree(here)
    message = f"o is in use by another run (process {holder.pid}). Wait until it has"
    refused(finetune("--overwrite", out="o"), message)
    refused(run("finetune", "--resume", "o"), message)
    assert tree(here) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert (earlier / _claim.LOCK).exists()  # and stops nobody
    assert finetune("--overwrite", out="o").exit_code == 0
    assert not (earlier / _claim.LOCK).exists()


def test_a_usual_folder_that_is_in_use_is_passed_over(here):
    with _claim.claimed(here / "out"):
        found = _output.new_folder(None, usual="out", overwrite=True)
    assert found == Path("out-2")
    assert not (here / "out").exists()


def test_a_claim_whose_lock_was_just_removed(here, monkeypatch):
    """Opened before its holder removed it, locked after: it would lock nothing."""
    real, removed = _claim._locked, []

    def late(file):
        if not removed:
            removed.append(os.unlink(file.name))
        return real(file)

    monkeypatch.setattr(_claim, "_locked", late)
    with _claim.claimed(here / "out"):
        assert (here / "out" / _claim.LOCK).read_text() == str(os.getpid())
        with pytest.raises(
            Failure, match=rf"in use by another run \(process {os.getpid()}"
        ):
            with _claim.claimed(here / "out"):
                pass


def test_folders_that_cannot_be(finetune, here):
    (here / "dangling").symlink_to(here / "nowhere")
    refused(finetune(out="dangling"), "dangling is a link to")
    refused(finetune(out="/proc/x/y"), "/proc/x/y cannot be written to: ")


def test_a_run_that_failed_does_not_block_the_next(finetune, here, monkeypatch):
    for error in (KeyboardInterrupt, train.TrainingError("nan")):

        def fail(*args, error=error, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(_training.train, "finetune", fail)
            assert finetune(out="a/b").exit_code in (2, 130)
        assert not (here / "a").exists()
    assert finetune(out="a/b").exit_code == 0


def test_a_run_that_was_killed_does_not_block_the_next(finetune, earlier, here):
    for path in earlier.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (earlier / _claim.LOCK).write_text("1")
    torn = earlier / "state" / "00000004.orbax-checkpoint-tmp"
    torn.mkdir(parents=True)
    (earlier / "state" / "thesis.txt").write_text("years of work")
    refused(finetune(out="o"), "o is not empty")
    (earlier / "state" / "thesis.txt").unlink()
    assert finetune(out="o").exit_code == 0
    assert not torn.exists()
