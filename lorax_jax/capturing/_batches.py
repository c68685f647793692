"""Batches that are gone through several times."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .._errors import CaptureError


class Batches:
    """Batches from a collection, or from a function that gives an iterator of them.

    Args:
        source: what the user gave.
        passes: how many times they are gone through, for the message.
        limit: how many are taken of each pass; `None` takes all.

    Raises:
        CaptureError: if they can be gone through only once.
    """

    def __init__(
        self,
        source: Iterable[Any] | Callable[[], Iterable[Any]],
        *,
        passes: int,
        limit: int | None = None,
    ):
        if isinstance(source, Iterator):
            raise CaptureError(
                f"`batches` is a {type(source).__name__}, which can be gone through "
                f"once; {passes} passes over the same batches are needed. Give a list, "
                "or a function that starts anew: `lambda: iter(loader)`."
            )
        a_batch = isinstance(source, Mapping)
        if a_batch or not (callable(source) or isinstance(source, Iterable)):
            raise CaptureError(
                f"`batches` is a {type(source).__name__}; a list of batches is meant, "
                "or a function that gives an iterator of them."
            )
        self.source = source
        self.limit = limit

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """One pass: the arguments behind `params`, for each batch."""
        source = self.source
        batches = source if isinstance(source, Iterable) else source()
        for batch in itertools.islice(batches, self.limit):
            yield batch if isinstance(batch, tuple) else (batch,)

    def __len__(self) -> int:
        """How many batches a pass has; 0 where nobody knows."""
        size = len(self.source) if hasattr(self.source, "__len__") else 0  # type: ignore
        return size if self.limit is None else min(size, self.limit)
