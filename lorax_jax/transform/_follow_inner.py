"""Tokens inside calls, branches and loops: for each primitive, one function."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from . import _jaxpr
from ._stretches import Axes, Axis, Lost, Shard, entire, join, tidy

if TYPE_CHECKING:
    from ._follow import Walk


def _lose(walk: "Walk", eqn: Any) -> Callable[[str], Lost]:
    name, source = eqn.primitive.name, walk.source or "(unknown line)"
    return lambda reason: Lost(f"`{name}`: {reason}", source)


def _joined(values: Sequence[Axes], lose: Callable[[str], Lost]) -> Axes:
    return tuple(join(axes, lose) for axes in zip(*values, strict=True))


def _call(walk: "Walk", eqn: Any, operands: list[Axes]) -> list[Axes]:
    params = eqn.params
    name = next(n for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)
    return walk.inside(params[name], operands)


def _cond(walk: "Walk", eqn: Any, operands: list[Axes]) -> list[Axes]:
    branches = [walk.inside(b, operands[1:]) for b in eqn.params["branches"]]
    lose = _lose(walk, eqn)
    return [_joined(values, lose) for values in zip(*branches, strict=True)]


def _while(walk: "Walk", eqn: Any, operands: list[Axes]) -> list[Axes]:
    n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = operands[n : n + m], operands[n + m :]
    out = _repeat(walk, eqn, eqn.params["body_jaxpr"], consts, carry, [])
    walk.inside(eqn.params["cond_jaxpr"], [*operands[:n], *out])
    return out


def _scan(walk: "Walk", eqn: Any, operands: list[Axes]) -> list[Axes]:
    """The body sees one entry of what is scanned; results stand where it stood."""
    n, m = _jaxpr.scan_counts(eqn)
    consts, carry, xs = operands[:n], operands[n : n + m], operands[n + m :]
    scanned = join([x[0] for x in xs], _lose(walk, eqn))
    inside = [x[1:] for x in xs]
    out = _repeat(walk, eqn, eqn.params["jaxpr"], consts, carry, inside)
    stacked = [
        (scanned if var.aval.shape[0] > 1 else (), *axes)
        for var, axes in zip(eqn.outvars[m:], out[m:], strict=True)
    ]
    return [*out[:m], *stacked]


def _repeat(
    walk: "Walk", eqn: Any, jaxpr: Any, consts: list, carry: list, xs: list
) -> list[Axes]:
    """A loop's body, until what flows around the loop stays the same.

    A loop may not turn at all, so its results hold what went in as well.
    """
    lose, noting = _lose(walk, eqn), walk.noting
    walk.noting = False
    try:
        while True:
            outs = walk.inside(jaxpr, [*consts, *carry, *xs])
            pairs = zip(carry, outs, strict=False)
            joined = [_joined(pair, lose) for pair in pairs]
            if joined == carry:
                break
            carry = joined
    finally:
        walk.noting = noting
    outs = walk.inside(jaxpr, [*consts, *carry, *xs])
    return [*carry, *outs[len(carry) :]]


def _shard_map(walk: "Walk", eqn: Any, operands: list[Axes]) -> list[Axes]:
    """A device sees its part of the tokens, under a label of its own."""
    params, lose = eqn.params, _lose(walk, eqn)
    sizes = dict(params["mesh"].shape)

    def enter(axis: Axis, names: tuple[str, ...]) -> Axis:
        parts = math.prod(sizes[name] for name in names)
        if parts == 1 or axis == () or isinstance(axis, Lost):
            return axis
        first = axis[0]
        if first.label is None or first.size % parts:
            return lose("they are divided among devices beside something else")
        size = first.size // parts
        return tidy((*entire(Shard(first, names), size), *axis[1:]))

    def leave(axis: Axis, names: tuple[str, ...]) -> Axis:
        parts = math.prod(sizes[name] for name in names)
        if isinstance(axis, Lost):
            return axis
        first = axis[0] if axis else None
        if parts > 1 and first and isinstance(first.label, Shard):
            of = first.label.of
            mine = entire(first.label, of.size // parts)
            if (first,) == mine and first.label.names == names:
                axis, parts = (of, *axis[1:]), 1
        if any(isinstance(one.label, Shard) for one in axis):
            return lose("results of several devices are not put back as they were")
        if axis and parts > 1:
            return lose("every device has all of them, and the results are joined")
        return axis

    def each(change, axes: Axes, spec: Any) -> Axes:
        names = [_names(entry) for entry in tuple(spec)]
        names += [()] * (len(axes) - len(names))
        return tuple(map(change, axes, names))

    inside = [
        each(enter, axes, spec)
        for axes, spec in zip(operands, params["in_specs"], strict=True)
    ]
    outs = walk.inside(params["jaxpr"], inside)
    return [
        each(leave, axes, spec)
        for axes, spec in zip(outs, params["out_specs"], strict=True)
    ]


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


INNER: dict[str, Callable[["Walk", Any, list[Axes]], list[Axes]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "composite": _call,
    "remat2": _call,
    "remat": _call,
    "checkpoint": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "custom_vjp_call_jaxpr": _call,
    "shard_map": _shard_map,
    "cond": _cond,
    "while": _while,
    "scan": _scan,
}
