"""Commands in this process, in a folder of their own, on a tiny random model."""

import os
import shutil

import pytest
from click.testing import CliRunner
from tiny_folder import TEXT, write_model

from lorax_jax.cli import main


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A model folder; no test may change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory of a command, with a text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text(TEXT)
    return tmp_path


@pytest.fixture
def run(here):
    """`run("inspect", path)`: a command's result."""

    def run(*args):
        return CliRunner().invoke(main, [str(arg) for arg in args])

    return run


# Settings under which a run takes a second or two.
QUICK = {
    "steps": 4,
    "batch": 2,
    "length": 16,
    "sample-tokens": 0,
    "rank": 2,
    "lr": 0.05,
    "heldout": 0.02,
}


@pytest.fixture
def finetune(run, tiny_model):
    """`finetune("--export", steps=6)`: a quick run on the tiny model."""

    def finetune(*flags, **options):
        settings = QUICK | {"model": tiny_model, "data": "data.txt"}
        settings |= {name.replace("_", "-"): value for name, value in options.items()}
        pairs = [(f"--{name}", v) for name, v in settings.items() if v is not None]
        return run("finetune", *flags, *(x for pair in pairs for x in pair))

    return finetune


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model):
    """The folder of a finished run, with an adapter and a merged model."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data.txt").write_text(TEXT)
    args = ["finetune", "--model", tiny_model, "--data", folder / "data.txt"]
    args += [x for name, value in QUICK.items() for x in (f"--{name}", value)]
    args += ["--out", folder / "out", "--steps", 30, "--sample-tokens", 4, "--export"]
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(main, [str(arg) for arg in args])
    finally:
        os.chdir(before)
    assert result.exit_code == 0, result.output
    return folder / "out", result


@pytest.fixture
def adapter(trained, here):
    """A copy of its adapter, for a test to break."""
    shutil.copytree(trained[0] / "adapter", here / "adapter")
    return here / "adapter"
