"""`split`: what is held out to measure on."""

from collections.abc import Sequence

import numpy as np

from ._errors import DataError
from ._records import Record, Text


def split(
    records: Sequence[Record], *, share: float = 0.1, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Splits records into those to train on and those to measure on.

    Of several records, `share` are drawn by `seed`. A single text is cut in two, and
    its end is held out, whatever the seed: neighboring windows of one text have too
    much in common to be drawn apart. The cut is at a blank line or a line end, where
    one is near.

    Args:
        records: from `read_records`.
        share: how much to hold out; 0 holds out nothing.
        seed: decides which records.

    Returns:
        `(train, heldout)`, both in the order of `records`.

    Raises:
        DataError: if one of the two would be empty.

    Example:
        >>> train, heldout = split([Text("one two\\nthree four", "here")], share=0.5)
        >>> train[0].text, heldout[0].text
        ('one two\\n', 'three four')
    """
    if not 0 <= share < 1:
        raise DataError(f"`share` = {share}; a number from 0 up to 1 is meant.")
    if share == 0:
        return list(records), []
    if len(records) == 1 and isinstance(records[0], Text):
        text, where = records[0].text, records[0].where
        at = _cut(text, share)
        train, heldout = text[:at], text[at:]
        if train.strip() and heldout.strip():
            return [Text(train, where)], [Text(heldout, where)]
    if len(records) < 2:
        where = records[0].where if records else "there is no record"
        raise DataError(
            f"{where}: too little to hold {share:.0%} out. Add more, or train without "
            "measuring: hold out 0."
        )
    order = np.random.default_rng(seed).permutation(len(records))
    count = min(max(1, round(share * len(records))), len(records) - 1)
    held = set(order[:count].tolist())
    return (
        [record for i, record in enumerate(records) if i not in held],
        [record for i, record in enumerate(records) if i in held],
    )


def _cut(text: str, share: float) -> int:
    """Where the held-out end begins: near `1 - share`, at a boundary if one is."""
    target = round(len(text) * (1 - share))
    slack = max(1, round(len(text) * share / 4))
    for boundary in ("\n\n", "\n", " "):
        at = text.rfind(boundary, target - slack, target + slack)
        if at >= 0:
            return at + len(boundary)
    return target
