"""`concatenate`: weights fused at run time stay a sum of their terms."""

import functools

import jax.numpy as jnp

from ...adapters import Adapted
from ...structure import Along, Unstructured
from .. import _jaxpr
from .._registry import rule
from ._shape import fill


@rule("concatenate", policy="passes", note="factors are padded with zeros")
def _concatenate(run, eqn, operands):
    del run
    axis = eqn.params["dimension"]
    weights = [v for v in operands if isinstance(v, Adapted)]
    if any(weight.is_packed for weight in weights):
        raise Unstructured("a packed base cannot be concatenated")
    bases = [v.base if isinstance(v, Adapted) else v for v in operands]
    base = _jaxpr.bind(eqn, bases)[0]
    # Each operand's terms, padded with zeros where the other operands stand.
    total, before, terms = base.shape[axis], 0, []
    for operand in operands:
        size = jnp.shape(operand)[axis]
        if isinstance(operand, Adapted):
            config = (before, total - before - size, 0)
            pad = Along(axis, functools.partial(fill, config=config), fills=True)
            terms += [term.apply(pad) for term in operand.terms]
        before += size
    return [Adapted(base, tuple(terms), weights[0].origin)]
