"""PEFT's patterns: matching those of a file, and writing the shortest that fit."""

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from .._errors import CheckpointError


class Patterns:
    """Regexes from a file, matched to module names within a bounded time."""

    # Seconds for all matches of one configuration: real ones take milliseconds.
    LIMIT = 20.0
    MOST = 10_000

    def __init__(self, patterns: Collection[str], what: str):
        if len(patterns) > self.MOST:
            raise CheckpointError(
                f"{what} has {len(patterns):,} patterns; more than {self.MOST:,} are "
                "not read. Patterns that end in a module's name serve all layers."
            )
        self._compiled = {
            key: compile_pattern(rf"(.*\.)?({key})$", key, what) for key in patterns
        }
        self._what = what
        self._spent = 0.0

    def __call__(self, patterns: Iterable[str], module: str) -> str | None:
        """The first of `patterns` that takes `module`, or `None`."""
        for key in patterns:
            if self.match(self._compiled[key].match, module):
                return key
        return None

    def match(self, matcher: Callable[[str], Any], module: str) -> bool:
        """Whether `matcher` takes `module`; raises when the time is used up."""
        start = time.perf_counter()
        found = matcher(module) is not None
        self._spent += time.perf_counter() - start
        if self._spent > self.LIMIT:
            raise CheckpointError(
                f"The patterns of {self._what} take longer than {self.LIMIT:g} s to "
                "match. Write them as plain module names."
            )
        return found


def compile_pattern(regex: str, shown: str, what: str) -> re.Pattern[str]:
    """Compiles a regex from a file, unless matching it could take forever.

    Python's matcher backtracks: a repeat inside a repeat can need time exponential in
    the length of a name, and `n` repeats in a row its `n`-th power.

    Args:
        regex: the whole regex.
        shown: the part of it to show in messages.
        what: whose it is.

    Raises:
        CheckpointError: if it is no regex, or one of those.
    """
    shown = f"{shown!r:.80}"
    try:
        if len(regex) > 2000:
            raise ValueError("longer than 2,000 characters")
        compiled = re.compile(regex)
        repeats = _count_repeats(re._parser.parse(regex))  # type: ignore[attr-defined]
    except (re.error, ValueError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{what} holds the pattern {shown}, which is not an acceptable regex: "
            f"{error or 'it nests too deeply'}."
        ) from None
    if repeats > 5:
        raise CheckpointError(
            f"{what} holds the pattern {shown}, whose {repeats} repeats could take "
            "forever to match. Write plain module names."
        )
    return compiled


def _count_repeats(parsed: Any, inside: bool = False) -> int:
    """How many repeats of many lengths a parsed regex has; raises on nested ones."""
    total = 0
    for op, argument in parsed:
        name = str(op)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            low, high, body = argument
            many = int(high) - int(low) > 3
            if (many and inside) or int(low) > 1000:
                raise ValueError("a repeat inside a repeat could take forever to match")
            total += many + _count_repeats(body, inside or many)
        elif name == "BRANCH":
            if inside:
                raise ValueError("a choice inside a repeat could take forever to match")
            total += sum(_count_repeats(branch) for branch in argument[1])
        elif name == "SUBPATTERN":
            total += _count_repeats(argument[-1], inside)
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += _count_repeats(argument[1], inside)
        elif name == "ATOMIC_GROUP":
            total += _count_repeats(argument, inside)
        elif name in ("GROUPREF", "GROUPREF_EXISTS"):
            raise ValueError("it refers back to a group")
    return total


def condense(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The shortest pattern that gives each module its value under PEFT's rule.

    Args:
        values: value of each adapted module, whole names.
        default: the value that needs no pattern.

    Returns:
        What to write as `rank_pattern` or `alpha_pattern`. Each key takes only modules
        of its value, so their order does not matter.

    Example:
        >>> condense({"h.0.up": 4, "h.1.up": 4, "h.0.q": 8, "h.1.q": 2}, default=8)
        {'up': 4, 'h.1.q': 2}
    """
    by_suffix: dict[str, set[Any]] = {}
    for module, value in values.items():
        for suffix in suffixes(module):
            by_suffix.setdefault(suffix, set()).add(value)
    found: dict[str, Any] = {}
    for module, value in values.items():
        if value == default:
            continue
        alone = (s for s in suffixes(module) if len(by_suffix[s]) == 1)
        found[next(alone, module)] = value
    # A key is a regex, where a dot is any character: check what it takes, and write
    # anchored whole names where that is not what was meant.
    if _takes(found, values, default):
        return found
    return {
        f"^{re.escape(module)}": value
        for module, value in values.items()
        if value != default
    }


def _takes(
    patterns: Mapping[str, Any], values: Mapping[str, Any], default: Any
) -> bool:
    try:
        find = Patterns(patterns, "the pattern")
        return all(
            patterns.get(find(patterns, module) or "", default) == value
            for module, value in values.items()
        )
    except CheckpointError:
        return False


def suffixes(module: str) -> list[str]:
    """What may stand for a module, shortest first; none starts with a layer's index.

    >>> suffixes("h.0.attn.q")
    ['q', 'attn.q', 'h.0.attn.q']
    """
    parts = module.split(".")
    found = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
    return [s for s in found[:-1] if not s.split(".")[0].isdigit()] + found[-1:]


def short_targets(modules: Iterable[str], others: Iterable[str]) -> list[str]:
    """The fewest suffixes that take all `modules` and none of `others`.

    >>> short_targets(["h.0.q", "h.1.q"], ["h.0.k", "h.1.k"])
    ['q']
    """
    taken = {suffix for other in others for suffix in suffixes(other)}
    chosen: dict[str, None] = {}
    for module in modules:
        free = [suffix for suffix in suffixes(module) if suffix not in taken]
        chosen[free[0] if free else module] = None
    return list(chosen)


def exact_targets(modules: Sequence[str], others: Iterable[str]) -> list[str] | str:
    """Whole names, or a regex where a whole name ends the name of another module.

    >>> exact_targets(["q", "k"], ["v"]), exact_targets(["head"], ["aux.head"])
    (['q', 'k'], '(?:head)')
    """
    known = {suffix for name in (*modules, *others) for suffix in endings(name)}
    if not known.intersection(modules):
        return list(modules)
    return "(?:" + "|".join(re.escape(module) for module in modules) + ")"


def endings(module: str) -> list[str]:
    """Everything that follows a dot in a module's name.

    >>> endings("h.0.q")
    ['0.q', 'q']
    """
    parts = module.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]
