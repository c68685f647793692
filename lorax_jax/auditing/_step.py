"""The train steps under audit, as functions of arrays whose origin is known."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import AuditError, TransformError
from ..adapters import Adapter, Fixed, bind
from ..transform import NONE, Flow, Marks, Visit, adapt, is_adapted
from ._frozen import shifted

# Marks: see `Flow`.
DATA = "data"  # the inputs of the function: what depends on it is an activation
SEED = "seed"  # the loss's cotangent: what depends on it belongs to the backward pass


class Part(NamedTuple):
    """The mark of a factor: `Part("layers/0/q", "a")`.

    A frozen starting factor (`a0`) is a part of the kind that it starts (`a`).
    """

    site: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Step:
    """Value and gradient of a loss, as a function `run(seed, train, rest)`.

    `seed` is the cotangent of the loss, a one: as an argument it makes the backward
    pass known by what depends on it.

    Attributes:
        run: the function.
        args: what it is called on, arrays or types.
        marks: what each leaf of `args` is.
        known: the marks of arrays that may also be captured, by identity.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    marks: list[Marks]
    known: dict[int, Marks]

    @functools.cached_property
    def jaxpr(self) -> Any:
        """The trace."""
        return jax.make_jaxpr(self.run)(*self.args)

    def flow(self, emit: Callable[[Visit], Marks] | None = None) -> list[Visit]:
        """All equations of the trace, with what their operands are computed from."""
        flow = Flow(self._const, **({} if emit is None else {"emit": emit}))
        flow.run(self.jaxpr, self.marks)
        return flow.visits

    @functools.cached_property
    def visits(self) -> list[Visit]:
        """`flow`, without further marks."""
        return self.flow()

    def _const(self, value: Any) -> Marks:
        if id(value) in self.known:
            return self.known[id(value)]
        return _marks_of_input(value)

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled program, laid out over devices as the arguments are."""
        return jax.jit(self.run).lower(*self.args).compile()

    @property
    def is_concrete(self) -> bool:
        """Whether every argument is an array, so that the step can run."""
        return not any(
            isinstance(leaf, jax.ShapeDtypeStruct | Tracer)
            for leaf in jax.tree.leaves(self.args)
        )


@dataclasses.dataclass(frozen=True)
class Steps:
    """Both steps, and why `adapt` refuses the function, or `""`."""

    adapted: Step
    frozen: Step
    refusal: str


def steps(
    fn: Callable[..., Any], params: Any, adapter: Adapter, args: tuple, kwargs: dict
) -> Steps:
    """Builds both steps; a function that `adapt` refuses is built with all allowed."""
    bind(params, adapter)  # an adapter that does not fit says so, before all else
    forward, refusal = fn if is_adapted(fn) else adapt(fn), ""
    adapted = _step(forward, params, adapter, args, kwargs, frozen=False)
    try:
        adapted.jaxpr  # noqa: B018
    except TransformError as error:
        refusal = str(error)
        forward = adapt(fn, materialize="allow", custom="materialize")
        adapted = _step(forward, params, adapter, args, kwargs, frozen=False)
    frozen = _step(forward, params, adapter, args, kwargs, frozen=True)
    return Steps(adapted, frozen, refusal)


def _step(
    forward: Callable[..., Any],
    params: Any,
    adapter: Adapter,
    args: tuple,
    kwargs: dict,
    *,
    frozen: bool,
) -> Step:
    arrays, rebuild = _arrays_of((adapter, params, args, kwargs))

    def run(seed, train, arrays):
        adapter, params, args, kwargs = rebuild(arrays)

        def loss(train):
            if frozen:
                bound = shifted(bind(params, adapter), adapter.fixed, train)
            else:
                bound = bind(params, Adapter(train, adapter.fixed))
            return _total(forward(bound, *args, **kwargs))

        value, pull = jax.vjp(loss, train)
        return value, pull(seed)[0]

    factors = _marked(adapter)
    train, train_marks = adapter.train, factors.train
    if frozen:
        train = {name: np.zeros((), np.float32) for name in adapter.fixed}
        train_marks = jax.tree.map(lambda _: NONE, train)
    known = _known(params, adapter, factors)
    inputs = jax.tree.map(
        lambda x: known[id(x)] if id(x) in known else _marks_of_input(x), (args, kwargs)
    )
    base = jax.tree.map(lambda _: NONE, params)
    rest, _ = _arrays_of((adapter, params, args, kwargs), (factors, base, *inputs))
    marks = [frozenset({SEED}), *_leaves(train_marks), *rest]
    return Step(run, (np.ones((), np.float32), train, arrays), marks, known)


def _arrays_of(
    tree: Any, instead: Any = None
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and a function that puts others in their places.

    With `instead`, a tree of the same structure, its leaves at the arrays' places.
    """
    leaves, structure = jax.tree.flatten(tree)
    moves = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays):
        moving = iter(arrays)
        pairs = zip(leaves, moves, strict=True)
        new = [next(moving) if move else leaf for leaf, move in pairs]
        return jax.tree.unflatten(structure, new)

    found = leaves if instead is None else _leaves(instead)
    return [x for x, move in zip(found, moves, strict=True) if move], rebuild


def _leaves(marks: Any) -> list[Marks]:
    return jax.tree.leaves(marks, is_leaf=lambda x: isinstance(x, frozenset))


def _marked(adapter: Adapter) -> Adapter:
    """The adapter's tree with marks in place of its arrays."""

    def mark(site, name):
        kind = name.removesuffix("0")
        return frozenset({Part(site, kind)}) if kind in ("a", "b") else NONE

    train: Any = {
        site: {name: mark(site, name) for name in parts}
        for site, parts in adapter.train.items()
    }
    fixed = {
        site: Fixed(values.role, {name: mark(site, name) for name in values})
        for site, values in adapter.fixed.items()
    }
    return Adapter(train, fixed)


def _known(params: Any, adapter: Adapter, factors: Adapter) -> dict[int, Marks]:
    """The marks of the arrays of params and adapter, wherever else they come in.

    A function may close over them, or take them as a further argument.
    """
    known = {id(x): NONE for x in jax.tree.leaves(params)}
    known |= dict(zip(map(id, jax.tree.leaves(adapter)), _leaves(factors), strict=True))
    return {
        key: marks
        for x in jax.tree.leaves((params, adapter))
        if isinstance(x, jax.Array | np.ndarray)  # one type may stand for many arrays
        for key, marks in [(id(x), known[id(x)])]
    }


def _marks_of_input(value: Any) -> Marks:
    # A number, such as a scale or a position, makes no activation of a weight.
    return frozenset({DATA}) if np.ndim(value) else NONE


def _total(out: Any) -> jax.Array:
    """The loss: `out` itself if it is a number, else the sum of what is floating."""
    floating = [
        leaf
        for leaf in jax.tree.leaves(out)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if not floating:
        raise AuditError(
            "`fn` returns nothing floating, so it has no gradient to audit. Audit the "
            "loss, or the function that returns the logits."
        )
    return sum(
        (leaf.astype(jnp.float32).sum() for leaf in floating),
        jnp.zeros((), jnp.float32),
    )
