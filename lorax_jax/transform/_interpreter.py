"""`adapt`: runs a function on adapted weights, building none of them."""

import contextvars
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .. import _paths
from .._errors import TransformError
from ..adapters import Adapted, Origin, is_weight
from ..structure import Unstructured
from . import _jaxpr
from ._registry import RULES, Operand


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user allows; see `adapt`."""

    materialize: frozenset[str] | bool = False
    custom: str = "error"

    def may_materialize(self, primitive: str) -> bool:
        """Whether a dense weight may be built at this primitive."""
        if isinstance(self.materialize, bool):
            return self.materialize
        return primitive in self.materialize


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluation of a jaxpr: what rules need beside the equation.

    Attributes:
        options: what the user allows.
        producer: finds the equation that made a variable of this jaxpr, or `None`.
    """

    options: Options
    producer: Callable[[Any], Any]

    def retrace(
        self, jaxpr: Any, operands: Sequence[Any], drop: tuple[int, ...] = ()
    ) -> tuple[Any, list[Any]]:
        """Traces an inner jaxpr again, with weights among its operands.

        Args:
            jaxpr: the inner jaxpr, closed or open.
            operands: a value or type for each of its inputs; weights among them.
            drop: results that the new jaxpr does without.

        Returns:
            The new closed jaxpr, whose inputs are the leaves of `operands`, and the
            results as types, weights among them.
        """
        return retrace(jaxpr, operands, self.options, drop)


def retrace(
    jaxpr: Any, operands: Sequence[Any], options: Options, drop: tuple[int, ...] = ()
) -> tuple[Any, list[Any]]:
    """`Run.retrace` outside of a run."""
    return _body(jaxpr, options, drop)(*operands)


@_jaxpr.keyed_by_jaxpr
def _body(jaxpr: Any, options: Options, drop: tuple[int, ...]):
    """One traced function for each inner jaxpr.

    JAX's own cache then finds the trace again by the types of the operands.
    """

    def body(*operands):
        inner, consts = _jaxpr.closed(jaxpr())
        outs = interpret(inner, consts, operands, options)
        return [out for i, out in enumerate(outs) if i not in drop]

    return _jaxpr.trace(body)


def interpret(
    jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any], options: Options
) -> list[Any]:
    """Evaluates `jaxpr` on operands among which are adapted weights.

    Equations that no weight enters are evaluated as they stand. Where one does, the
    rule for the primitive decides.
    """
    env: dict[Any, Any] = {}
    makers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    run = Run(options, lambda atom: None if _literal(atom) else makers.get(atom))

    def read(atom):
        return atom.val if _literal(atom) else env[atom]

    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))
    last = _last_uses(jaxpr)
    for index, eqn in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in eqn.invars]
        with _jaxpr.eqn_scope(eqn):
            if any(isinstance(value, Adapted) for value in values):
                eqn, used = _as_read(jaxpr, index)
                values = [v for v, use in zip(values, used, strict=True) if use]
                results = _with_weight(run, eqn, values)
            else:
                results = _jaxpr.bind(eqn, values)
        env.update(zip(eqn.outvars, results, strict=True))
        for dead in last.get(index, ()):
            env.pop(dead, None)
    return [read(atom) for atom in jaxpr.outvars]


_literal = _jaxpr.is_literal


@_jaxpr.keyed_by_jaxpr
def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """For each equation, the variables that nothing reads after it."""
    jaxpr = jaxpr()
    seen = {atom for atom in jaxpr.outvars if not _literal(atom)}
    last: dict[int, list[Any]] = {}
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        for atom in (*eqn.invars, *eqn.outvars):
            if not _literal(atom) and atom not in seen:
                seen.add(atom)
                last.setdefault(index, []).append(atom)
    return last


@_jaxpr.keyed_by_jaxpr
def _as_read(jaxpr: Any, index: int) -> tuple[Any, Sequence[bool]]:
    """An equation less the results that nothing reads, and which operands it takes.

    Such a result may be a weight in a form that has no factors. `nnx.scan`, for one,
    stacks the state of every layer again, weights that did not change among it.
    """
    jaxpr = jaxpr()
    eqn = jaxpr.eqns[index]
    dead = _last_uses(jaxpr).get(index, ())
    unread = [v in dead for v in eqn.outvars]
    if not any(unread) or all(unread):
        return eqn, [True] * len(eqn.invars)
    return _jaxpr.without_results(eqn, unread)


# Where in the user's program the innermost enclosing call stands: equations inside a
# function of JAX's own (`jnp.sort`, say) know no line of the user's.
_enclosing: contextvars.ContextVar[str] = contextvars.ContextVar("source", default="")


def source(eqn: Any) -> str:
    """The line of the user's program that an equation comes from."""
    return _jaxpr.source(eqn) or _enclosing.get() or "(unknown line)"


def _with_weight(run: Run, eqn: Any, values: list[Any]) -> list[Any]:
    token = _enclosing.set(source(eqn))
    try:
        return _by_rule(run, eqn, values)
    finally:
        _enclosing.reset(token)


def _by_rule(run: Run, eqn: Any, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    rule = RULES.get(name)
    reason = f"no rule covers `{name}`"
    try:
        if rule is not None and rule.apply is not None:
            return rule.apply(run, eqn, values)
        if rule is not None and rule.read is not None:
            return _consumed(run, rule, eqn, values)
        if rule is not None:
            return _structural(run, rule, eqn, values)
    except Unstructured as error:
        reason = str(error)
    opened = [v.opened() if isinstance(v, Adapted) else v for v in values]
    if any(new is not old for new, old in zip(opened, values, strict=True)):
        if any(isinstance(value, Adapted) for value in opened):
            return _by_rule(run, eqn, opened)
        return _jaxpr.bind(eqn, opened)
    if run.options.may_materialize(name):
        return _jaxpr.bind(eqn, [dense(value) for value in values])
    raise TransformError(_refusal(eqn, values, reason))


def _consumed(run: Run, rule: Any, eqn: Any, values: list[Any]) -> list[Any]:
    at = [i for i, value in enumerate(values) if isinstance(value, Adapted)]
    if len(at) > 1:
        raise Unstructured("several of its operands are adapted weights")
    weight: Adapted = values[at[0]]
    op, other = rule.read(Operand(eqn, at[0], weight.shape, values, run.producer))

    def product(x):
        operands = [weight.base if v is weight else v for v in values]
        operands[other] = x
        return _jaxpr.bind(eqn, operands)[0]

    return [weight.consume(values[other], op, product)]


def _structural(run: Run, rule: Any, eqn: Any, values: list[Any]) -> list[Any]:
    at = [i for i, value in enumerate(values) if isinstance(value, Adapted)]
    if len(at) > 1:
        raise Unstructured("two adapted weights enter one elementwise operation")
    weight: Adapted = values[at[0]]
    operand = Operand(eqn, at[0], weight.shape, values, run.producer)
    described = rule.axes(operand)
    if not weight.is_packed:
        bases = _jaxpr.bind(eqn, [v.base if v is weight else v for v in values])
        return [weight.apply(b, *ops) for b, ops in zip(bases, described, strict=True)]
    results = [weight.apply(None, *ops) for ops in described]
    for result, var in zip(results, eqn.outvars, strict=True):
        if tuple(result.shape) != var.aval.shape:
            raise Unstructured("a packed weight gets an axis that nothing runs along")
    return results


def dense(value: Any) -> Any:
    """`value`, built as one array where it is an adapted weight."""
    return value.dense() if isinstance(value, Adapted) else value


def _refusal(eqn: Any, values: Sequence[Any], reason: str) -> str:
    weights = [v for v in values if isinstance(v, Adapted)]
    paths = [weight.origin.path or "?" for weight in weights]
    name = eqn.primitive.name
    what, way = "an adapted weight in factored form", "Leave it out of the targets"
    if not any(weight.terms for weight in weights):
        what, way = "a packed weight as it is", "Keep it dense"
    return (
        f"`{name}` cannot use {what}: {reason}.\n"
        f"  weight  {', '.join(paths)}, shape {weights[0].shape}\n"
        f"  at      {source(eqn)}\n"
        f"{way}, or allow the dense matrix to be built "
        f"here:  adapt(fn, materialize=({name!r},))"
    )


# --------------------------------------------------------------------------------------


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
        dynamic = [_is_dynamic(leaf) for leaf in leaves]
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


def allowed(materialize: str | Iterable[str], custom: str) -> Options:
    """The options that `adapt`'s arguments of these names mean."""
    if custom not in ("error", "primal", "materialize"):
        raise TransformError(
            f"`custom` = {custom!r}; one of 'error', 'primal', 'materialize' is meant."
        )
    if isinstance(materialize, str) and materialize in ("error", "allow"):
        return Options(materialize == "allow", custom)
    names = (materialize,) if isinstance(materialize, str) else materialize
    if isinstance(names, bool) or not isinstance(names, Iterable):
        raise TransformError(
            f"`materialize` = {names!r}; 'error', 'allow' or the names of primitives "
            "are meant, as in `materialize=('sort',)`."
        )
    names = frozenset(names)
    for name in names:
        if difflib.get_close_matches(name, ("error", "allow"), cutoff=0.7):
            raise TransformError(
                f"`materialize` names a primitive {name!r}. Is 'error' or 'allow' "
                "meant?"
            )
    return Options(names, custom)


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


def _is_dynamic(leaf: Any) -> bool:
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
