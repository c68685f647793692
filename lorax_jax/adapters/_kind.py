"""Kinds of adapters: how the arrays of an adapter become what stands in the tree."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from .._errors import AdapterError
from ._adapted import Adapted, Origin
from ._base import Term
from ._role import Fixed, Role


@dataclasses.dataclass(frozen=True)
class Site:
    """The arrays that an adapter keeps for one weight, on their way into the tree.

    Attributes:
        base: the weight, or what earlier adapters made of it.
        train: the arrays that move.
        fixed: those that do not, and the role.
        weight: the multiplier given to `bind`.
        key: PRNG key for dropout, or `None`.
    """

    base: Any
    train: Mapping[str, Any]
    fixed: Fixed
    weight: Any
    key: Any

    @property
    def role(self) -> Role:
        """Roles of the weight's axes."""
        return self.fixed.role

    def held(self, name: str) -> Any:
        """An array that is trained, or that its kind of adapter lets be kept fixed."""
        return self.train[name] if name in self.train else self.fixed[name]

    def with_term(self, term: Term) -> Adapted:
        """The weight with one more term, which acts after those before it."""
        base = self.base
        if isinstance(base, Adapted):
            return Adapted(base.base, (*base.terms, term), base.origin)
        return Adapted(base, (term,), Origin(self.role.path))

    def refuse_weight(self, kind: str) -> None:
        """Raises for a multiplier where the kind has no meaning for one."""
        if not (isinstance(self.weight, int | float) and self.weight == 1):
            raise AdapterError(
                f"`weights` multiplies {self.role.name!r}, where the adapter is "
                f"{kind}: that has no multiple. Bind it with the weight 1."
            )


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Attributes:
        name: what `Role.kind` calls it.
        train: names of the arrays that it trains.
        fixed: names of those that it keeps fixed.
        optional: names of either that it may have beside them.
        freezable: which of those that it trains may be kept fixed instead.
        bind: `bind(site)` gives what stands in the parameter tree.
    """

    name: str
    train: tuple[str, ...]
    fixed: tuple[str, ...]
    optional: tuple[str, ...]
    freezable: tuple[str, ...]
    bind: Callable[[Site], Any]


KINDS: dict[str, Kind] = {}


def kind(
    name: str,
    *,
    train: tuple[str, ...],
    fixed: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    freezable: tuple[str, ...] = (),
):
    """Registers `fn(site) -> leaf` for a kind of adapter."""

    def register(fn):
        KINDS[name] = Kind(name, train, fixed, optional, freezable, fn)
        return fn

    return register
