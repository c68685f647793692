"""`Step`: what a rule for following tokens is given, and how it answers."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ._stretches import Axes, Axis, Lost, join


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a value; `()` for one that is no array, such as a token."""
    return tuple(getattr(atom.aval, "shape", ()))


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation without a body, and what runs along the axes of its operands."""

    eqn: Any
    operands: list[Axes]
    source: str

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def axes(self) -> Axes:
        """Of the first operand."""
        return self.operands[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first operand."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape_of(atom) for atom in self.eqn.invars]

    @property
    def results(self) -> list[tuple[int, ...]]:
        return [shape_of(var) for var in self.eqn.outvars]

    def lose(self, reason: str) -> Lost:
        return Lost(f"`{self.eqn.primitive.name}`: {reason}", self.source)

    def join(self, *axes: Axis) -> Axis:
        return join(axes, self.lose)

    def drop(self, axis: Axis, reason: str) -> Axis:
        """What is left of an axis whose order the primitive does not keep."""
        return axis if axis == () or isinstance(axis, Lost) else self.lose(reason)

    def lost(self, reason: str = "what it does is not known") -> list[Axes]:
        """All that the results may hold, lost: nothing where nothing was followed."""
        enters = any(axis != () for axes in self.operands for axis in axes)
        lost = self.lose(reason) if enters else ()
        return [tuple(lost if n > 1 else () for n in shape) for shape in self.results]

    def kept(self, axes: Iterable[Axis]) -> list[Axes]:
        """The same for each result, of which one entry alone needs no following."""
        axes = tuple(axes)
        return [
            tuple(axis if n > 1 else () for axis, n in zip(axes, shape, strict=True))
            for shape in self.results
        ]


Rule = Callable[[Step], list[Axes]]


def without(axes: Sequence[Axis], dropped: Iterable[int]) -> list[Axis]:
    """The axes that are not dropped."""
    gone = {int(i) % len(axes) for i in dropped} if axes else set()
    return [axis for i, axis in enumerate(axes) if i not in gone]
