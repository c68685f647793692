"""Ctrl-C before the command line is there."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import lorax_jax_command

START = "from lorax_jax_command import main; main()"


def test_while_it_is_being_imported():
    """No traceback, and the exit status of Ctrl-C."""
    with subprocess.Popen(
        # `importtime` names each module on the standard error as it is done.
        [sys.executable, "-X", "importtime", "-c", START, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.endswith(" numpy\n"):  # JAX, Flax and Orbax are still to come
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.stdout.read() == ""
    assert process.returncode == 130, rest
    assert "Interrupted. Nothing was saved." in rest and "Traceback" not in rest


def test_then_the_commands_answer_for_themselves(monkeypatch):
    seen = []
    before = signal.getsignal(signal.SIGINT)

    def main():
        seen.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr("lorax_jax.cli.main", main)
    lorax_jax_command.main()
    assert seen == [before] and signal.getsignal(signal.SIGINT) is before


def test_it_is_what_the_console_runs():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    scripts = project["project"]["scripts"]
    assert scripts == {"lorax-jax": "lorax_jax_command:main"}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "lorax_jax_command.py" in wheel["force-include"]
