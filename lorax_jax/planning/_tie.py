"""A tie that is asked for must be there."""

from collections.abc import Mapping, Sequence

from .._config import LoraConfig
from .._errors import PlanError
from ..transform import Leaf
from ._sites import Slot

# What `tie` calls the uses; "shared" is the weight itself, whichever uses it has.
_ONE_USE = ("lookup", "head")


def check_ties(
    config: LoraConfig, slots: Sequence[Slot], leaves: Mapping[str, Leaf]
) -> None:
    """Refuses to adapt one use of a weight that has no other.

    A rule that says `tie` means tied weights and no others; that of the configuration
    is for whichever of the targets are tied, and one of them must be.

    Raises:
        PlanError: see above.
    """
    own = {rule.pattern: rule.tie for rule in config.rules or ()}
    for slot in slots:
        for site in slot.sites:
            tie = None if site is None else own.get(site.rule)
            if site is not None and tie in _ONE_USE and slot.role.use is None:
                raise PlanError(
                    f"The target {site.rule!r} adapts one use of a tied weight, "
                    f"`tie` = {tie!r}, and {_found(leaves[slot.role.path])}. Leave "
                    "`tie` out of this rule, or give the tied weight one of its own."
                )
    if config.tie in _ONE_USE and not any(slot.role.use for slot in slots):
        paths = [slot.role.path for slot in slots]
        found = _found(leaves[paths[0]])
        raise PlanError(
            f"`tie` = {config.tie!r} adapts one use of a tied weight, and none of the "
            f"{len(paths)} targets is tied: {found}, say. Leave `tie` out, or add the "
            "tied weight to `targets`."
        )


def _found(leaf: Leaf) -> str:
    lookups, products = leaf.of_kind("lookup"), leaf.of_kind("product")
    if lookups:
        return f"{leaf.path!r} is looked up and never multiplied by"
    where = f", at {products[0].source}," if products else ""
    return f"{leaf.path!r} is multiplied by{where} and never looked up"
