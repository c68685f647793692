"""Is `W + s A B`, or `A B` alone, ever built?"""

from typing import Any

from ..transform import Marks
from ._report import Check, answer
from ._step import DATA, SEED, Part, Step
from ._weights import Weights, key

NAME = "no dense update"


def check(step: Step, weights: Weights, refusal: str) -> Check:
    """Looks for values of a weight's shape that are computed from its A and B alone.

    What is computed from the function's inputs too is an activation, and what is
    computed from the loss's cotangent a gradient, whatever their shapes. The equation
    that makes the first such value is reported, not those that go on computing with it.
    """

    def built(kind: Any, marks: Marks) -> set[str]:
        """The sites whose dense update, or weight, this value is."""
        if DATA in marks or SEED in marks or not marks:
            return set()
        parts = [mark for mark in marks if isinstance(mark, Part)]
        sides = {(part.site, part.kind) for part in parts}
        return {
            part.site
            for part in parts
            if {(part.site, "a"), (part.site, "b")} <= sides
            and key(kind.shape) in weights.sites[part.site]
        }

    findings = []
    for visit in step.visits:
        kinds = [atom.aval for atom in visit.eqn.invars]
        before = [built(*x) for x in zip(kinds, visit.operands, strict=True)]
        for kind, marks in visit.made():
            for site in sorted(built(kind, marks).difference(*before)):
                what = (
                    f"`{visit.primitive}` builds {kind.str_short()} of {site!r} from A "
                    "and B"
                )
                findings.append((what, visit.source))
    found = answer(
        NAME,
        findings,
        f"none of {len(weights.sites)} adapted weights is built from A and B",
    )
    if found.passed and refusal:
        return Check(NAME, False, refusal)
    return found
