"""The data of a run: from records to rows, checked against the model."""

from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from .. import train
from ._base import Base
from ._program import Failure, warn

PROMPT_WORDS = 4


class Rows(NamedTuple):
    """The data of a run.

    Attributes:
        data: what is trained on.
        heldout: what is measured on; `None` if nothing was held out.
        prompt: what to sample from.
    """

    data: train.Windows
    heldout: train.Heldout | None
    prompt: str


def read_rows(
    records: list[train.Record], base: Base, settings: dict[str, Any]
) -> Rows:
    """Splits, tokenizes and lays out records, and says how much there is.

    Raises:
        DataError: if there is too little, or nothing to learn.
        Failure: if the rows are not what the model can read.
    """
    length = settings["length"]
    if base.positions is not None and length > base.positions:
        raise Failure(
            f"--length {length} exceeds the {base.positions} positions that the model "
            "has learned. Lower it."
        )
    if base.window is not None and length > base.window:
        warn(
            f"--length {length} exceeds the {base.window} positions that the model was "
            "trained on; it may do badly on the rest of a row."
        )
    kept, held = train.split(records, share=settings["heldout"], seed=settings["seed"])
    documents = train.tokenize(kept, base.tokenizer)
    whole = len(records) == 1 and isinstance(records[0], train.Text)
    if whole and len(documents[0]) <= length:
        raise train.DataError(
            f"{settings['data']} is too short for one window: {len(documents[0])} "
            f"tokens to train on, and a window takes {length + 1}. Give more text, or "
            f"--length {max(1, len(documents[0]) // 2)}."
        )
    others = train.tokenize(held, base.tokenizer)
    pad = base.tokenizer.eos_token_id or 0
    rows = train.windows(documents, length=length, pack=settings["pack"], pad_id=pad)
    heldout = None
    if others:
        measured = train.windows(others, length=length, pad_id=pad)
        heldout = train.Heldout(measured, train.total_bytes(others))
    _check_vocabulary([*documents, *others], base)
    what = "one text" if whole else _plural(len(documents), "document")
    cut = sum(len(document) > length + 1 for document in documents)
    if cut and not whole:
        what += f" ({cut:,} longer than a row, and cut)"
    learned = int((rows.weights > 0).sum())
    click.echo(
        f"data      {Path(settings['data']).name}: {what}, "
        f"{_plural(learned, 'token')} to learn in {_plural(rows.rows, 'row')} of "
        f"{rows.weights.shape[1]}; "
        f"{_plural(heldout.windows.rows if heldout else 0, 'row')} held out"
    )
    lost = sum(
        not (document.weights[1 : length + 1] > 0).any() for document in documents
    )
    if lost:
        warn(
            f"{_plural(lost, 'document')} with a prompt longer than a row: "
            "what follows it is learned without its beginning. Raise --length."
        )
    first = (held or kept)[0], (others or documents)[0]
    return Rows(rows, heldout, settings["prompt"] or _prompt(*first, base))


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _check_vocabulary(documents: list[train.Document], base: Base) -> None:
    """Tokens past the table would be read as its last row, without an error."""
    rows = base.model.config.vocab_size
    largest = max(document.ids.max() for document in documents)
    if largest >= rows:
        raise Failure(
            f"The tokenizer beside {base.where} makes token {largest}, and the model's "
            f"table has {rows} rows. Is it the model's own tokenizer?"
        )


def _prompt(record: train.Record, document: train.Document, base: Base) -> str:
    """What a record prompts with, or the first words of a text."""
    if isinstance(record, train.Text) and record.text.strip():
        return " ".join(record.text.split(maxsplit=PROMPT_WORDS)[:PROMPT_WORDS])
    ids = document.ids[: int(np.argmax(document.weights > 0))]
    return base.tokenizer.decode(ids)
