"""Calls: `jit`, `remat`, and functions with a derivative of their own."""

import jax
from jax import lax

from ..._errors import TransformError
from ...adapters import Adapted
from .. import _jaxpr
from .._interpreter import dense, interpret, source
from .._registry import rule


def leaves(operands) -> list[list]:
    """The leaves of each operand: one for an array, several for a weight."""
    return [jax.tree.leaves(operand) for operand in operands]


def spread(values, groups, operands, fill):
    """Extends a parameter that has an entry for each operand to their leaves.

    The entry of a weight belongs to its dense base, the first of its leaves.
    """
    out = []
    for value, group, operand in zip(values, groups, operands, strict=True):
        packed = isinstance(operand, Adapted) and operand.is_packed
        first = fill if packed else value
        out += [first, *[fill] * (len(group) - 1)]
    return tuple(out)


@rule("jit", "pjit", policy="enters", note="re-jitted under its own name")
def _jit(run, eqn, operands):
    inner = run.retrace(eqn.params["jaxpr"], operands)
    groups = leaves(operands)
    # One entry an operand: shardings, layouts and donation. A base is never donated,
    # for one base serves many adapters.
    changes = {
        "in_shardings": _jaxpr.UNSPECIFIED,
        "in_layouts": None,
        "donated_invars": False,
    }
    changes = {
        name: spread(eqn.params[name], groups, operands, fill)
        for name, fill in changes.items()
        if name in eqn.params
    }
    if "donated_invars" in changes:
        flags = [
            donated and not isinstance(operand, Adapted)
            for donated, operand in zip(
                eqn.params["donated_invars"], operands, strict=True
            )
        ]
        changes["donated_invars"] = spread(flags, groups, operands, False)
    outs, notes = leaves(inner.kinds), jax.tree.leaves(inner.notes)
    for name, fill in (("out_shardings", _jaxpr.UNSPECIFIED), ("out_layouts", None)):
        if name in eqn.params:
            own = spread(eqn.params[name], outs, inner.kinds, fill)
            changes[name] = (*own, *[fill] * len(notes))
    flat = [leaf for group in groups for leaf in group]
    return inner.results(_jaxpr.bind(eqn, flat, jaxpr=inner.jaxpr, **changes))


@rule("remat2", "remat", "checkpoint", policy="enters", note="saves `x A`, not `x A B`")
def _remat(run, eqn, operands):
    inner = run.retrace(eqn.params["jaxpr"], operands)
    body = _jaxpr.open_jaxpr(inner.jaxpr)
    groups = leaves(operands)
    changes = {"jaxpr": body}
    if eqn.params["policy"] is not None:
        changes["policy"] = _thin(body, eqn.params["policy"])
    if isinstance(eqn.params["prevent_cse"], tuple):  # from JAX 0.9, one an operand
        flags = eqn.params["prevent_cse"]
        changes["prevent_cse"] = tuple(
            flag for flag, group in zip(flags, groups, strict=True) for _ in group
        )
    flat = [leaf for group in groups for leaf in group]
    return inner.results(_jaxpr.bind(eqn, flat, **changes))


@_jaxpr.keyed_by_jaxpr
def _thin(jaxpr, policy):
    """`policy`, except that it never saves the product with the second factor.

    A policy that saves matrix products would save `x W`, `x A` and `(x A) B`. The last
    is as large as the first and costs next to nothing to compute from the second.

    JAX tells a policy the primitive, types and parameters of an equation, not which
    equation it is. A product of the model that agrees with ours in all of them keeps
    what the policy says.
    """
    up, other = set(), set()
    for eqn in _jaxpr.equations(jaxpr()):
        if eqn.primitive is lax.dot_general_p:
            kind = _signature([v.aval for v in eqn.invars], eqn.params)
            scopes = str(eqn.source_info.name_stack).split("/")
            (up if "lora_up" in scopes else other).add(kind)
    up -= other

    def thin(primitive, *avals, **params):
        if primitive is lax.dot_general_p and _signature(avals, params) in up:
            return False
        return policy(primitive, *avals, **params)

    return thin


def _signature(avals, params):
    shapes = tuple((aval.shape, aval.dtype) for aval in avals)
    return shapes, params["dimension_numbers"], params["preferred_element_type"]


@rule(
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    policy="enters",
    note='refused unless `custom="primal"` or `"materialize"`',
)
def _custom(run, eqn, operands):
    jaxpr = eqn.params.get("call_jaxpr", eqn.params.get("fun_jaxpr"))
    # What nothing adapts loses nothing in there, as long as it can be an array.
    operands = [
        v.opened() if isinstance(v, Adapted) and not v.terms else v for v in operands
    ]
    if not any(isinstance(v, Adapted) for v in operands):
        return _jaxpr.bind(eqn, operands)
    if run.options.custom == "materialize":
        return _jaxpr.bind(eqn, [dense(operand) for operand in operands])
    inner, consts = _jaxpr.closed(jaxpr)
    if run.options.custom == "primal":
        return interpret(inner, consts, operands, run.options)
    weights = [v for v in operands if isinstance(v, Adapted)]
    raise TransformError(
        f"`{weights[0].origin.path or '?'}`, an adapted weight of shape "
        f"{weights[0].shape}, enters `{_name(eqn, inner)}`, which has a derivative of "
        "its own. Inside, that derivative could not see the adapter, and without it "
        "the gradients would be others.\n"
        f"  at      {source(eqn)}\n"
        "Leave the weight out of the targets, or choose:\n"
        '  adapt(fn, custom="primal")        differentiate the body, not the rule\n'
        '  adapt(fn, custom="materialize")   keep the rule, build the dense matrix'
    )


def _name(eqn, inner) -> str:
    info = getattr(inner, "debug_info", None)
    return getattr(info, "func_name", None) or eqn.params.get("name", "a function")


@rule(
    "device_put",
    "optimization_barrier",
    policy="passes",
    note="the base alone, beside whatever else is handed through",
)
def _handed_through(run, eqn, operands):
    del run
    bases = [v.base if isinstance(v, Adapted) else v for v in operands]
    if any(isinstance(v, Adapted) and v.is_packed for v in operands):
        return list(operands)  # a packed base stays where it is
    outs = _jaxpr.bind(eqn, bases)
    return [
        v.apply(out) if isinstance(v, Adapted) else out
        for v, out in zip(operands, outs, strict=True)
    ]


@rule("stop_gradient", policy="passes", note="stops the gradients of the factors too")
def _stop_gradient(run, eqn, operands):
    del run, eqn
    return [jax.tree.map(lax.stop_gradient, operands[0])]
