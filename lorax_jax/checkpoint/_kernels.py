"""Kernels of convolutions: their tensors as PEFT has them.

    A            (rank, d_in, *window)
    B            (d_out, rank, 1, ..., 1)
    bias of B    (d_out,)
    magnitude    (1, d_out, 1, ..., 1)
    kernel       (d_out, d_in, *window)      where it is trained whole

Everywhere else here A is a matrix, `(rank, inputs)`, its inputs flattened in the order
of our kernel's axes. An *order* takes one to the other: for each axis of their A behind
the rank, which of our input axes it is.
"""

import math
from collections.abc import Mapping

import numpy as np

from .._errors import CheckpointError
from .._names import Layout
from ._arrays import Tensors
from ._file_site import Part

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


def shapes(
    order: Order, inputs: Shape, matrices: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Shapes of their tensors.

    Args:
        order: see above.
        inputs: sizes of our input axes.
        matrices: shapes of our tensors of the site.

    >>> shapes((2, 0, 1), (3, 5, 4), {"a": (2, 60), "b": (6, 2)})
    {'a': (2, 4, 3, 5), 'b': (6, 2, 1, 1)}
    """
    ones = (1,) * (len(order) - 1)
    rank = matrices["a"][-2]
    found = dict(matrices)
    found["a"] = (rank, *(inputs[axis] for axis in order))
    found["b"] = (*matrices["b"][-2:], *ones)
    if "magnitude" in matrices:
        found["magnitude"] = (1, *matrices["magnitude"], *ones)
    return found


def to_theirs(order: Order, inputs: Shape, tensors: Tensors) -> Tensors:
    """Their tensors of our tensors of a site."""
    down = tensors["a"].reshape(-1, *inputs)
    down = down.transpose(0, *(1 + axis for axis in order))
    found = tensors | {"a": np.ascontiguousarray(down)}
    for name, shape in shapes(order, inputs, _shapes_of(tensors)).items():
        found[name] = found[name].reshape(shape)
    return found


def to_ours(order: Order, tensors: Tensors) -> Tensors:
    """Our tensors of theirs."""
    down, up = tensors["a"], tensors["b"]
    down = down.transpose(0, *(1 + order.index(axis) for axis in range(len(order))))
    found = tensors | {"a": down.reshape(len(down), -1), "b": up.reshape(up.shape[:2])}
    if "magnitude" in found:
        found["magnitude"] = found["magnitude"].reshape(-1)
    return found


def is_turned(layout: Layout | None, axes: int) -> bool:
    """Whether a tensor of so many axes is `turned` from our leaf of this layout."""
    return (layout == "linear" and axes == 2) or (layout == "conv" and axes >= 2)


def turned(leaf: np.ndarray) -> np.ndarray:
    """`(d_out, d_in, *window)` of our `(*window, d_in, d_out)`."""
    last = leaf.ndim - 1
    return leaf.transpose(last, last - 1, *range(last - 1))


def turned_back(tensor: np.ndarray) -> np.ndarray:
    """`(*window, d_in, d_out)` of their `(d_out, d_in, *window)`."""
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def shape_turned(shape: Shape) -> Shape:
    """The shape of our leaf `turned`.

    >>> shape_turned((3, 5, 4, 8)), shape_turned((4, 8))
    ((8, 4, 3, 5), (8, 4))
    """
    return (*shape[:-3:-1], *shape[:-2])


def shape_turned_back(shape: Shape) -> Shape:
    """Undoes `shape_turned`."""
    return (*shape[2:], shape[1], shape[0])


def _shapes_of(tensors: Tensors) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in tensors.items()}


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
