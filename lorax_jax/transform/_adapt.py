"""`adapt`: a function that understands bound parameters."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from .. import _paths
from .._errors import TransformError
from ..adapters import Adapted, Origin, is_weight
from . import _jaxpr
from ._interpreter import interpret
from ._options import allowed


def adapt(
    fn: Callable[..., Any],
    *,
    materialize: str | Iterable[str] = "error",
    custom: str = "error",
) -> Callable[..., Any]:
    r"""Makes `fn` understand bound parameters.

    The result has `fn`'s signature. Wherever `fn` multiplies by an adapted weight, it
    computes

    $$x W + s\,(x A) B$$

    and never $W + s A B$. The model is not changed: `fn` is traced to a jaxpr, and the
    equations that touch an adapted weight are evaluated in factored form while all
    others run as they stand, through `jit`, `scan` and `remat`, under `grad`, `vmap`,
    `shard_map` and explicit sharding. Called without adapted weights, it calls `fn`.

    As with `jax.jit`, `fn` is traced once for each kind of arguments, so it must not
    depend on values that change between calls without being arguments.

    Args:
        fn: any function of arrays: `model.apply`, a loss, a decoding step. Weights may
            stand anywhere in its arguments. Arrays and PRNG keys are traced; all other
            arguments (`train=True`, a string, a Python number) stay what they are, and
            each new value of one is traced anew: pass what changes as an array.
        materialize: what happens where an operation has no factored form. `"error"`
            refuses, naming the operation, the weight and the line; a primitive's name
            or several allow the dense weight to be built there; `"allow"` everywhere.
        custom: what happens where an adapted weight enters a function with a custom
            derivative. `"error"` refuses; `"primal"` goes inside and differentiates
            what it finds there, without the custom rule; `"materialize"` builds the
            dense weight and keeps the custom rule.

    Returns:
        A function with `fn`'s signature.

    Raises:
        TransformError: at the call, where a weight is used in a way that has no
            factored form.

    Example:
        >>> import jax.numpy as jnp, lorax_jax as lj
        >>> params = {"w": jnp.ones((3, 2))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> lj.adapt(fn)(lj.bind(params, adapter), jnp.ones(3))
        Array([3., 3.], dtype=float32)
    """
    if not callable(fn):
        raise TransformError(
            f"`adapt` got {fn!r:.60}, which is no function. Give it what runs the "
            "model, e.g. `adapt(model.apply)`."
        )
    options = allowed(materialize, custom)
    traced: dict[Any, _Entry] = {}

    @functools.wraps(fn)
    def adapted(*args, **kwargs):
        leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
        if not any(is_weight(leaf) for leaf in leaves):
            return fn(*args, **kwargs)
        dynamic = [is_dynamic(leaf) for leaf in leaves]
        static = tuple(
            None if moves else leaf for leaf, moves in zip(leaves, dynamic, strict=True)
        )
        values = [leaf for leaf, moves in zip(leaves, dynamic, strict=True) if moves]
        key = (tree, tuple(dynamic), static, tuple(map(type, static)))
        entry = _lookup(traced, key, fn)
        jaxpr, out = entry.trace([stand_in(value) for value in values])
        inner, consts = _jaxpr.closed(jaxpr)
        weights = values
        if any(map(_is_bare_base, values)):
            paths = _paths.flatten((args, kwargs), is_leaf=is_weight)[0]
            moving = [p for (p, _), moves in zip(paths, dynamic, strict=True) if moves]
            weights = list(map(named, values, map(_within, moving)))
        results = interpret(inner, consts, weights, options)
        return jax.tree.map(
            lambda leaf: leaf.value if isinstance(leaf, _Static) else leaf,
            jax.tree.unflatten(jax.tree.structure(out), results),
            is_leaf=lambda leaf: isinstance(leaf, _Static),
        )

    adapted.__dict__["takes_bound_params"] = True
    return adapted


def is_adapted(fn: Callable[..., Any]) -> bool:
    """Whether `fn` came from `adapt`, also under `jax.jit` or another wrapper."""
    return getattr(fn, "takes_bound_params", False)


# Kinds of arguments that one adapted function remembers, the oldest forgotten first.
_MOST_TRACES = 256


class _Entry:
    """The traced form of a function for one structure of its arguments."""

    def __init__(self, make: Callable[[], Callable[..., Any]]):
        self.make = make
        self.traced = _jaxpr.trace(make())
        self.fresh = True
        self.captures = False

    def trace(self, values: list[Any]) -> tuple[Any, Any]:
        if self.captures:
            # The function reads a value of a running trace that is no argument of it.
            # JAX's cache would give back the value of the trace before, so it is
            # traced anew.
            return _jaxpr.trace(self.make())(*values)
        jaxpr, out = self.traced(*values)
        self.captures = any(map(_jaxpr.is_tracer, _jaxpr.closed(jaxpr)[1]))
        return jaxpr, out


def _lookup(traced: dict[Any, _Entry], key: Any, fn: Callable[..., Any]) -> _Entry:
    tree, dynamic, static, _ = key

    def make():
        def flat(*values):
            moving = iter(values)
            leaves = [
                next(moving) if moves else fixed
                for fixed, moves in zip(static, dynamic, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(tree, leaves)
            return jax.tree.map(
                lambda leaf: leaf if _is_array(leaf) else _Static(leaf),
                fn(*args, **kwargs),
            )

        return flat

    try:
        if key not in traced:
            if len(traced) >= _MOST_TRACES:
                del traced[next(iter(traced))]
            traced[key] = _Entry(make)
        return traced[key]
    except TypeError:  # an argument that cannot be hashed: nothing to find it by
        return _Entry(make)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A result that is no array, kept in the tree of results instead of the jaxpr."""

    value: Any


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_dynamic(leaf: Any) -> bool:
    """Whether an argument is traced: an array, a weight or the type of one."""
    return _is_array(leaf) or is_weight(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _is_bare_base(value: Any) -> bool:
    return is_weight(value) and not isinstance(value, Adapted)


def named(value: Any, path: str) -> Any:
    """A base that nothing adapts as a weight without terms; all else as it is."""
    return Adapted(value, (), Origin(path)) if _is_bare_base(value) else value


def _within(path: str) -> str:
    """A path in `(args, kwargs)` as one in the argument."""
    return path.split("/", 2)[-1]


def stand_in(value: Any) -> Any:
    """What `fn` is traced on in place of a weight: something of the same type."""
    base = value.base if isinstance(value, Adapted) else value
    if is_weight(base):
        return jax.ShapeDtypeStruct(base.shape, base.dtype)
    return base
