"""Exceptions, and the builders of the messages they carry."""

import difflib
from collections.abc import Iterable, Sequence


class LoraxError(Exception):
    """Every error that this library raises on purpose."""


class ConfigError(LoraxError, ValueError):
    """A `LoraConfig`, or a foreign configuration, asks for what cannot be."""


class PlanError(LoraxError, ValueError):
    """A configuration does not fit the parameters that it was planned on."""


class PlanWarning(UserWarning):
    """A plan names weights that the function uses in a way that `adapt` will refuse."""


class ReplicationError(LoraxError, ValueError):
    """Parameters whose layers cannot be repeated, or are not as they should be."""


class GrowthError(LoraxError, ValueError):
    """A vocabulary cannot grow as it was asked to."""


class AdapterError(LoraxError, ValueError):
    """An adapter does not fit the parameters that it is bound to."""


class CaptureError(LoraxError, ValueError):
    """Statistics or gradients cannot be gathered, or what was gathered is no use."""


class CaptureWarning(UserWarning):
    """Statistics were gathered that are less than was asked for."""


class TransformError(LoraxError, TypeError):
    """A function uses an adapted weight in a way that has no factored form."""


class FollowError(LoraxError, ValueError):
    """Nothing says in which order the tokens of an array stand."""


class AuditError(LoraxError, AssertionError):
    """A train step fails a check of `audit`, or cannot be audited."""


class CheckpointError(LoraxError, ValueError):
    """A file or folder is not what its name promises."""


def closest(wanted: str, known: Iterable[str], most: int = 4) -> list[str]:
    """The `most` entries of `known` that read most like `wanted`.

    Paths and the regexes written for them share components, so components count first
    and spelling second.

    >>> closest("attn/q_proj", ["layers/0/attn/q_proj/kernel", "norm/scale"], most=1)
    ['layers/0/attn/q_proj/kernel']
    """
    words = set(_words(wanted))

    def score(path: str) -> tuple[int, float]:
        shared = len(words & set(_words(path)))
        return shared, difflib.SequenceMatcher(None, wanted, path).ratio()

    return sorted(known, key=score, reverse=True)[:most]


def _words(path: str) -> list[str]:
    text = "".join(c if c.isalnum() or c == "_" else " " for c in path)
    return [word for word in text.split() if not word.isdigit()]


def listing(label: str, items: Sequence[str], total: int | None = None) -> str:
    """Formats `items` under one another behind `label`, as the messages do.

    >>> print(listing("closest", ["a/b", "c"], total=9))
      closest  a/b
               c        ... of 9
    """
    lines = [f"  {label}  {items[0] if items else '(none)'}"]
    lines += [" " * (len(label) + 4) + item for item in items[1:]]
    if total is not None and total > len(items):
        lines[-1] += f"        ... of {total}"
    return "\n".join(lines)


def shorten(items: Sequence[str], most: int = 6) -> str:
    """Joins the first `most` items and says how many there are in all.

    >>> shorten(["a", "b", "c"], most=2)
    'a, b, ... (3 in all)'
    """
    if len(items) <= most:
        return ", ".join(items)
    return ", ".join(items[:most]) + f", ... ({len(items)} in all)"
