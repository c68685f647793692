"""The walk inside calls, branches and loops: for each primitive, one function.

Each takes the walk, the equation and what its operands are, and gives what its results
are, as the rules of `rules/` do with values.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import _jaxpr
from ._probe import is_weight

if TYPE_CHECKING:
    from ._walk import Walk


def _call(walk: "Walk", eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    name = next(n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
    return walk.inside(params[name], operands)


def _cond(walk: "Walk", eqn: Any, operands: list[Any]) -> list[Any]:
    branches = [walk.inside(b, operands[1:]) for b in eqn.params["branches"]]
    out = []
    for values in zip(*branches, strict=True):
        if all(map(is_weight, values)):  # one weight or another, and no array
            out.append(tuple(dict.fromkeys(p for value in values for p in value)))
        else:
            out.append(walk.join(values, "cond"))
    return out


def _while(walk: "Walk", eqn: Any, operands: list[Any]) -> list[Any]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = operands[n : n + m], operands[n + m :]
    walk.inside(eqn.params["cond_jaxpr"], [*operands[:n], *carry])
    return _repeat(walk, "while", eqn.params["body_jaxpr"], consts, carry, [])


def _scan(walk: "Walk", eqn: Any, operands: list[Any]) -> list[Any]:
    n, m = _jaxpr.scan_counts(eqn)
    xs = [_unstack(walk, eqn, x) for x in operands[n + m :]]
    consts, carry = operands[:n], operands[n : n + m]
    return _repeat(walk, "scan", eqn.params["jaxpr"], consts, carry, xs)


def _unstack(walk: "Walk", eqn: Any, x: Any) -> Any:
    if not is_weight(x):
        return x
    for probe in x:
        for axis in probe.axes[0] if not probe.routed else ():
            instance = ("scan", id(eqn), walk.calls)
            group = walk.read_together.setdefault(instance, {})
            group[probe.leaf] = axis
    return tuple(dataclasses.replace(p, axes=p.axes[1:]) for p in x)


def _repeat(
    walk: "Walk", name: str, jaxpr: Any, consts: list, carry: list, xs: list
) -> list[Any]:
    """Walks a loop's body until what flows around the loop stays the same."""
    while True:
        outs = walk.inside(jaxpr, [*consts, *carry, *xs])
        pairs = zip(carry, outs[: len(carry)], strict=True)
        joined = [walk.join(pair, name) for pair in pairs]
        if joined == carry:
            # A stacked result is no weight: nothing follows it from here.
            stacked = [walk.join((y, frozenset()), name) for y in outs[len(carry) :]]
            return [*outs[: len(carry)], *stacked]
        carry = joined


INNER: dict[str, Callable[["Walk", Any, list[Any]], list[Any]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "remat2": _call,
    "remat": _call,
    "checkpoint": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    "shard_map": _call,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
