"""`Rule`: one pattern of `targets`, and what it says of its own."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ._errors import ConfigError, closest
from ._parts import PartRule, leaf_axes, part_rules

Tie = Literal["shared", "lookup", "head"]

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One pattern and what it says differently from the configuration.

    Attributes:
        pattern: a regex that must match a whole path (`re.fullmatch`), or
            `"all-linear"`.
        rank: rank of the sites it matches; `None` takes the configuration's.
        alpha: PEFT's `lora_alpha`; `None` takes the configuration's.
        init: initializer; `None` takes the configuration's.
        dropout: probability of dropping an input of A; `None` as above.
        tie: for a weight that is looked up and multiplied: which use is adapted.
        dora: whether outputs get magnitudes; `None` takes the configuration's.
        expect: how many sites the pattern must match; `None` accepts any number.
        batch: axes of the leaf along which A and B get an entry for each index.
        parts: the parts of the leaf that are adapted, a dict as in `part_rules`;
            normalized to `PartRule`s. None adapts the whole leaf.
    """

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    init: Any = None
    dropout: float | None = None
    tie: Tie | None = None
    dora: bool | None = None
    expect: int | None = None
    batch: Any = ()
    parts: Any = ()

    def __post_init__(self):
        what = f"targets[{self.pattern!r}]"
        check_regex("targets", self.pattern)
        check_numbers(self, what)
        check_tie(self.tie, f"{what}['tie']")
        if self.dora is not None:
            check_flag(self.dora, f"{what}['dora']")
        if self.expect is not None:
            check_count(self.expect, f"{what}['expect']")
        object.__setattr__(self, "batch", leaf_axes(self.batch, f"{what}['batch']"))
        parts = part_rules(self.parts, f"{what}['parts']")
        for part in parts:
            check_numbers(part, f"{what}['parts'][{part.name!r}]")
        object.__setattr__(self, "parts", parts)

    def matches(self, path: str) -> bool:
        """Whether the pattern matches all of `path`."""
        return _compiled(self.pattern).fullmatch(path) is not None


_compiled = functools.lru_cache(maxsize=None)(re.compile)

_OVERRIDES = tuple(f.name for f in dataclasses.fields(Rule) if f.name != "pattern")


def read_rules(targets: Any) -> tuple[Rule, ...] | None:
    """Rules from what a user may write for `targets`."""
    if targets is None:
        return None
    if isinstance(targets, str | Rule):
        targets = [targets]
    if isinstance(targets, Mapping):
        rules = tuple(_rule(p, overrides) for p, overrides in targets.items())
    elif isinstance(targets, Iterable):
        rules = tuple(t if isinstance(t, Rule) else _rule(t, {}) for t in targets)
    else:
        raise ConfigError(
            f"`targets` = {targets!r} is neither a regex, a list of regexes, a dict "
            f"from regex to overrides, nor {ALL_LINEAR!r}."
        )
    if not rules:
        raise ConfigError(
            "`targets` is empty, so nothing would be adapted. Give at least one regex, "
            "e.g. `targets=r'.*/(q|v)_proj/kernel'`."
        )
    return rules


def _rule(pattern: Any, overrides: Any) -> Rule:
    if not isinstance(pattern, str):
        raise ConfigError(f"`targets` holds {pattern!r}, which is not a regex string.")
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"`targets[{pattern!r}]` = {overrides!r} is not a dict of overrides. "
            f"Write e.g. `targets={{{pattern!r}: {{'rank': 4}}}}`."
        )
    for name in overrides:
        if name not in _OVERRIDES:
            raise ConfigError(
                f"`targets[{pattern!r}]` overrides {name!r}, which no rule knows. "
                f"Closest: {closest(str(name), _OVERRIDES, 1)[0]!r}; all: "
                f"{', '.join(_OVERRIDES)}."
            )
    return Rule(pattern, **overrides)


def check_regex(name: str, pattern: Any) -> None:
    """Raises unless `pattern` is a regex."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ConfigError(
            f"`{name}` holds {pattern!r}, which is not a regex: {error}. A path is "
            r"matched whole, so `.*/q_proj/kernel` finds it at any depth."
        ) from None


def check_numbers(rule: Rule | PartRule, what: str) -> None:
    """Raises unless what a rule or a part says of itself are values of its fields."""
    if rule.rank is not None:
        check_rank(rule.rank, f"{what}['rank']")
    if rule.dropout is not None:
        check_dropout(rule.dropout, f"{what}['dropout']")
    if rule.alpha is not None:
        check_alpha(rule.alpha, f"{what}['alpha']")


def check_rank(rank: Any, name: str) -> None:
    """Raises unless `rank` is an integer from 1 up."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"`{name}` = {rank!r}; a rank is an integer from 1 up.")


def check_alpha(alpha: Any, name: str) -> None:
    """Raises unless `alpha` is a finite number."""
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not (number and math.isfinite(alpha)):
        raise ConfigError(f"`{name}` = {alpha!r}; alpha is a finite number.")


def check_dropout(dropout: Any, name: str) -> None:
    """Raises unless `dropout` is a probability below 1."""
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"`{name}` = {dropout!r}; a probability in [0, 1) is meant.")


def check_flag(flag: Any, name: str) -> None:
    """Raises unless `flag` is true or false."""
    if not isinstance(flag, bool):
        raise ConfigError(f"`{name}` = {flag!r:.60}; `True` or `False` is meant.")


def check_count(count: Any, name: str) -> None:
    """Raises unless `count` is an integer from 0 up."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"`{name}` = {count!r:.60}; a number of sites is meant.")


def check_tie(tie: Any, name: str) -> None:
    """Raises unless `tie` names uses of a tied weight."""
    if tie not in (None, "shared", "lookup", "head"):
        raise ConfigError(
            f"`{name}` = {tie!r}; one of 'shared', 'lookup', 'head' is meant."
        )
