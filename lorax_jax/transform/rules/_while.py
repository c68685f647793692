"""`while`: weights ride along as constants of condition and body."""

import jax

from ...structure import Unstructured
from .. import _jaxpr
from .._interpreter import interpret
from .._notes import noting
from .._registry import rule
from ._scan import check_no_weight, invariants, woven


@_jaxpr.keyed_by_jaxpr
def _step(jaxpr, options, n_carry, invariant, drop):
    """The traced condition or body, the weights of the carry in front of the rest."""

    def step(consts, kept, moving):
        inner, constants = _jaxpr.closed(jaxpr())
        carry = woven(kept, moving, invariant, n_carry)
        with noting() as notes:
            outs = interpret(inner, constants, [*consts, *carry], options)
        if notes:
            raise Unstructured(
                "something is noted in every step, and how many there are is not "
                "known before it runs"
            )
        return [out for i, out in enumerate(outs) if i not in drop]

    return _jaxpr.trace(step)


@rule("while", policy="enters", note="weights ride as constants of condition and body")
def _while(run, eqn, operands):
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    cond_consts, consts, carry = operands[:n], operands[n : n + m], operands[n + m :]
    invariant = invariants(_jaxpr.closed(body)[0], m, carry)
    kept = [carry[i] for i in invariant]
    moving = [v for i, v in enumerate(carry) if i not in invariant]
    key = run.options, len(carry), invariant
    new_cond, _ = _step(cond, *key, ())(cond_consts, kept, moving)
    new_body, kinds = _step(body, *key, invariant)(consts, kept, moving)
    check_no_weight(kinds)
    cond_flat = jax.tree.leaves((cond_consts, kept))
    body_flat = jax.tree.leaves((consts, kept))
    results = _jaxpr.bind(
        eqn,
        [*cond_flat, *body_flat, *moving],
        cond_jaxpr=new_cond,
        body_jaxpr=new_body,
        cond_nconsts=len(cond_flat),
        body_nconsts=len(body_flat),
    )
    return woven(kept, results, invariant, len(carry))
