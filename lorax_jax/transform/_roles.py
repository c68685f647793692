"""What each weight is to the model: roles of its axes, read off the jaxpr.

A shape does not say which of a weight's axes are summed over. The program does: this
module follows every parameter through transposes, reshapes, slices and control flow to
the operations that consume it, without computing anything.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from .. import _paths
from . import _jaxpr
from ._consumers import INPUT, Leaf
from ._probe import whole
from ._walk import Walk


def trace_roles(
    fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Leaf]:
    """Follows every leaf of `params` through `fn(params, *args, **kwargs)`.

    Args:
        fn: the model, as it will be given to `adapt`.
        params: the parameter tree, or its types.
        args: the other positional arguments; arrays or their types.
        kwargs: the keyword arguments.

    Returns:
        What was found out, for each path of `params` that holds an array.
    """
    paths = [path for path, _ in _paths.flatten(params)[0]]
    flat, tree = jax.tree.flatten(((params, *args), dict(kwargs)))
    moves = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in flat]

    def call(*moving):
        values = iter(moving)
        leaves = [
            next(values) if move else leaf
            for leaf, move in zip(flat, moves, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(tree, leaves)
        out = jax.tree.leaves(fn(*args, **kwargs))
        return [leaf for leaf in out if hasattr(leaf, "dtype")]

    found, values = {}, []
    for i, leaf in enumerate(flat):
        if moves[i] and i < len(paths):  # parameters come first
            found[paths[i]] = Leaf(paths[i], tuple(leaf.shape))
            values.append(whole(found[paths[i]]))
        elif moves[i]:
            values.append(frozenset([INPUT]))
    moving = [x for x, move in zip(flat, moves, strict=True) if move]
    jaxpr, _ = _jaxpr.trace(call)(*moving)
    walk = Walk(found)
    for value in walk.inside(jaxpr, values):
        # A head is alone: a residual stream carries many products to a result.
        behind = walk.result(value) - {INPUT}
        if len(behind) == 1:
            ((path, consumer),) = behind
            found[path].heads.add(consumer)
    walk.place_stacks()
    return found
