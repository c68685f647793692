"""`Probe`: what a walk knows of a weight, axis by axis."""

import dataclasses
from typing import Any

from ..structure import AxisOp, Broadcast, Pick, Reshape, Transpose
from ._consumers import Consumer, Leaf


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a leaf has become after some structure-only operations.

    Attributes:
        leaf: the leaf's path.
        axes: for each axis of the value, the leaf's axes that it is made of.
        chosen: leaf's axes of which indices have chosen entries: rows of a table, or
            experts, or a permutation of what a product will consume. Which, only the
            consumer tells.
        routed: whether those indices depend on an input of the function.
        rows: how the leaf is consumed if what was chosen are rows of a table.
    """

    leaf: str
    axes: tuple[frozenset[int], ...]
    chosen: frozenset[int] = frozenset()
    routed: bool = False
    rows: Consumer | None = None

    def apply(self, op: AxisOp) -> "Probe":
        """What the leaf becomes under one more operation."""
        axes = self.axes
        match op:
            case Transpose(permutation):
                axes = tuple(axes[i] for i in permutation)
            case Broadcast(positions, shape):
                new = [frozenset()] * len(shape)
                for old, position in enumerate(positions):
                    new[position] = axes[old]
                axes = tuple(new)
            case Pick(picked, _, ids, kept):
                new = [frozenset()] * (
                    1 + max((*ids, *(j for _, j in kept)), default=-1)
                )
                for i in ids:
                    new[i] = frozenset().union(*(axes[axis] for axis in picked))
                for i, j in kept:
                    new[j] = axes[i]
                axes = tuple(new)
            case Reshape(groups):
                count = 1 + max((i for g in groups for i in g.new), default=-1)
                new = [frozenset()] * count
                for group in groups:
                    whole = frozenset().union(*(axes[i] for i in group.old))
                    for i in group.new:
                        new[i] = whole
                axes = tuple(new)
        return dataclasses.replace(self, axes=axes)

    def pad(self, ndim: int) -> "Probe":
        """The probe with as many axes as the value has; new ones come last."""
        missing = (frozenset(),) * (ndim - len(self.axes))
        return dataclasses.replace(self, axes=self.axes + missing)


Probes = tuple[Probe, ...]


def whole(leaf: Leaf) -> Probes:
    """The value of a parameter before anything has happened to it."""
    return (Probe(leaf.path, tuple(frozenset([i]) for i in range(len(leaf.shape)))),)


def is_weight(value: Any) -> bool:
    """Whether a value of the walk is a weight, and no plain array."""
    return isinstance(value, tuple)
