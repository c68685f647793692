"""Sites, and the weights that hold them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from ..adapters import Role, named
from ..structure import Use


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where an adapter acts: a path, a part of the leaf there, and a use.

    Of a fused leaf that holds several weights, `role.part` says which one it is.

    Attributes:
        path: the path; for a layer of a stack its virtual path, as an unrolled model
            would have it (`layers/3/attn/q_proj/kernel`).
        leaf: the path of the leaf that holds it (`layers/attn/q_proj/kernel`).
        part: pairs (axis, index) that pick the site out of the leaf; empty for a
            whole leaf. Axes are those of `role`.
        use: the only use of a tied weight that is adapted, or `None`.
        shape: shape of the part.
        role: roles of the leaf's axes.
        rank: columns of A.
        alpha: numerator of the scale.
        scale: the multiplier of `A B`.
        rule: the pattern that matched.
        init: how A and B start.
        dropout: probability of dropping an input of A.
        trainable: number of trainable values.
        frozen: which of `a` and `b` is never trained.

    A leaf that is trained whole, and rows of a table, have no rank: it is 0.
    """

    path: str
    leaf: str
    part: tuple[tuple[int, int], ...]
    use: Use | None
    shape: tuple[int, ...]
    role: Role
    rank: int
    alpha: float
    scale: float
    rule: str
    init: str | bool
    dropout: float
    trainable: int
    frozen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The path, and what tells it from other sites there: `h/0/qkv@q`."""
        return named(self.path, self.role.suffix)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The arrays of one adapted leaf, or part of one: its sites, padded to one rank.

    Attributes:
        role: roles of the leaf's axes.
        shape: the leaf's shape.
        dtype: the leaf's dtype.
        sites: one for each index of the stacked axes, in row-major order; `None` where
            a layer is not adapted. A leaf that is no stack has one site.
        bias: whether B has a bias.
        ids: the trained rows of a table, ascending.
    """

    role: Role
    shape: tuple[int, ...]
    dtype: Any
    sites: tuple[Site | None, ...]
    bias: bool = False
    ids: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """Key of the leaf in an adapter's dictionaries."""
        return self.role.name

    @property
    def rank(self) -> int:
        """The largest rank: what the arrays are padded to."""
        return max(site.rank for site in self.sites if site is not None)

    @property
    def layers(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self.role.sizes(self.shape, self.role.stacked)

    @property
    def experts(self) -> tuple[int, ...]:
        """Sizes of the batch axes that are no stacks."""
        return self.role.sizes(self.shape, self.role.batch[self.role.stack :])

    @property
    def inputs(self) -> tuple[int, ...]:
        """Sizes of the axes that A runs along."""
        return self.role.sizes(self.shape, self.role.inputs)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Sizes of the axes that B runs along."""
        return self.role.sizes(self.shape, self.role.outputs)

    @property
    def adapted(self) -> tuple[int, ...]:
        """Positions of the sites that are there."""
        return tuple(i for i, site in enumerate(self.sites) if site is not None)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Which of `a` and `b` is never trained, in any layer."""
        return next(site.frozen for site in self.sites if site is not None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that are trained."""
        if self.role.kind == "rows":
            return {"rows": (len(self.ids), *self.outputs)}
        if self.role.kind == "whole":
            if len(self.adapted) == len(self.sites):
                return {"whole": self.shape}
            (axis,) = self.role.stacked
            before, behind = self.shape[:axis], self.shape[axis + 1 :]
            return {"whole": (*before, len(self.adapted), *behind)}
        outputs = (*self.layers, *self.experts, *self.outputs)
        found = {"a": self.shape_a(), "b": self.shape_b()}
        for name in self.frozen:
            del found[name]
        if self.bias:
            found["bias"] = outputs
        if self.role.kind == "dora":
            found["magnitude"] = outputs
        return found

    def shape_a(self) -> tuple[int, ...]:
        """Shape of the array `a`."""
        return self.role.shapes(self.shape, self.rank)[0]

    def shape_b(self) -> tuple[int, ...]:
        """Shape of the array `b`."""
        return self.role.shapes(self.shape, self.rank)[1]

    @property
    def apart(self) -> tuple[int, ...]:
        """Sizes of what has matrices of its own within a layer: experts and groups."""
        return (*self.experts, *self.role.grouped)

    @property
    def sides(self) -> tuple[int, int]:
        """`(d_in, d_out)` of those matrices."""
        return math.prod(self.inputs), math.prod(self.outputs) // self.role.groups

    def matrices(self, a: Any, b: Any) -> tuple[Any, Any]:
        """The arrays `a` and `b` as matrices, on the host or on a device.

        Returns:
            Arrays `(sites, *apart, d_in, rank)` and `(sites, *apart, rank, d_out)`.
        """
        count, rank = len(self.sites), a.shape[-1]
        d_in, d_out = self.sides
        if not self.role.grouped:
            return (
                a.reshape(count, *self.apart, d_in, rank),
                b.reshape(count, *self.apart, rank, d_out),
            )
        groups = self.role.groups
        a = a.reshape(count, *self.experts, d_in, groups, rank)
        b = b.reshape(count, *self.experts, rank, groups, d_out)
        return a.swapaxes(-2, -3), b.swapaxes(-2, -3)

    def arrays(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Undoes `matrices`."""
        if self.role.grouped:
            a, b = a.swapaxes(-2, -3), b.swapaxes(-2, -3)
        rank = a.shape[-1]
        shape_a, shape_b = self.role.shapes(self.shape, rank)
        return a.reshape(shape_a), b.reshape(shape_b)


def parameters(
    role: Role,
    shape: tuple[int, ...],
    rank: int,
    vectors: int = 0,
    frozen: tuple[str, ...] = (),
) -> int:
    """Trainable values of one site at `rank`.

    `rank * (d_in + d_out)` for each expert; with groups, `d_in` for each of them.
    `vectors` counts what is as long as the outputs: a bias of B, a magnitude. Of what
    is `frozen` nothing counts.
    """
    inputs = math.prod(role.sizes(shape, role.inputs))
    outputs = math.prod(role.sizes(shape, role.outputs))
    experts = math.prod(role.sizes(shape, role.batch[role.stack :]))
    a = 0 if "a" in frozen else role.groups * inputs
    b = 0 if "b" in frozen else outputs
    return experts * (rank * (a + b) + vectors * outputs)


def part_indices(role: Role, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Every index into the stacked axes, in row-major order."""
    return itertools.product(*(range(n) for n in role.sizes(shape, role.stacked)))
