"""What the user allows `adapt` to do where there is no factored form."""

import dataclasses
import difflib
from collections.abc import Iterable

from .._errors import TransformError


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user allows; see `adapt`."""

    materialize: frozenset[str] | bool = False
    custom: str = "error"

    def may_materialize(self, primitive: str) -> bool:
        """Whether a dense weight may be built at this primitive."""
        if isinstance(self.materialize, bool):
            return self.materialize
        return primitive in self.materialize


def allowed(materialize: str | Iterable[str], custom: str) -> Options:
    """The options that `adapt`'s arguments of these names mean."""
    if custom not in ("error", "primal", "materialize"):
        raise TransformError(
            f"`custom` = {custom!r}; one of 'error', 'primal', 'materialize' is meant."
        )
    if isinstance(materialize, str) and materialize in ("error", "allow"):
        return Options(materialize == "allow", custom)
    names = (materialize,) if isinstance(materialize, str) else materialize
    if isinstance(names, bool) or not isinstance(names, Iterable):
        raise TransformError(
            f"`materialize` = {names!r}; 'error', 'allow' or the names of primitives "
            "are meant, as in `materialize=('sort',)`."
        )
    names = frozenset(names)
    for name in names:
        if difflib.get_close_matches(name, ("error", "allow"), cutoff=0.7):
            raise TransformError(
                f"`materialize` names a primitive {name!r}. Is 'error' or 'allow' "
                "meant?"
            )
    return Options(names, custom)
