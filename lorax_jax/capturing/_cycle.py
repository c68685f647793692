"""Batches, again and again."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from .._errors import CaptureError

END = object()


class Cycle:
    """Batches, again and again, of which none is kept.

    Args:
        batches: a collection, or an iterator, which can be gone through once.

    Attributes:
        first: the first batch.
        passed: whether all batches have been given at least once.

    Raises:
        CaptureError: if there is no batch.

    Example:
        >>> cycle = Cycle([1, 2])
        >>> [cycle.next() for _ in range(5)], cycle.passed
        ([1, 2, 1, 2, 1], True)
        >>> cycle = Cycle(iter([1]))
        >>> cycle.next(), cycle.next() is END
        (1, True)
    """

    def __init__(self, batches: Iterable[Any]):
        self._again = () if isinstance(batches, Iterator) else batches
        rest = iter(batches)
        self.first, self.passed = next(rest, END), False
        if self.first is END:
            raise CaptureError(
                "`batches` is empty: nothing is fed to any site. Give at least one "
                "batch."
            )
        self._rest = itertools.chain([self.first], rest)

    def next(self) -> Any:
        """The next batch, or `END` where there will be none."""
        batch = next(self._rest, END)
        if batch is END:
            self.passed = True
            self._rest = iter(self._again)
            batch = next(self._rest, END)
        return batch
