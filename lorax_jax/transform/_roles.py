"""What each weight is to the model: roles of its axes, read off the jaxpr.

A shape does not say which of a weight's axes are summed over. The program does: this
module follows every parameter through transposes, reshapes, slices and control flow to
the operations that consume it, without computing anything.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from .. import _paths
from .._errors import TransformError
from ..adapters import Adapted, is_weight
from . import _jaxpr
from ._adapt import named, stand_in
from ._consumers import INPUT, Leaf
from ._interpreter import retrace
from ._options import allowed
from ._probe import whole
from ._walk import Walk


@dataclasses.dataclass(frozen=True)
class Reading:
    """A function, read: its trace, and what it does with its parameters.

    Attributes:
        leaves: what was found out, for each path of the parameters that holds an array.
        jaxpr: the trace.
        inputs: what it was traced on, each with its path if it is a parameter.
    """

    leaves: dict[str, Leaf]
    jaxpr: Any
    inputs: tuple[tuple[str | None, Any], ...]

    def refusal(
        self,
        weights: Mapping[str, Adapted],
        *,
        materialize: str | Iterable[str] = "error",
        custom: str = "error",
    ) -> str | None:
        """Why `adapt` will refuse the function on these weights, or `None`.

        A rehearsal, on types: what refuses here are the rules that will refuse there.

        Args:
            weights: path -> the weight, its arrays or their types.
            materialize: as in `adapt`.
            custom: as in `adapt`.
        """
        operands = [
            weights.get(path or "", named(value, path or "?"))
            for path, value in self.inputs
        ]
        try:
            retrace(self.jaxpr, operands, allowed(materialize, custom))
        except TransformError as error:
            return str(error)
        return None


def read(
    fn: Callable[..., Any], params: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Reading:
    """Follows every leaf of `params` through `fn(params, *args, **kwargs)`.

    Args:
        fn: the model, as it will be given to `adapt`.
        params: the parameter tree, or its types.
        args: the other positional arguments; arrays or their types.
        kwargs: the keyword arguments.

    Returns:
        What was found out.
    """
    paths = [path for path, _ in _paths.flatten(params, is_leaf=is_weight)[0]]
    whole_call = (params, *args), dict(kwargs)
    flat, tree = jax.tree.flatten(whole_call, is_leaf=is_weight)
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

    found, values, inputs = {}, [], []
    for i, leaf in enumerate(flat):
        if not moves[i]:
            continue
        path = paths[i] if i < len(paths) else None  # parameters come first
        inputs.append((path, leaf))
        if path is None:
            values.append(frozenset([INPUT]))
        else:
            found[path] = Leaf(path, tuple(leaf.shape))
            values.append(whole(found[path]))
    jaxpr, _ = _jaxpr.trace(call)(*(stand_in(leaf) for _, leaf in inputs))
    walk = Walk(found)
    for value in walk.inside(jaxpr, values):
        # A head is alone: a residual stream carries many products to a result.
        behind = walk.result(value) - {INPUT}
        if len(behind) == 1:
            ((path, consumer),) = behind
            found[path].heads.add(consumer)
    walk.place_stacks()
    return Reading(found, jaxpr, tuple(inputs))
