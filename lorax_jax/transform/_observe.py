"""`observe`: runs a function for what terms note on the way, not for its results."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from ..adapters import is_weight
from . import _jaxpr
from ._adapt import is_dynamic, named, stand_in
from ._interpreter import interpret
from ._notes import Note, noting
from ._options import Options


def observe(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    prepare: Callable[[Any, list[Any]], list[Any]] | None = None,
) -> list[Note]:
    """The notes that the terms of bound weights take while `fn` runs.

    The results of `fn` are dropped, and under `jit` whatever only they need is not
    computed.

    Args:
        fn: any function of arrays, as for `adapt`.
        args: its positional arguments, bound weights among them.
        kwargs: its keyword arguments.
        options: what is allowed where there is no factored form.
        prepare: `prepare(jaxpr, values)` gives other values for the jaxpr's inputs.
    """
    leaves, tree = jax.tree.flatten((tuple(args), dict(kwargs)), is_leaf=is_weight)
    moves = [is_dynamic(leaf) for leaf in leaves]
    values = [leaf for leaf, move in zip(leaves, moves, strict=True) if move]

    def call(*moving):
        rest = iter(moving)
        flat = [
            next(rest) if move else leaf
            for leaf, move in zip(leaves, moves, strict=True)
        ]
        positional, named_ = jax.tree.unflatten(tree, flat)
        out = fn(*positional, **named_)
        return [leaf for leaf in jax.tree.leaves(out) if is_dynamic(leaf)]

    jaxpr, _ = _jaxpr.trace(call)(*map(stand_in, values))
    inner, consts = _jaxpr.closed(jaxpr)
    values = [named(value, "?") for value in values]
    if prepare is not None:
        values = prepare(jaxpr, values)
    with noting() as notes:
        interpret(inner, consts, values, options)
    return notes
