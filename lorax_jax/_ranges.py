"""Ranges of layers: which layers of a model make up one of repeated layers."""

from collections.abc import Iterable, Sequence
from typing import Any

from ._errors import ConfigError

# Half-open: `(0, 4)` stands for the layers 0, 1, 2 and 3.
Ranges = tuple[tuple[int, int], ...]

# More layers than any model has; files may name as many as they like.
_MOST = 1 << 14

_EXAMPLE = "((0, 4), (2, 6))"


def checked_ranges(ranges: Any, what: str) -> Ranges:
    """`ranges` as pairs of integers.

    Args:
        ranges: pairs `(first, end)`, the end not included.
        what: what to call them in messages.

    Raises:
        ConfigError: if they are anything else, or one of them is empty or reversed.

    >>> checked_ranges([[0, 4], [2, 6]], "`ranges`")
    ((0, 4), (2, 6))
    """
    if isinstance(ranges, str) or not isinstance(ranges, Iterable):
        raise ConfigError(
            f"{what} = {ranges!r:.80}; pairs (first, end) of layers are meant, such as "
            f"{_EXAMPLE}."
        )
    found = []
    for pair in ranges:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not _indices(pair):
            raise ConfigError(
                f"{what} holds {pair!r:.80}, which is no pair (first, end) of layers "
                f"from 0 up. Write e.g. {_EXAMPLE}."
            )
        first, end = map(int, pair)
        if first >= end:
            raise ConfigError(
                f"{what} holds ({first}, {end}), a range without layers: it begins at "
                f"{first} and ends before {end}."
            )
        found.append((first, end))
    if not found:
        raise ConfigError(
            f"{what} is empty, and a model has at least one layer. Write e.g. "
            f"{_EXAMPLE}."
        )
    if sum(end - first for first, end in found) > _MOST:
        raise ConfigError(
            f"{what} names more than {_MOST:,} layers, which no model has."
        )
    return tuple(found)


def _indices(values: Sequence[Any]) -> bool:
    return all(
        hasattr(value, "__index__") and not isinstance(value, bool) and int(value) >= 0
        for value in values
    )


def sources(ranges: Ranges, layers: int, what: str) -> tuple[int, ...]:
    """For each layer of the new model, which of the old one's it is.

    Args:
        ranges: as `checked_ranges` gives them.
        layers: how many layers the old model has.
        what: what to call the ranges in messages.

    Raises:
        ConfigError: if a range goes beyond the layers.

    >>> sources(((0, 2), (1, 3)), 3, "`ranges`")
    (0, 1, 1, 2)
    """
    for first, end in ranges:
        if end > layers:
            raise ConfigError(
                f"{what} holds ({first}, {end}), and the model has {layers} layers, "
                f"0 to {layers - 1}."
            )
    return tuple(i for first, end in ranges for i in range(first, end))


def ranges_of(found: Sequence[int]) -> Ranges:
    """The ranges that `sources` makes these of: as few as there can be.

    >>> ranges_of((0, 1, 1, 2))
    ((0, 2), (1, 3))
    """
    ranges: list[tuple[int, int]] = []
    for source in found:
        if ranges and ranges[-1][1] == source:
            ranges[-1] = (ranges[-1][0], source + 1)
        else:
            ranges.append((source, source + 1))
    return tuple(ranges)
