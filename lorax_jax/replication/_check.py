"""Whether a tree's layers are repeated as a configuration says."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from .. import _paths
from .._errors import ReplicationError
from .._ranges import Ranges, ranges_of, sources
from ..quant import Base
from ._view import Replicated

# What no model has: only a tree's own layers are counted here.
_ENDLESS = 1 << 62

# Numbers that may be those of layers: a whole component, or the end of one.
_NUMBER = re.compile(r"(?:(?<=/)|(?<=_)|^)(0|[1-9]\d*)(?=/)")


def layers_of(params: Any, ranges: Ranges | None) -> Ranges | None:
    """The ranges that a tree's layers are repeated by.

    Stacks say it themselves. Unrolled layers that are repeated are the same arrays,
    which does not say of which layers: they are compared with `ranges`. Types and
    traced values say how many layers there are, and no more.

    Args:
        params: the parameter tree, or its types.
        ranges: what a configuration says.

    Returns:
        `ranges`, or where that is `None`, what the stacks say.

    Raises:
        ReplicationError: if the tree's layers are not those of `ranges`.
    """
    leaves = _paths.flatten(params, is_leaf=_is_packed)[0]
    views = {path: leaf for path, leaf in leaves if isinstance(leaf, Replicated)}
    if ranges is None:
        said = {_index(view) for view in views.values()}
        index = said.pop() if len(said) == 1 else None
        return None if index is None else ranges_of(index)
    wanted = sources(ranges, _ENDLESS, "`layer_replication`")
    for path, view in views.items():
        index = _index(view)
        if index is None and len(wanted) == view.index.array.size:
            continue
        if index != wanted:
            held = f"{view.index.array.size} layers" if index is None else list(index)
            raise ReplicationError(
                f"`layer_replication` = {ranges} stands for the layers {list(wanted)}, "
                f"and {path!r} holds {held}. Replicate the parameters that they were "
                f"made of:  lj.replicate(params, {ranges})"
            )
    if not views and not any(_fits(layers, wanted) for layers in _containers(leaves)):
        raise ReplicationError(
            f"`layer_replication` = {ranges} stands for the layers {list(wanted)}, and "
            "the parameters have no layers that are repeated so. Call  "
            f"lj.replicate(params, {ranges}, layers='...')  with the path of the "
            "layers, and keep what it returns as it is: `jax.jit` and `jax.device_put` "
            "make a copy of each layer."
        )
    return ranges


def shared_layers(params: Any) -> Ranges | None:
    """How unrolled layers are repeated, if whole layers are the same arrays.

    They are numbered in the order in which they first appear, since nothing says which
    layers of another model they were.
    """
    leaves = _paths.flatten(params, is_leaf=_is_packed)[0]
    for layers in _containers(leaves):
        column = max(layers, key=len)
        found = _classes_of([column[i] for i in sorted(column)])
        if found is not None and len(set(found)) < len(found) and _fits(layers, found):
            return ranges_of(found)
    return None


def _is_packed(node: Any) -> bool:
    return isinstance(node, Base)


def _index(view: Replicated) -> tuple[int, ...] | None:
    """The layers of a view, if they are known."""
    array = view.index.array
    if isinstance(array, Tracer | jax.ShapeDtypeStruct):
        return None
    return tuple(np.asarray(array).reshape(-1).tolist())


# The leaves of layers: for each path within a layer, the leaves there by layer.
Layers = list[dict[int, Any]]


def _containers(leaves: Sequence[tuple[str, Any]]) -> list[Layers]:
    """What may be layers: leaves whose paths differ in a number, 0, 1, 2 and so on."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for path, leaf in leaves:
        for number in _NUMBER.finditer(path):
            before, behind = path[: number.start()], path[number.end() :]
            found.setdefault(before, {}).setdefault(behind, {})[int(number[1])] = leaf
    columns = [[*column.values()] for column in found.values()]
    return [layers for layers in columns if len(set().union(*layers)) == _count(layers)]


def _count(layers: Layers) -> int:
    return 1 + max(number for column in layers for number in column)


def _fits(layers: Layers, wanted: Sequence[int]) -> bool:
    """Whether layers are the same arrays where `wanted` names the same layer."""
    if _count(layers) != len(wanted):
        return False
    for column in layers:
        found = _classes_of([column[i] for i in sorted(column)])
        if found not in (None, _classes([wanted[i] for i in sorted(column)])):
            return False
    return True


def _classes_of(column: Sequence[Any]) -> tuple[int, ...] | None:
    """Which of the layers' leaves are one array; `None` where that cannot be told."""
    arrays = [jax.tree.leaves(leaf) for leaf in column]
    types = Tracer | jax.ShapeDtypeStruct
    if any(isinstance(x, types) for layer in arrays for x in layer):
        return None
    return _classes([tuple(map(id, layer)) for layer in arrays])


def _classes(values: Sequence[Any]) -> tuple[int, ...]:
    """Values numbered by their first appearance.

    >>> _classes("abbc")
    (0, 1, 1, 2)
    """
    numbers: dict[Any, int] = {}
    return tuple(numbers.setdefault(value, len(numbers)) for value in values)
