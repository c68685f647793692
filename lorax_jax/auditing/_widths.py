"""Does an adapted layer hand on a wider dtype than the base does?"""

import collections
from typing import Any

import jax.numpy as jnp

from ..transform import NONE, Marks, Visit
from ._report import Check, answer
from ._step import DATA, SEED, Step
from ._weights import Weights

NAME = "no wider activation"
_WIDE = frozenset({"wide"})


def check(step: Step, frozen: Step, weights: Weights) -> Check:
    """Looks for activations that are wider than the frozen step's in the same place.

    A place is a line of the model and a shape. Where the base itself goes to float32,
    so may the adapted model; what is computed from a value that was too wide already is
    not reported again.
    """
    usual: dict[tuple[str, Any], int] = collections.defaultdict(int)
    for visit in frozen.visits:
        for kind, _ in visit.made():
            place = visit.source, getattr(kind, "shape", None)
            usual[place] = max(usual[place], _width(kind))
    findings: dict[int, tuple[str, str]] = {}

    def emit(visit: Visit) -> Marks:
        for kind, marks in visit.made():
            wide = usual.get((visit.source, getattr(kind, "shape", None)), 0)
            if not 0 < wide < _width(kind) or not {DATA, SEED} & marks:
                continue
            if weights.is_thin(visit, kind.shape):
                continue
            if not any(_WIDE <= operand for operand in visit.operands):
                what = (
                    f"`{visit.primitive}` makes {kind.str_short()} where the base "
                    f"has {8 * wide} bits"
                )
                findings[id(visit.eqn)] = what, visit.source
            return _WIDE
        return NONE

    step.flow(emit)
    return answer(
        NAME, findings.values(), "no activation is wider than the base's in its place"
    )


def _width(kind: Any) -> int:
    """Bytes of a floating dtype; 0 for everything else."""
    dtype = getattr(kind, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return 0
    return dtype.itemsize
