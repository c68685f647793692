"""The settings of a run: what the options say, completed, kept, and found again."""

import hashlib
import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ._program import Failure

FILE = "run.json"

# What an option is where it is not given. A model of two million parameters wants a
# far larger rate than one of billions, so the embedded one has a recipe of its own.
RECIPES = {
    "embedded": {"steps": 250, "batch": 8, "length": 128, "lr": 5e-3},
    "other": {"steps": 200, "batch": 4, "length": 512, "lr": 2e-4},
}

# Options that say where and how, not what is trained.
_NOT_OF_THE_RUN = ("out", "overwrite", "resume", "export", "debug")


def complete(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a new run with the recipe's values where they are `None`.

    Raises:
        Failure: if a model is named and no data, or options contradict each other.
    """
    from ._base import located

    settings = {k: v for k, v in options.items() if k not in _NOT_OF_THE_RUN}
    recipe = RECIPES["embedded" if settings["model"] is None else "other"]
    for name, value in recipe.items():
        if settings[name] is None:
            settings[name] = value
    if settings["data"] is None:
        if settings["model"] is not None:
            raise Failure(
                "--model is given without --data. Name a .txt or .jsonl file to train "
                "on, or leave both out for a first run on what comes with the library."
            )
        from ..embedded import ADAPT_TEXT

        settings["data"] = ADAPT_TEXT
    settings["data"] = str(Path(settings["data"]).absolute())
    # Whether an adapter names its base as seen from itself; see `_base.reference`.
    settings["relative"] = not Path(settings["model"] or "/").is_absolute()
    settings["model"] = located(settings["model"])
    moves = settings["rho"] != 1 and options["resume"] is None
    if moves and settings["init"] != "eva":
        raise Failure(
            f"--rho {settings['rho']:g} distributes ranks by what --init eva reads, "
            f"and --init is {settings['init']}. Give --init eva, or leave --rho out."
        )
    for name in ("targets", "exclude", "new_token"):
        settings[name] = list(settings[name])
    return settings


def write(folder: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings beside the run's state, with a checksum of its data."""
    kept = settings | {"data_sha256": _checksum(settings["data"])}
    text = json.dumps(kept, indent=2) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def is_run(folder: Path) -> bool:
    """Whether a run has kept its settings in `folder`."""
    return _read(folder) is not None


def _read(folder: Path) -> tuple[dict[str, Any], str | None] | None:
    try:
        settings = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return settings, settings.pop("data_sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def resumed(folder: Path, ctx: click.Context) -> dict[str, Any]:
    """The settings of the run in `folder`.

    Raises:
        Failure: if there is none, its data has changed since, or an option on the
            command line contradicts it.
    """
    kept = _read(folder)
    if kept is None:
        raise Failure(
            f"{folder} is not the folder of a run: it has no {FILE} that can be read. "
            "Give --resume the folder that an interrupted `lorax-jax finetune` named."
        )
    settings, checksum = kept
    given = complete(dict(ctx.params))
    for name, value in settings.items():
        if ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        if given[name] != value:
            raise Failure(
                f"--{name.replace('_', '-')} {given[name]} contradicts the run in "
                f"{folder}, which has {value}. Leave the option out to resume, or "
                "start another run."
            )
    if _checksum(settings["data"]) != checksum:
        raise Failure(
            f"{settings['data']} is not what the run in {folder} was trained on: its "
            "content has changed. Restore it, or start another run."
        )
    return settings


def _checksum(path: str) -> str | None:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None  # reading the data says what is wrong
