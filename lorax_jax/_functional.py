"""`functional`: a Flax NNX module as a pure function."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def functional(module: nnx.Module) -> tuple[Callable[..., Any], Any, Any]:
    """Splits a Flax NNX module into a pure function, its parameters and its state.

    Linen's `model.apply` and plain functions are pure already and need nothing.

    Args:
        module: the module; it is not changed, now or by calls of the function.

    Returns:
        `(fn, params, state)`. `params` is a nested dictionary of arrays, every
        `nnx.Param` of the module; `state` is another, of everything else that has
        values: batch statistics, caches, random streams.
        `fn(params, state, *args, **kwargs)` gives `(out, state)`, with what the call
        did to the state.

    Example:
        >>> import jax.numpy as jnp
        >>> module = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> fn, params, state = functional(module)
        >>> out, state = fn(params, state, jnp.ones((4, 3)))
        >>> out.shape, sorted(params)
        ((4, 2), ['bias', 'kernel'])
    """
    graphdef, *boxed = _split(module)
    trees = [jax.tree.structure(part) for part in boxed]

    def refill(tree: Any, values: Any) -> nnx.State:
        # New variables at every call: a call may write to them, and they belong to the
        # trace that made them.
        state = jax.tree.unflatten(tree, [None] * tree.num_leaves)
        nnx.replace_by_pure_dict(state, values)
        return state

    def fn(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        parts = [refill(*pair) for pair in zip(trees, (params, state), strict=True)]
        running = nnx.merge(graphdef, *parts)
        out = running(*args, **kwargs)
        return out, nnx.to_pure_dict(_split(running)[2])

    params, state = map(nnx.to_pure_dict, boxed)
    return fn, params, state


def _split(module: nnx.Module) -> Any:
    """The module's structure, its parameters, and everything else that has values."""
    return nnx.split(module, nnx.Param, ...)
