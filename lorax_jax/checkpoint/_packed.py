"""Factors of a bare parameter, as PEFT packs them.

PEFT takes the parameter for `(d_out, d_in)`, or for `(experts, d_out, d_in)`, or, in a
module whose `is_transposed` is true, for `(experts, d_in, d_out)`. All experts share
two matrices:

    A   (experts * rank, d_in)     an expert's rows lie together
    B   (d_out, rank * experts)    its columns lie apart: the expert counts fastest

It reads that off the order of the axes and not off their use. Where a module uses its
parameter the other way round (the experts of Llama 4), PEFT's A runs along our outputs,
and the two are *mirrored*: its A is our B and its B our A, transposed.

Of several parameters of one module PEFT wraps one after the other, in the order in
which the module lists them, and each wrapper adds `.base_layer` to the keys of those
inside.
"""

import math
from collections.abc import Callable

import numpy as np

from .._errors import CheckpointError
from .._names import NameMap
from ._arrays import Tensors
from ._file_site import BASE_LAYER, Part
from ._layouts import tensor_layout

Shape = tuple[int, ...]


def keys_of(
    module: str, names: NameMap, adapted: Callable[[str], bool]
) -> dict[str, str]:
    """What stands before the endings in the keys of a module's bare parameters.

    Args:
        module: the module.
        names: the model's name table, which lists its parameters in their order.
        adapted: whether the tensor of a name is adapted.

    Returns:
        That by the names of the adapted tensors, the innermost first.

    >>> names = NameMap([("up", "experts.up", "same"), ("d", "experts.down", "same")])
    >>> keys_of("experts", names, lambda tensor: True)
    {'experts.up': 'experts.base_layer', 'experts.down': 'experts'}
    """
    tensors = [tensor for tensor in names.tensors_of(module) if adapted(tensor)]
    depths = reversed(range(len(tensors)))
    return {
        tensor: module + BASE_LAYER * depth
        for tensor, depth in zip(tensors, depths, strict=True)
    }


def is_mirrored(tensor: str, path: str, part: Part, names: NameMap) -> bool:
    """Whether PEFT's A runs along our outputs.

    Args:
        tensor: the parameter's name.
        path: its path.
        part: the roles of our axes.
        names: the model's name table.

    Raises:
        CheckpointError: if PEFT has no way to pack such axes.
    """
    layout = names.layout(path)
    theirs = None if layout in (None, "conv") else tensor_layout(layout, part)
    if theirs is None or len(part.batch) > 1:
        raise CheckpointError(
            f"{path!r} of shape {part.shape} has the inputs {part.inputs}, the outputs "
            f"{part.outputs} and the experts {part.batch}, and `names` calls it "
            f"{layout!r}. PEFT packs a parameter (experts, d_out, d_in), or one "
            "without experts. Experts that all see one input are declared, "
            f"targets={{{path!r}: {{'batch': 0}}}}. Else leave `names` out for a file "
            "with our paths."
        )
    return theirs != _reading(tensor, names, experts=bool(part.batch))


def part_read(tensor: str, path: str, shape: Shape, names: NameMap) -> Part:
    """The roles of our axes of a single layer, as PEFT reads the parameter's.

    >>> names = NameMap([("up", "experts.up", "linear")])
    >>> part_read("experts.up", "up", (3, 4, 6), names).inputs
    (1,)
    """
    first = len(shape) - 2
    down, up = (first,), (first + 1,)
    if (names.layout(path) == "linear") != (
        _reading(tensor, names, experts=first == 1) == "linear"
    ):
        down, up = up, down
    return Part(shape, down, up, tuple(range(first)))


def _reading(tensor: str, names: NameMap, *, experts: bool) -> str:
    """How PEFT takes a tensor to lie, as `tensor_layout` says it."""
    module = tensor.rpartition(".")[0]
    return "same" if experts and names.reads_transposed(module) else "linear"


def shapes(mirrored: bool, ours: dict[str, Shape]) -> dict[str, Shape]:
    """Shapes of their tensors, from those of ours.

    >>> shapes(False, {"a": (3, 2, 4), "b": (3, 6, 2)})
    {'a': (6, 4), 'b': (6, 6)}
    """
    (*experts, rank, d_in), d_out = ours["a"], ours["b"][-2]
    if mirrored:
        d_in, d_out = d_out, d_in
    rows = math.prod(experts) * rank
    return ours | {"a": (rows, d_in), "b": (d_out, rows)}


def to_theirs(mirrored: bool, tensors: Tensors) -> Tensors:
    """Their tensors of our tensors of a site."""
    down, up = tensors["a"], tensors["b"]  # (..., rank, d_in), (..., d_out, rank)
    if mirrored:
        down, up = up.swapaxes(-1, -2), down.swapaxes(-1, -2)
    if down.ndim == 3:
        down = down.reshape(-1, down.shape[-1])
        up = up.transpose(1, 2, 0).reshape(up.shape[1], -1)
    packed = {"a": np.ascontiguousarray(down), "b": np.ascontiguousarray(up)}
    return tensors | packed


def to_ours(mirrored: bool, experts: Shape, tensors: Tensors) -> Tensors:
    """Our tensors of theirs, for so many experts: `(count,)`, or none at all."""
    down, up = tensors["a"], tensors["b"]
    if experts:
        down = down.reshape(*experts, -1, down.shape[-1])
        up = up.reshape(len(up), -1, *experts).transpose(2, 0, 1)
    if mirrored:
        down, up = up.swapaxes(-1, -2), down.swapaxes(-1, -2)
    return tensors | {"a": down, "b": up}
