"""`windows`: documents cut and laid out as rows of one length.

The models here hide no document from another in the same row, so by default a row holds
(a piece of) one document and is padded on its right, where a causal model never looks.
Rows are no longer than the longest piece, so short documents do not pay for `length`.
With `pack=True` rows are filled up with several documents, as pretraining does: nothing
is predicted across a boundary, but attention sees what stands before it.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from ._documents import Document
from ._errors import DataError

# Rows of documents are padded to a multiple of this: odd lengths are slow on
# accelerators.
MULTIPLE = 16


class Windows(NamedTuple):
    """Rows of tokens, and how much predicting each of them counts.

    Attributes:
        ids: one token more than is predicted: a model reads `ids[..., :-1]` and
            predicts `ids[..., 1:]`.
        weights: of the predicted tokens; 0 for prompts and padding.
    """

    ids: Int[Array | np.ndarray, "*rows length+1"]
    weights: Float[Array | np.ndarray, "*rows length"]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.ids.shape[0]


def windows(
    documents: Sequence[Document],
    *,
    length: int,
    pack: bool = False,
    pad_id: int = 0,
) -> Windows:
    """Lays documents out in rows of at most `length` predictions.

    A document that is too long is cut into several pieces. The last token of a piece is
    also the first of the next, so that every token but a document's first is predicted
    exactly once. Pieces in which nothing counts (a long prompt's) are left out.

    Args:
        documents: from `tokenize`.
        length: predictions in a row, at most.
        pack: put several documents in a row; see above.
        pad_id: fills rows on their right.

    Returns:
        `Windows`, ids of shape `(rows, length + 1)`.

    Raises:
        DataError: if `length` is not positive, or no token counts.

    Example:
        >>> tokens = np.arange(6)
        >>> document = Document(tokens, np.float32(tokens > 0), bytes=6)
        >>> found = windows([document], length=3)
        >>> found.ids.tolist()  # padded to a multiple of 16, but not beyond `length`
        [[0, 1, 2, 3], [3, 4, 5, 0]]
        >>> found.weights.tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    """
    if length < 1:
        raise DataError(f"`length` = {length}; a row predicts at least one token.")
    pieces = [piece for document in documents for piece in _cut(document, length)]
    if not pieces:
        raise DataError(
            f"No token counts in {len(documents)} documents, so there are no windows."
        )
    if pack:
        rows = _fill(pieces, length + 1)
    else:
        rows = [[piece] for piece in pieces]
        longest = max(len(ids) for ids, _ in pieces) - 1
        length = min(length, -(-longest // MULTIPLE) * MULTIPLE)
    ids = np.full((len(rows), length + 1), pad_id, np.int32)
    weights = np.zeros((len(rows), length + 1), np.float32)
    for row, parts in enumerate(rows):
        at = 0
        for tokens, counts in parts:
            ids[row, at : at + len(tokens)] = tokens
            weights[row, at : at + len(tokens)] = counts
            at += len(tokens)
    return Windows(ids, weights[:, 1:])


Part = tuple[np.ndarray, np.ndarray]  # ids, and the weight of predicting each


def _cut(document: Document, length: int) -> list[Part]:
    pieces = []
    for start in range(0, len(document) - 1, length):
        ids = document.ids[start : start + length + 1]
        weights = document.weights[start : start + length + 1].copy()
        weights[0] = 0.0  # predicted in the piece before, or by nothing
        if weights.any():
            pieces.append((ids, weights))
    return pieces


def _fill(pieces: Sequence[Part], room: int) -> list[list[Part]]:
    """Puts each piece, longest first, into the fullest row that still has room."""
    rows: list[list[Part]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in sorted(pieces, key=lambda piece: -len(piece[0])):
        size = len(piece[0])
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(free, (left - size, row))
    return rows


def batch_at(found: Windows, number: int, *, size: int, seed: int = 0) -> Windows:
    """The batch of step `number`: a function of its arguments and nothing else.

    So a run that is resumed at a step sees what it would have seen. Every epoch is
    shuffled anew; a batch may reach into the next epoch, so no row is ever left out.

    Args:
        found: all rows.
        number: counts batches from 0.
        size: rows of a batch.
        seed: of the shuffling.

    Returns:
        `Windows` of `size` rows.

    Example:
        >>> rows = Windows(np.arange(10)[:, None], np.ones((10, 0)))
        >>> batch_at(rows, 0, size=5).ids.ravel().tolist()
        [4, 6, 2, 7, 3]
        >>> sorted(np.r_[batch_at(rows, 2, size=5).ids, batch_at(rows, 3, size=5).ids])
        ... # doctest: +ELLIPSIS
        [array([0]), array([1]), ...
    """
    count = found.rows
    at = np.arange(number * size, (number + 1) * size)
    rows = np.empty(size, np.int64)
    for epoch in range(at[0] // count, at[-1] // count + 1):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        here = at // count == epoch
        rows[here] = order[at[here] % count]
    return Windows(found.ids[rows], found.weights[rows])
