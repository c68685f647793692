"""Kernels of convolutions: their A and B as PEFT has them.

    A  (rank, d_in, *window)
    B  (d_out, rank, 1, ..., 1)

Everywhere else here A is a matrix, `(rank, inputs)`, its inputs flattened in the order
of our kernel's axes. An *order* takes one to the other: for each axis of their A behind
the rank, which of our input axes it is.
"""

import math

import numpy as np

from .._errors import CheckpointError
from .._names import Layout
from ._factors import Matrices
from ._record import Part

Order = tuple[int, ...]
Shape = tuple[int, ...]


def order_of(layout: Layout | None, part: Part, path: str) -> Order | None:
    """The order of a kernel of a convolution, or `None` for a matrix.

    Args:
        layout: what the name table says of it.
        part: the roles of our axes.
        path: the kernel's path, for messages.

    Raises:
        CheckpointError: if the table calls it a convolution's, and our axes are not
            `(*window, d_in, d_out)`.
    """
    last = len(part.shape) - 1
    if layout == "conv":
        if (*part.inputs, *part.outputs) != tuple(range(last + 1)) or last < 2:
            raise CheckpointError(
                f"`names` calls {path!r} a convolution's kernel, which has the axes "
                "(*window, d_in, d_out) here, and the roles of its axes are others: "
                f"inputs {part.inputs}, outputs {part.outputs} of shape {part.shape}. "
                "A kernel that lies as torch has it is 'same'."
            )
        return order_in("conv", last)
    if layout == "same" and (*part.outputs, *part.inputs) == tuple(range(last + 1)):
        return order_in("same", last)
    return None


def order_in(layout: Layout | None, inputs: int) -> Order | None:
    """The order of a kernel with so many input axes, by what the table says of it."""
    if inputs < 2 or layout not in ("conv", "same"):
        return None
    axes = tuple(range(inputs))
    return axes if layout == "same" else (axes[-1], *axes[:-1])


def part_in(order: Order) -> Part:
    """The axes of a kernel, read off its order alone."""
    axes = tuple(range(len(order) + 1))
    if order[0] == 0:
        return Part((), axes[1:], axes[:1])
    return Part((), axes[:-1], axes[-1:])


def shapes(order: Order, inputs: Shape, d_out: int, rank: int) -> tuple[Shape, Shape]:
    """Shapes of their A and B, for sizes of our input axes.

    >>> shapes((2, 0, 1), (3, 5, 4), 6, rank=2)
    ((2, 4, 3, 5), (6, 2, 1, 1))
    """
    down = (rank, *(inputs[axis] for axis in order))
    return down, (d_out, rank, *(1,) * (len(order) - 1))


def to_theirs(order: Order, inputs: Shape, matrices: Matrices) -> Matrices:
    """Their A and B of our matrices."""
    down, up = matrices
    down = down.reshape(len(down), *inputs)
    down = down.transpose(0, *(1 + axis for axis in order))
    up = up.reshape(*up.shape, *(1,) * (len(order) - 1))
    return np.ascontiguousarray(down), up


def to_ours(order: Order, matrices: Matrices) -> Matrices:
    """Our matrices of their A and B."""
    down, up = matrices
    down = down.transpose(0, *(1 + order.index(axis) for axis in range(len(order))))
    return down.reshape(len(down), -1), up.reshape(up.shape[:2])


def check_groups(module: str, down: Shape, up: Shape) -> None:
    """Refuses PEFT's adapter of a grouped convolution.

    Raises:
        CheckpointError: if the rank is divided among groups.
    """
    if len(down) > 2 and len(up) == len(down) and up[1] != down[0]:
        groups = down[0] / up[1] if up[1] else math.inf
        raise CheckpointError(
            f"{module!r} is a convolution in {groups:g} groups: PEFT's A sees all "
            "channels, and each group's outputs take a part of the rank. A kernel of "
            "such a convolution sees its own group's channels alone, so what the file "
            "adds is no change of the weight, and PEFT cannot merge it either. Train "
            "it anew here, where every group has an A and a B."
        )
