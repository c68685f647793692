"""The evaluation loop: a jaxpr on adapted weights, building none of them."""

import contextvars
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._errors import TransformError
from ..adapters import Adapted
from ..structure import Unstructured
from . import _jaxpr
from ._notes import Note, consuming, noting, take
from ._options import Options
from ._registry import RULES, Operand


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
    ) -> "Inner":
        """Traces an inner jaxpr again, with weights among its operands.

        Args:
            jaxpr: the inner jaxpr, closed or open.
            operands: a value or type for each of its inputs; weights among them.
            drop: results that the new jaxpr does without.
        """
        return retrace(jaxpr, operands, self.options, drop)


@dataclasses.dataclass(frozen=True)
class Inner:
    """An inner jaxpr that was traced again, with weights among its operands.

    Attributes:
        jaxpr: the new closed jaxpr. Its inputs are the leaves of the operands, its
            results the leaves of `kinds`, then those of `notes`.
        kinds: the results as types, weights among them.
        notes: the notes that terms take inside, as types.
    """

    jaxpr: Any
    kinds: list[Any]
    notes: list[Note]

    def results(self, flat: Sequence[Any]) -> list[Any]:
        """What the call of the jaxpr gave, as arrays and weights; its notes are taken.

        Of a scan, each note has entries for all of its steps.
        """
        structure = jax.tree.structure((self.kinds, self.notes))
        outs, notes = jax.tree.unflatten(structure, flat)
        take(*notes)
        return outs


def retrace(
    jaxpr: Any, operands: Sequence[Any], options: Options, drop: tuple[int, ...] = ()
) -> Inner:
    """`Run.retrace` outside of a run."""
    return traced(_body(jaxpr, options, drop), *operands)


def traced(body: Callable[..., Any], *operands: Any) -> Inner:
    """A body that returns `(results, notes)`, traced on operands."""
    jaxpr, (kinds, notes) = body(*operands)
    return Inner(jaxpr, kinds, notes)


@_jaxpr.keyed_by_jaxpr
def _body(jaxpr: Any, options: Options, drop: tuple[int, ...]):
    """One traced function for each inner jaxpr.

    JAX's own cache then finds the trace again by the types of the operands.
    """

    def body(*operands):
        inner, consts = _jaxpr.closed(jaxpr())
        with noting() as notes:
            outs = interpret(inner, consts, operands, options)
        return [out for i, out in enumerate(outs) if i not in drop], notes

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

    with consuming(eqn, other, run.producer):
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
