"""Parts of a leaf, and axes of it, as a rule names them."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from ._errors import ConfigError

# (start, stop, step) of an axis; `None` takes all of it.
Bounds = tuple[int, int, int] | None
_OVERRIDES = ("rank", "alpha", "init", "dropout")
# What else may stand behind a path's `@`.
_TAKEN = ("rows", "lookup", "head")


@dataclasses.dataclass(frozen=True)
class Where:
    """What a part takes of one axis of a leaf.

    Attributes:
        axis: the leaf's axis; negative ones count from the end.
        split: sizes of the axes that it is viewed as; none if it is left as it is.
        take: bounds for each of those axes.
    """

    axis: int
    split: tuple[int, ...]
    take: tuple[Bounds, ...]


@dataclasses.dataclass(frozen=True)
class PartRule:
    """One part of the leaves that a rule matches, and what is different there.

    Attributes:
        name: what it is called; its site is `<path>@<name>`.
        where: what it takes of some axes. It takes all of the others.
        rank, alpha, init, dropout: as in `Rule`; `None` takes the rule's.
    """

    name: str
    where: tuple[Where, ...]
    rank: int | None = None
    alpha: float | None = None
    init: Any = None
    dropout: float | None = None


def part_rules(parts: Any, what: str) -> tuple[PartRule, ...]:
    """Normalizes the parts of a rule.

    Args:
        parts: name -> a dict. Its integer keys are axes of the leaf, with the entries
            that the part takes there: `(start, stop)`, `(start, stop, step)`, a single
            entry, or, where an axis has to be viewed as several,
            `{"split": sizes, "take": [bounds of each]}` with `None` for all of one.
            Its other keys are overrides of the rule: `rank`, `alpha`, `init`,
            `dropout`.
        what: where they stand, for messages.

    Raises:
        ConfigError: if they do not read so.

    Example:
        >>> part_rules({"v": {1: (128, 192), "rank": 4}}, "parts")
        ... # doctest: +NORMALIZE_WHITESPACE
        (PartRule(name='v', where=(Where(axis=1, split=(), take=((128, 192, 1),)),),
                  rank=4, alpha=None, init=None, dropout=None),)
    """
    if isinstance(parts, tuple) and all(isinstance(p, PartRule) for p in parts):
        return parts  # normalized before, as by `dataclasses.replace`
    if not isinstance(parts, Mapping):
        raise ConfigError(
            f"`{what}` = {parts!r:.80} is no dict from names of parts to what they "
            "take. Write e.g. {'q': {1: (0, 64)}, 'v': {1: (128, 192)}}."
        )
    if not parts:
        raise ConfigError(
            f"`{what}` is empty, so no part would be adapted. Name at least one, or "
            "leave it out to adapt the whole leaf."
        )
    return tuple(_part(name, part, f"{what}[{name!r}]") for name, part in parts.items())


def leaf_axes(axes: Any, what: str) -> tuple[int, ...]:
    """Normalizes some axes of a leaf: one, or several.

    Args:
        axes: integers; negative ones count from the end.
        what: where they stand, for messages.

    Raises:
        ConfigError: if they are none.
    """
    axes = (axes,) if _is_integer(axes) else axes
    if not isinstance(axes, tuple | list) or not all(map(_is_integer, axes)):
        raise ConfigError(
            f"`{what}` = {axes!r:.60}; axes of the weight are meant, integers, e.g. "
            "{'batch': (0,)}."
        )
    return tuple(map(int, axes))


def _part(name: Any, part: Any, what: str) -> PartRule:
    fits = isinstance(name, str) and name.isascii() and name.isidentifier()
    if not fits or name in _TAKEN:
        raise ConfigError(
            f"`{what}`: {name!r} cannot name a part. Its site is called <path>@<name>, "
            f"so it is letters, digits and `_`, and none of {', '.join(_TAKEN)}."
        )
    if not isinstance(part, Mapping):
        part = {}
    axes = {key: value for key, value in part.items() if _is_integer(key)}
    more = {key: value for key, value in part.items() if key not in axes}
    unknown = [key for key in more if key not in _OVERRIDES]
    if unknown or not axes:
        found = f"has {unknown[0]!r}" if unknown else "takes entries of no axis"
        raise ConfigError(
            f"`{what}` {found}. A part is a dict: integers are axes of the weight, "
            "with the entries that it takes, e.g. {1: (0, 64)}; beside them may stand "
            f"{', '.join(_OVERRIDES)}."
        )
    where = (_where(int(axis), take, what) for axis, take in axes.items())
    return PartRule(name, tuple(where), **more)


def _where(axis: int, take: Any, what: str) -> Where:
    what = f"{what}[{axis}]"
    if not isinstance(take, Mapping):
        return Where(axis, (), (_bounds(take, what),))
    sizes, takes = take.get("split"), take.get("take")
    fine = set(take) == {"split", "take"}
    if not isinstance(sizes, tuple | list) or not isinstance(takes, tuple | list):
        sizes, takes = (), ()
    fine = fine and all(_is_integer(n) and n > 0 for n in sizes)
    if not fine or not sizes or len(sizes) != len(takes):
        raise ConfigError(
            f"`{what}` = {take!r:.80}: an axis is viewed as several by "
            "{'split': sizes, 'take': [bounds of each]}, e.g. {'split': (2, 6, 16), "
            "'take': (None, (0, 4), None)}."
        )
    bounds = (None if one is None else _bounds(one, what) for one in takes)
    return Where(axis, tuple(map(int, sizes)), tuple(bounds))


def _bounds(take: Any, what: str) -> tuple[int, int, int]:
    if _is_integer(take):
        take = (take, take + 1)
    if not isinstance(take, tuple | list) or len(take) not in (2, 3):
        take = ()
    if not take or not all(map(_is_integer, take)):
        raise ConfigError(
            f"`{what}` is not what a part takes of an axis: (start, stop), (start, "
            "stop, step) or a single entry, integers counted from 0."
        )
    start, stop, step = map(operator.index, (*take, 1)[:3])
    if start < 0 or stop <= start or step < 1:
        raise ConfigError(
            f"`{what}` = {tuple(take)} takes no entry. Entries are counted from 0, "
            "`stop` lies behind `start`, and `step` is 1 or more."
        )
    return start, stop, step


def _is_integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
