"""The history of a run: a line for each step and for each measurement."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

History = list[dict[str, Any]]


def write_history(path: str | os.PathLike, history: Iterable[dict[str, Any]]) -> None:
    """Writes a history as JSON lines, in place of what is there only when complete.

    Steps are `{"step", "loss", "grad_norm"}`, measurements
    `{"step", "heldout_loss", "bits_per_byte"}`.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    text = "".join(json.dumps(line) + "\n" for line in history)
    part.write_text(text, encoding="utf-8")
    part.replace(path)
