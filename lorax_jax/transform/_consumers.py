"""What a trace notes about a parameter: who consumes it, and how."""

import dataclasses
from typing import Literal

from ..structure import AxisRole


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One way in which the model consumes a weight.

    Attributes:
        kind: `"product"`, `"lookup"`, or `"other"` for an operation with no low-rank
            form, such as adding a bias.
        axes: the role of each of the leaf's axes.
        primitive: the operation.
        source: its line in the model.
        problem: why the axes have no single role, or the operation no low-rank form;
            or `None`.
        groups: in how many runs its outputs see inputs of their own.
    """

    kind: Literal["product", "lookup", "other"]
    axes: tuple[AxisRole, ...] = ()
    primitive: str = ""
    source: str = dataclasses.field(default="", compare=False)
    problem: str | None = None
    groups: int = 1


@dataclasses.dataclass
class Leaf:
    """What the trace found out about one parameter.

    Attributes:
        path: its path.
        shape: its shape.
        consumers: how it is consumed, in program order, without repetitions.
        heads: which consumers' products alone make a result of the function, with no
            other weight behind or beside them.
        stacks: its axes that are read a layer at a time, each with the depth in the
            path at which the stack lives.
        stopped: whether a `stop_gradient` lies on its way.
    """

    path: str
    shape: tuple[int, ...]
    consumers: list[Consumer] = dataclasses.field(default_factory=list)
    heads: set[Consumer] = dataclasses.field(default_factory=set)
    stacks: dict[int, int] = dataclasses.field(default_factory=dict)
    stopped: bool = False

    def of_kind(self, kind: str) -> list[Consumer]:
        """The consumers of one kind."""
        return [consumer for consumer in self.consumers if consumer.kind == kind]

    def size(self, consumer: Consumer, role: AxisRole) -> int:
        """Number of entries along the axes that have `role` for `consumer`."""
        size = 1
        for n, r in zip(self.shape, consumer.axes, strict=True):
            size *= n if r == role else 1
        return size


# What a plain array depends on: consumers with no other weight between it and them, and
# `INPUT` if it depends on the function's inputs at all.
Flow = frozenset[tuple[str, Consumer]]
INPUT = ("", Consumer("other"))
