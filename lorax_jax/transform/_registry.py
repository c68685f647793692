"""Which rule handles which primitive."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..structure import AxisOp, Bilinear, Unstructured

# "native": consumes an adapted weight in factored form.
# "passes": leaves the weight symbolic.
# "enters": goes into inner jaxprs with it.
# "refuses": there is no factored form, and the note says why.
Policy = Literal["native", "passes", "enters", "refuses"]


@dataclasses.dataclass(frozen=True)
class Operand:
    """A weight as an operand of an equation: what a structural rule sees.

    Attributes:
        eqn: the equation.
        at: the position of the weight among the operands.
        shape: the weight's shape.
        values: what all operands are, or `None`s where only types are known.
        producer: finds the equation that made an operand, or `None`.
    """

    eqn: Any
    at: int
    shape: tuple[int, ...]
    values: Sequence[Any]
    producer: Callable[[Any], Any]

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of the equation's first result."""
        return self.eqn.outvars[0].aval.shape


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the transform does at one primitive.

    Attributes:
        policy: see `Policy`.
        apply: `apply(run, eqn, operands)` gives the results; `None` where one of the
            following describes the rule completely.
        axes: `axes(operand)` gives what a structure-only operation does to the weight's
            axes, for each result that is a weight.
        read: `read(operand)` gives the operation that consumes the weight, and the
            position of its other operand.
        note: a few words for the table in the README of this folder.
        module: the rule's file.
    """

    policy: Policy
    apply: Callable[..., list[Any]] | None
    axes: Callable[[Operand], list[tuple[AxisOp, ...]]] | None
    read: Callable[[Operand], tuple[Bilinear, int]] | None
    note: str
    module: str


RULES: dict[str, Rule] = {}


def rule(*primitives: str, policy: Policy, note: str):
    """Registers `fn(run, eqn, operands) -> results` for some primitives."""

    def register(fn):
        for name in primitives:
            RULES[name] = Rule(policy, fn, None, None, note, fn.__module__)
        return fn

    return register


def structural(*primitives: str, note: str):
    """Registers `fn(operand) -> [(axis operations), ...]`, a tuple for each result.

    The equation itself runs on a dense base; the axis operations are for everything
    else that a weight is made of. Raise `Unstructured` where the operation has no such
    description.
    """

    def register(fn):
        for name in primitives:
            RULES[name] = Rule("passes", None, fn, None, note, fn.__module__)
        return fn

    return register


def consumer(*primitives: str, note: str):
    """Registers `fn(operand) -> (Bilinear, position of x)` for consuming operations.

    The equation itself runs on a dense base; everything else that a weight is made of
    acts through the `Bilinear`. Raise `Unstructured` where there is none.
    """

    def register(fn):
        for name in primitives:
            RULES[name] = Rule("native", None, None, fn, note, fn.__module__)
        return fn

    return register


def refused(*primitives: str, reason: str, module: str) -> None:
    """Registers primitives that can have no rule, and why.

    A primitive that nobody has thought of is refused as well; these have been.
    """

    def refuse(run, eqn, operands):
        raise Unstructured(reason)

    for name in primitives:
        RULES[name] = Rule("refuses", refuse, None, None, reason, module)
