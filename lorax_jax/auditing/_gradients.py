"""Is a gradient the size of a base weight computed?"""

import collections

from ._report import Check, answer
from ._step import DATA, SEED, Part, Step
from ._weights import Weights, key

NAME = "no base-size gradient"

# What sums a weight's gradient over the batch: the transposes of the operations that
# consume weights.
_SUMS = ("conv_general_dilated", "dot_general", "ragged_dot_general", "scatter-add")


def check(step: Step, frozen: Step, weights: Weights) -> Check:
    """Looks in the backward pass for sums over the batch of a weight's shape.

    The frozen step has every other product of the backward pass (cotangents of
    activations, of attention scores): what it computes on the same line with the same
    shape is no gradient of a weight. A product with A or B is a cotangent of an
    activation as well.
    """
    usual = collections.Counter(place for place, _ in _sums(frozen, weights))
    findings = []
    for place, finding in _sums(step, weights):
        if usual[place] > 0:
            usual[place] -= 1
        else:
            findings.append(finding)
    return answer(
        NAME,
        findings,
        "no sum over the batch has the shape of a weight",
    )


def _sums(step: Step, weights: Weights):
    for visit in step.visits:
        if visit.primitive not in _SUMS:
            continue
        ((kind, marks),) = visit.made()
        shape = kind.shape
        if SEED not in marks or key(shape) not in weights.every:
            continue
        if weights.is_thin(visit, shape):
            continue
        if any(
            not {DATA, SEED} & marks and any(isinstance(m, Part) for m in marks)
            for marks in visit.operands
        ):
            continue
        what = (
            f"`{visit.primitive}` makes {kind.str_short()}, the gradient of "
            f"{weights.every[key(shape)]!r} or of its like"
        )
        place = visit.source, visit.primitive, key(shape)
        yield place, (what, visit.source)
