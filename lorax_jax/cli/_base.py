"""The model that a command works on, with its tokenizer."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .._errors import CheckpointError, ConfigError

CONFIG = "adapter_config.json"


class Base(NamedTuple):
    """A model, its parameters and its tokenizer.

    Attributes:
        model: a `models.Model`.
        params: its parameters.
        tokenizer: a `transformers` tokenizer.
        where: its folder (absolute) or hub id.
        token_rows: rows of new tokens to train; see `_tokens.py`.
        growth: how the vocabulary grew for them, if it did.
    """

    model: Any
    params: Any
    tokenizer: Any
    where: str
    token_rows: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    growth: Any = None

    @property
    def positions(self) -> int | None:
        """How many positions the model has learned; `None` if it counts them."""
        return getattr(self.model.config, "n_positions", None)

    @property
    def window(self) -> int | None:
        """How many positions it was trained on, where it counts them."""
        found = config_of(self.where).get("max_position_embeddings")
        return found if isinstance(found, int) else None

    @property
    def name(self) -> str:
        """What to call it."""
        from ..embedded import MODEL_DIR

        embedded = self.where == str(MODEL_DIR)
        return "the embedded model" if embedded else Path(self.where).name


def load_base(where: str | None, **options: Any) -> Base:
    """Loads a model and its tokenizer.

    Args:
        where: a folder or a hub id; `None` is the model that comes with the library.
        options: for `models.load`.

    Raises:
        CheckpointError: if it is no checkpoint.
        ConfigError: if the model computes something that is not implemented, or
            predicts no next token.
    """
    from .. import models

    where = located(where)
    model, params = models.load(where, **options)
    _check_predicts(model, where)
    return Base(model, params, load_tokenizer(where), where)


def _check_predicts(model: Any, where: str) -> None:
    from ..models import Encoder

    if isinstance(model, Encoder):
        raise ConfigError(
            f"{where} is an encoder ({model.config.family}): it predicts no next "
            "token, so it cannot generate, and what to train it on is not known here. "
            "In Python, adapt its `model.apply` with a loss of your own."
        )


def located(where: str | None) -> str:
    """A folder's absolute path, which is found again from anywhere; or a hub id."""
    if where is None:
        from ..embedded import MODEL_DIR

        return str(MODEL_DIR)
    return str(Path(where).resolve()) if Path(where).is_dir() else where


def reference(where: str, adapter: Path, *, relative: bool) -> str:
    """What an adapter calls its base, so that it is found again.

    Args:
        where: the base's hub id or absolute path.
        adapter: the adapter's folder.
        relative: whether a path was given as a relative one, and stays one: as seen
            from the adapter.

    Returns:
        A hub id or a path; for the embedded model a name that is the same on every
        machine.
    """
    from ..embedded import MODEL_DIR

    if where == str(MODEL_DIR):
        return "/".join(MODEL_DIR.parts[-3:])
    if relative and Path(where).is_dir():
        with contextlib.suppress(ValueError):  # on another drive
            return Path(os.path.relpath(where, adapter.resolve())).as_posix()
    return where


def load_tokenizer(where: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        CheckpointError: if there is none.
    """
    from .. import models

    try:
        return models.tokenizer(where)
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = reason.rstrip(" :.").removesuffix(" from one of")  # a list follows
        raise CheckpointError(
            f"{where} holds no tokenizer that can be read: {reason}. Put its "
            "tokenizer.json and tokenizer_config.json beside the model."
        ) from error


def base_of(adapter: Path) -> str:
    """The base that an adapter names: a folder or a hub id.

    Raises:
        CheckpointError: if it is no adapter, names none, or a folder that is not here.
    """
    from .._json import read_json
    from ..embedded import MODEL_DIR

    if not (adapter / CONFIG).is_file():
        raise CheckpointError(f"{adapter} is no adapter: it has no {CONFIG}.")
    name = read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{adapter} does not say what its base is. Name it: a folder or a hub id."
        )
    for place in (adapter / name, Path(name)):
        if place.is_dir():
            return str(place)
    if is_hub_id(name):
        return name
    if Path(name).parts[-3:] == MODEL_DIR.parts[-3:]:  # wherever the library was
        return str(MODEL_DIR)
    raise CheckpointError(
        f"The base of {adapter}, {name}, is not here. Say where it is: a folder or a "
        "hub id."
    )


def folder_of(where: str) -> Path:
    """The folder of a model, downloaded if `where` is a hub id.

    Raises:
        CheckpointError: if it is neither.
    """
    from ..models._files import find_folder

    return find_folder(where)


def is_hub_id(where: str) -> bool:
    """Whether `where` reads as `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", where) is not None


def config_of(where: str) -> dict[str, Any]:
    """A model's config.json, of a hub id too, without its weights.

    Raises:
        CheckpointError: if there is none.
    """
    from .._json import read_json

    path = Path(where) / "config.json"
    if not path.is_file() and not Path(where).exists() and is_hub_id(where):
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(where, "config.json"))
        except (OSError, ValueError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise CheckpointError(
                f"{where!r} is not a folder, and downloading its config.json from the "
                f"hub failed: {reason}"
            ) from error
    return read_json(path)


def load_bound(adapter: Path, where: str | None) -> tuple[Base, Any]:
    """A base with an adapter bound to its parameters.

    Args:
        adapter: the adapter's folder; its tokenizer is taken if it has one.
        where: the base; `None` is the one that the adapter names.

    Returns:
        `(base, bound)`, for an adapted `model.apply`.

    Raises:
        CheckpointError: if either is not what it should be, or they do not fit.
        ConfigError: if the base predicts no next token.
    """
    from .._load_adapted import load_adapted
    from ..adapters import bind

    where = located(base_of(adapter) if where is None else where)
    model, params, loaded, _ = load_adapted(adapter, base=where)
    _check_predicts(model, where)
    beside = (adapter / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(adapter) if beside else where)
    return Base(model, params, tokenizer, where), bind(params, loaded)
