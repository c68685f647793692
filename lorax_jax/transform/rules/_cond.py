"""`cond` and `switch`: every branch knows the weights that enter."""

import jax

from ...adapters import Adapted
from ...structure import Unstructured
from .. import _jaxpr
from .._interpreter import Inner, traced
from .._notes import Note, agreed, filled
from .._registry import rule


@rule("cond", policy="enters", note="each branch on its own; the predicate is kept")
def _cond(run, eqn, operands):
    which, *operands = operands
    branches = eqn.params["branches"]
    same = _handed_back(branches, operands)
    drop = tuple(same)
    inner = [run.retrace(branch, operands, drop=drop) for branch in branches]
    for results in zip(*(branch.kinds for branch in inner), strict=True):
        _check_agreement(results)
    notes = agreed([branch.notes for branch in inner])
    if notes:
        inner = [traced(_noting(branch, notes), operands) for branch in inner]
    flat = [which, *jax.tree.leaves(operands)]
    bound = _jaxpr.bind(eqn, flat, branches=tuple(branch.jaxpr for branch in inner))
    results = iter(inner[0].results(bound))
    outs = range(len(eqn.outvars))
    return [operands[same[i]] if i in same else next(results) for i in outs]


def _noting(branch: Inner, notes: list[Note]):
    """A branch that returns `notes`, zeros for those that it does not take."""

    def body(operands):
        flat = _jaxpr.evaluate(branch.jaxpr, jax.tree.leaves(operands))
        structure = jax.tree.structure((branch.kinds, branch.notes))
        outs, taken = jax.tree.unflatten(structure, flat)
        return outs, filled(taken, notes)

    return _jaxpr.trace(body)


def _handed_back(branches, operands) -> dict[int, int]:
    """Results that are one and the same weight, untouched, in every branch.

    They need not go through the branches: result -> operand.
    """
    found = {}
    bodies = [_jaxpr.closed(branch)[0] for branch in branches]
    for i in range(len(bodies[0].outvars)):
        for at, operand in enumerate(operands):
            if isinstance(operand, Adapted):
                if all(body.outvars[i] is body.invars[at] for body in bodies):
                    found[i] = at
    return found


def _check_agreement(results) -> None:
    """A result that is a weight must be one of the same form in every branch."""
    weights = [isinstance(result, Adapted) for result in results]
    if not any(weights):
        return
    if not all(weights):
        raise Unstructured(
            "its result is an adapted weight in some branches and a plain array in "
            "others, and what follows could not know which"
        )
    forms = {jax.tree.structure(result) for result in results}
    sizes = {
        tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(result))
        for result in results
    }
    if len(forms) > 1 or len(sizes) > 1:
        raise Unstructured(
            "its branches hand back weights whose adapters differ in form: in rank, "
            "in number or in the axes that their factors run along"
        )
