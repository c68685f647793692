"""`follow`: where the tokens of an input are in every array of a jaxpr.

An abstract interpretation: no shape is compared with another. Each axis of each value
carries the stretches of the followed axes that run along it, or that their order was
lost, and where.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from .._errors import FollowError
from . import _jaxpr
from ._follow_inner import INNER
from ._follow_rules import RULES
from ._follow_step import Step, shape_of
from ._stretches import Axes, Axis, Lost, Shard, entire


class Followed:
    """What runs along the axes of every array of a jaxpr.

    Attributes:
        results: for each result of the jaxpr, what runs along its axes.
    """

    results: list[Axes]

    def __init__(self, jaxpr: Any):
        self.jaxpr = jaxpr  # kept alive, for equations are known by their identity
        self._operands: dict[int, list[Axes]] = {}

    def axes(self, eqn: Any, operand: int, among: Iterable[int] | None = None) -> Axes:
        """What runs along the axes of one operand of an equation.

        Args:
            eqn: an equation of the jaxpr, or of a jaxpr inside of it.
            operand: which of its operands.
            among: the axes that are asked for; by default all.

        Returns:
            For each axis asked for, the stretches that run along it, outermost first;
            `()` where the array is constant or goes along something that was not
            followed. `lay_out` takes them.

        Raises:
            FollowError: if the order along one of them is lost.
        """
        if id(eqn) not in self._operands:
            raise FollowError(
                f"this `{eqn.primitive.name}` is no equation of the jaxpr that was "
                "followed, nor of one inside of it. Ask about the traced equations."
            )
        axes = self._operands[id(eqn)][operand]
        asked = range(len(axes)) if among is None else tuple(among)
        for i in asked:
            if isinstance(lost := axes[i], Lost):
                raise FollowError(
                    f"nothing says which token is where along axis {i} of operand "
                    f"{operand} of `{eqn.primitive.name}`.\n"
                    f"  lost   {lost.reason}\n"
                    f"  at     {lost.source}\n"
                    f"  asked  {_jaxpr.source(eqn) or '(unknown line)'}"
                )
        chosen = tuple(axes[i] for i in asked)
        stretches = [
            one for axis in chosen if not isinstance(axis, Lost) for one in axis
        ]
        if any(isinstance(one.label, Shard) for one in stretches):
            raise FollowError(
                f"`{eqn.primitive.name}` stands inside a `shard_map` that divides the "
                "tokens, so a device sees a part of them only.\n"
                f"  asked  {_jaxpr.source(eqn) or '(unknown line)'}"
            )
        return chosen

    def note(self, eqn: Any, operands: list[Axes]) -> None:
        """Notes what enters an equation; all that enter it must agree."""
        known = self._operands.setdefault(id(eqn), operands)
        if known != operands:
            self._operands[id(eqn)] = [
                tuple(map(_agree, old, new))
                for old, new in zip(known, operands, strict=True)
            ]


def _agree(old: Axis, new: Axis) -> Axis:
    if old == new or isinstance(old, Lost):
        return old
    if isinstance(new, Lost):
        return new
    reason = "one function is called with tokens along other axes, or without them"
    return Lost(reason, "(several calls)")


def follow(jaxpr: Any, starts: Mapping[int, Sequence[Hashable]]) -> Followed:
    """Follows axes of a jaxpr's inputs through all of it.

    Args:
        jaxpr: a closed jaxpr, as `jax.make_jaxpr` gives.
        starts: for some of its inputs, by position, a label for each of its leading
            axes; `None` for one that is not followed. Inputs may share labels.

    Returns:
        A `Followed`.

    Raises:
        FollowError: if there is no such input or axis, or a label has two sizes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def model(w, ids):
        ...     x = w[ids]                          # (batch, seq, width)
        ...     return x.reshape(-1, 4) @ w.T       # (batch * seq, vocabulary)
        >>> jaxpr = jax.make_jaxpr(model)(jnp.ones((9, 4)), jnp.ones((2, 3), int))
        >>> followed = follow(jaxpr, {1: ("batch", "seq")})
        >>> product = next(e for e in jaxpr.eqns if e.primitive.name == "dot_general")
        >>> rows, width = followed.axes(product, 0)
        >>> [(stretch.label, stretch.size) for stretch in rows], width
        ([('batch', 2), ('seq', 3)], ())
    """
    inner, _ = _jaxpr.closed(jaxpr)
    walk = Walk(Followed(jaxpr))
    walk.found.results = walk.inside(jaxpr, _started(inner.invars, starts))
    return walk.found


def _started(invars, starts) -> list[Axes]:
    sizes: dict[Hashable, int] = {}
    operands: list[Axes] = [((),) * len(shape_of(var)) for var in invars]
    for at, labels in starts.items():
        if not 0 <= at < len(invars):
            raise FollowError(
                f"`starts` names input {at}, and the jaxpr has {len(invars)}."
            )
        shape = invars[at].aval.shape
        if len(labels) > len(shape):
            raise FollowError(
                f"`starts` names the axes {tuple(labels)} of input {at}, which has the "
                f"shape {shape}. Give one label for each axis, or for the first ones."
            )
        axes: list[Axis] = [()] * len(shape)
        for i, label in enumerate(labels):
            if label is None:
                continue
            if sizes.setdefault(label, shape[i]) != shape[i]:
                raise FollowError(
                    f"axis {label!r} has {sizes[label]} entries in one input and "
                    f"{shape[i]} in input {at}. Give axes of other sizes other labels."
                )
            axes[i] = entire(label, shape[i])
        operands[at] = tuple(axes)
    return operands


class Walk:
    """One pass over a jaxpr and the jaxprs inside it."""

    def __init__(self, found: Followed):
        self.found = found
        # Whether what enters an equation is noted: not in the first turns of a loop,
        # which know too little of what flows around it.
        self.noting = True
        # Inner jaxprs by what enters them: one that many share is walked once.
        self.known: dict[Any, list[Axes]] = {}
        self.source = ""

    def inside(self, jaxpr: Any, operands: Sequence[Axes]) -> list[Axes]:
        """What runs along the results of a jaxpr, from what does along its inputs."""
        inner, _ = _jaxpr.closed(jaxpr)
        key = id(inner), tuple(operands), self.noting
        if key not in self.known:
            self.known[key] = self._walk(inner, operands)
        return self.known[key]

    def _walk(self, jaxpr: Any, operands: Sequence[Axes]) -> list[Axes]:
        env: dict[Any, Axes] = {}
        for var in jaxpr.constvars:
            env[var] = ((),) * len(shape_of(var))
        env.update(zip(jaxpr.invars, operands, strict=True))

        def read(atom):
            if _jaxpr.is_literal(atom):
                return ((),) * len(shape_of(atom))
            return env[atom]

        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, operands: list[Axes]) -> list[Axes]:
        if self.noting:
            self.found.note(eqn, operands)
        before = self.source
        self.source = _jaxpr.source(eqn) or before
        try:
            name = eqn.primitive.name
            if name in INNER:
                return INNER[name](self, eqn, operands)
            step = Step(eqn, operands, self.source or "(unknown line)")
            return RULES[name](step) if name in RULES else step.lost()
        finally:
            self.source = before
