"""JSON from files that somebody else wrote."""

import json
import math
from pathlib import Path
from typing import Any

from ._errors import CheckpointError

# An `adapter_config.json` that names every module of a large model is some 100 kB.
MOST_BYTES = 16 << 20
_MOST_DEPTH = 40


def parse_json(text: bytes, what: str, *, finite: bool = True) -> Any:
    """Parses JSON, refusing what a careless reader would take silently.

    Args:
        text: the document.
        what: what to call it in messages.
        finite: refuse NaN and infinities, which JSON does not have.

    Returns:
        The value.

    Raises:
        CheckpointError: if it is not JSON, repeats a key, nests too deeply, or holds a
            number that is none.

    Example:
        >>> parse_json(b'{"r": 8}', "the config")
        {'r': 8}
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            seen: set[str] = set()
            twice = next(k for k, _ in items if k in seen or seen.add(k))
            raise CheckpointError(f"{what} repeats the key {twice!r}.")
        return found

    def number(text: str) -> float:
        value = float(text)
        if finite and not math.isfinite(value):
            raise CheckpointError(f"{what} holds {text}, which is no finite number.")
        return value

    try:
        found = json.loads(
            text, object_pairs_hook=pairs, parse_float=number, parse_constant=number
        )
        _check_depth(found)
        return found
    except RecursionError:
        raise CheckpointError(f"{what} nests too deeply.") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{what} is not JSON: {error}") from None


def _check_depth(value: Any) -> None:
    """Raises `RecursionError`: Python's own limit differs from release to release."""
    layer = [value] if isinstance(value, dict | list) else []
    for _ in range(_MOST_DEPTH):
        inside = (v.values() if isinstance(v, dict) else v for v in layer)
        layer = [x for values in inside for x in values if isinstance(x, dict | list)]
        if not layer:
            return
    raise RecursionError


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.
        finite: as for `parse_json`.

    Returns:
        The object.

    Raises:
        CheckpointError: if it cannot be read, is larger than 16 MiB, or holds
            something else.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(
                f"{path} has {size:,} bytes; a configuration has no more than "
                f"{MOST_BYTES:,}."
            )
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    found = parse_json(text, str(path), finite=finite)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, not a JSON object."
        )
    return found
